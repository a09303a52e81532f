"""What the micro-batches of a step add up to, on all processes."""

from dataclasses import dataclass

import torch
from torch import Tensor

from remix_cli.core.step import MicroResult
from remix_cli.core.step_routing import StepRouting


@dataclass
class StepSums:
    """Float64 sums over a step's micro-batches, of one process or, once their packed forms are added up, of all."""

    loss: Tensor  # (), mean over selections of the step's summed token losses, divided by its targets
    advantage_variance: Tensor  # (), over decisions; divide by their number
    tokens: Tensor  # (), real ones
    signals: Tensor  # (), numbers of the signals that asked for an end; 0 if none did
    learnt_from: Tensor  # (Estimator.sums,)
    routing: StepRouting

    @classmethod
    def of(
        cls, results: list[MicroResult], nothing: StepRouting, learns_from: int, tokens: int, signal: int
    ) -> "StepSums":
        """Of this process. `nothing` is what one without a micro-batch adds; `learns_from` is `Estimator.sums`."""
        device = nothing.sums.device
        routing = StepRouting.add([nothing, *(result.routing for result in results)])
        rows = [torch.zeros(2 + learns_from, dtype=torch.float64, device=device)]
        for result in results:
            variance = result.advantage_variance * result.routing.decisions
            rows.append(torch.stack([result.loss, variance, *result.sums]).double())
        loss, variance, *rest = torch.stack(rows).sum(0)
        counted = torch.tensor([tokens, signal], dtype=torch.float64, device=device)
        learnt_from = torch.stack(rest) if rest else loss.new_zeros(0)
        return cls(loss, variance, counted[0], counted[1], learnt_from, routing)

    def pack(self, rank: int, world: int) -> Tensor:
        """As one vector, which may be added up over processes: one collective a step.

        The smallest effective support is no sum: each process has a place of its own for it.
        """
        worst = torch.zeros(world, dtype=torch.float64, device=self.loss.device)
        worst[rank] = self.routing.worst
        scalars = torch.stack([self.loss, self.advantage_variance, self.tokens, self.signals])
        return torch.cat([scalars, self.learnt_from, self.routing.sums.flatten(), worst, self.routing.used.flatten()])

    def unpack(self, packed: Tensor, world: int) -> "StepSums":
        """Inverse of `pack`, for sums of the shapes of these; on the device of `packed`."""
        sizes = [4, len(self.learnt_from), self.routing.sums.numel(), world, self.routing.used.numel()]
        scalars, learnt_from, sums, worst, used = packed.split(sizes)
        routing = StepRouting(sums.view_as(self.routing.sums), used.view_as(self.routing.used), worst.amin())
        return StepSums(scalars[0], scalars[1], scalars[2], scalars[3], learnt_from, routing)
