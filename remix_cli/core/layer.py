"""The two modules of a routed adapter: a pool of LoRAs on one linear layer, and the router that serves it.

Shapes: B sequences, T positions, D_in and D_out widths of the linear, n LoRAs of rank r, k of them active.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from remix_cli.core import kernel, routing
from remix_cli.core.clusters import centred
from remix_cli.core.config import AdapterConfig
from remix_cli.core.product import gates_of, pool_linear
from remix_cli.core.trace import Decision, RoutingState, Trace, Weighting
from remix_cli.errors import RecipeError

ONE_LIST = "is given the tokens of all rows as one list (as experts are), in which no router can follow a row"


class BlockPass:
    """The one pass through a router's block that is under way. No module: setting a module's attributes is slow."""

    __slots__ = ("weighting",)

    def __init__(self) -> None:
        self.weighting: Weighting | None = None


class Router(nn.Module):
    """Scores the n LoRAs of a pool for each position: logits = P x / ||x||, P (n, D) in float32.

    The input is scaled to unit length, so that neither the residual stream's growth over the layers nor
    the model's width changes how fast the router learns, and the initial logits have the standard
    deviation `router_init_std` everywhere; `router_unit_input: false` takes P x, as published. x is detached
    for ReMix: given the selection the loss does not depend on P, and the score's gradient with respect to x is
    noise for the LoRAs below. With `clusters` x is the centre nearest to the prompt's mean input.
    """

    def __init__(
        self, name: str, index: int, width: int, config: AdapterConfig, state: RoutingState, device: torch.device
    ):
        super().__init__()
        self.name = name
        self.index = index  # position of this router's slice in the drawn noise
        self.config = config
        self.active, self.scale = config.active, config.scale  # k and omega; see Adapter.activating
        self.local = False  # True: no attention follows, so a choice at s changes only the loss at s
        self.weight = nn.Parameter(torch.zeros(config.pool_size, width, dtype=torch.float32, device=device))
        # What prompts have in common, (D,), and the clusters' centres, (C, D): found before training, never trained.
        self.common: Tensor
        self.centres: Tensor
        self.register_buffer("common", torch.zeros(width, device=device), persistent=False)
        self.register_buffer("centres", torch.zeros(config.clusters, width, device=device), persistent=False)
        self.state = state
        self.block = BlockPass()

    def reset_parameters(self, generator: torch.Generator) -> None:
        values = torch.randn(self.weight.shape, generator=generator) * self.config.router_init_std
        with torch.no_grad():
            self.weight.copy_(values)

    def scores(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits before the softmax, (..., n), and what they were divided by, (..., 1), for x (..., D).

        In float32 (float64 for a float64 model). The division comes after the product, which leaves n numbers a
        token, not D.
        """
        wide = _wide(x)
        with torch.autocast(_device_type(x), enabled=False):
            products = F.linear(wide, self.weight.to(wide.dtype))
        if not self.config.router_unit_input:
            return products, torch.ones_like(products[..., :1])
        length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).clamp_min(1e-12)
        return products / length, length

    @torch.no_grad()
    def nearest_centre(self, x: Tensor) -> Tensor:
        """The centre, (..., D), of the cluster that each prompt's mean x (..., D) belongs to."""
        prompts = centred(x, self.common.to(x.dtype))
        nearest = (prompts @ self.centres.to(x.dtype).mT).argmax(-1)
        return self.centres.to(x.dtype)[nearest]

    @torch.no_grad()
    def add_gradient(self, inputs: list[Tensor], scaled: Tensor) -> None:
        """Add to P's gradient that of a scalar with gradient `scaled` (M, ..., n) with respect to the M products P x.

        `inputs` are the M inputs x (..., D). Closed form, so that no autograd graph has to keep them for every
        router and selection until the losses are known. On a GPU a bfloat16 input is multiplied as it is, by `scaled`
        as the sum of two bfloat16 numbers: 16 bits of it, accumulated in float32, for a quarter of the traffic.
        """
        rows = scaled.flatten(1, -2).mT  # (M, n, S)
        flat = [x.flatten(0, -2) for x in inputs]
        if scaled.is_cuda and flat[0].dtype == torch.bfloat16:
            high = rows.bfloat16()
            parts = torch.cat([high, (rows - high).bfloat16()], 1)  # (M, 2n, S)
            products = [torch.mm(part, x, out_dtype=torch.float32) for part, x in zip(parts, flat, strict=True)]
            gradient = torch.stack(products).unflatten(1, (2, -1)).sum((0, 1))
        else:
            products = [part.to(_wide_type(x.dtype)) @ _wide(x) for part, x in zip(rows, flat, strict=True)]
            gradient = torch.stack(products).sum(0).to(self.weight.dtype)
        self.weight.grad = gradient if self.weight.grad is None else self.weight.grad.add_(gradient)

    def forward(self, x: Tensor) -> Weighting:
        """What the block's pools are weighted by at each position, following the current trace's mode.

        With `level: sequence` one weighting for the sequence: the first forward pass under a trace decides for all
        later ones. Raises RecipeError if x is no (B, T, D).
        """
        if x.dim() != 3:
            raise RecipeError(f"adapter.target_modules: {self.name} {ONE_LIST}")
        trace = self.state.trace or Trace(record=False)
        if self.name in trace.kept:
            return trace.kept[self.name]
        soft = self.config.method != "remix"
        recorded = trace.replay.decisions[self.name] if trace.replay else None
        if recorded and not soft:
            return recorded.weighting  # with the very weights, so that their gradient gathers there
        mode = trace.replay or trace
        noise = None if soft or mode.noise is None else mode.noise[self.index]
        dtype = x.dtype  # of the computation
        x = x if soft else x.detach()
        if self.config.level == "sequence":
            x = _mean_over_prompt(x, mode.prompt)
            if self.config.clusters and mode.quantise:
                x = self.nearest_centre(x)
        if not (soft or trace.record) and kernel.serves(x, self.config.pool_size):
            weighting = Weighting(kernel.choose_gates(x, self.weight.detach(), noise, self._rule(), dtype), None)
        else:
            if soft:
                decision = self._soft(x, recorded.chosen if recorded else None, dtype)
            else:
                decision = self._constant(x, noise, mode.selection_grad and torch.is_grad_enabled(), dtype)
            if trace.record and not trace.replay:
                trace.add(self.name, decision)
            weighting = decision.weighting
        if self.config.level == "sequence" and not recorded:
            trace.kept[self.name] = weighting
        return weighting

    def _rule(self) -> kernel.Rule:
        return kernel.Rule(self.active, self.scale, self.config.rank, self.config.router_unit_input)

    @torch.no_grad()
    def _constant(self, x: Tensor, noise: Tensor | None, differentiated: bool, dtype: torch.dtype) -> Decision:
        """ReMix's rule: the top k of logits + noise, each with the weight omega.

        `differentiated`: the weights are to gather a gradient, in float32 or wider.
        """
        weights_type = _wide_type(dtype) if differentiated else dtype
        if kernel.serves(x, self.config.pool_size):
            decision = Decision(x, *kernel.choose(x, self.weight, noise, self._rule(), dtype, weights_type))
        else:
            logits, length = self.scores(x)
            chosen = routing.top_k(logits if noise is None else logits + noise, self.active)
            weights = torch.zeros_like(logits, dtype=weights_type).scatter_(-1, chosen, self.scale)
            decision = Decision(x, logits, length, chosen, weights, gates_of(weights, self.config.rank, dtype))
        if differentiated:
            decision.weights.requires_grad_()
        return decision

    def _soft(self, x: Tensor, chosen: Tensor | None, dtype: torch.dtype) -> Decision:
        """MixLoRA's rule, a softmax over the k largest logits, times the total weight; HydraLoRA's, with k = n."""
        logits, length = self.scores(x)
        if chosen is None:
            chosen = routing.top_k(logits.detach(), self.active)
        share = logits.gather(-1, chosen).softmax(-1) * self.config.total_weight
        weights = torch.zeros_like(logits).scatter(-1, chosen, share)
        gates = gates_of(weights, self.config.rank, dtype)
        live = logits if logits.requires_grad else None
        return Decision(x.detach(), logits.detach(), length.detach(), chosen, weights, gates, live)


def _device_type(x: Tensor) -> str:
    """As autocast has it, which knows nothing of skeletons."""
    return "cpu" if x.is_meta else x.device.type


def _wide_type(dtype: torch.dtype) -> torch.dtype:
    """float32, or `dtype` if wider."""
    return torch.promote_types(dtype, torch.float32)


def _wide(x: Tensor) -> Tensor:
    return x.to(_wide_type(x.dtype))


def _mean_over_prompt(x: Tensor, prompt: Tensor | None) -> Tensor:
    """Mean of x (B, T, D) over the positions where `prompt` (B, T) is True, (B, 1, D), in float32 or wider."""
    if prompt is None:
        raise RuntimeError(
            "routing by sequence chooses from the prompt; run the model inside adapter.tracing(Trace(prompt=mask))"
        )
    share = prompt / prompt.sum(-1, keepdim=True)
    wide = _wide(x)
    return share.to(wide.dtype).unsqueeze(1) @ wide


class RoutedLinear(nn.Module):
    """A frozen linear layer plus its pool: y = W x + sum_i w_i B_i A_i x, with the router's weights w.

    The pool is stored stacked, `lora_A` (n r, D_in) and `lora_B` (D_out, n r), and the weights multiply
    the rank-r activations: two products whatever n, and every LoRA gets a (possibly zero) gradient. A shared A
    is stored once, (r, D_in). Without a router every weight is omega.
    """

    def __init__(self, base_layer: nn.Module, config: AdapterConfig, router: Router | None, state: RoutingState):
        super().__init__()
        self.base_layer = base_layer
        self.pool_size, self.rank, self.shares_a = config.pool_size, config.rank, config.shares_a
        self.state = state
        width_in, width_out = int(base_layer.in_features), int(base_layer.out_features)  # type: ignore[arg-type]
        stacked = config.pool_size * config.rank
        where = next(base_layer.parameters()).device
        rows = config.rank if config.shares_a else stacked
        self.lora_A = nn.Parameter(torch.zeros(rows, width_in, dtype=torch.float32, device=where))
        self.lora_B = nn.Parameter(torch.zeros(width_out, stacked, dtype=torch.float32, device=where))
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self.drops = config.dropout > 0
        self.plain = type(base_layer) is nn.Linear  # not quantised
        self.routes_itself = router is not None and config.scope == "module"
        self.router: Router | None
        self.gates: Tensor
        if router is None:
            self.router = None
            constant = torch.full((1, 1, stacked), config.scale, dtype=torch.float32, device=where)
            self.register_buffer("gates", constant, persistent=False)
        elif self.routes_itself:
            self.router = router
        else:  # owned by the block; kept out of this module's parameters
            object.__setattr__(self, "router", router)

    def reset_parameters(self, generator: torch.Generator) -> None:
        """A uniform as in LoRA's reference code, bound 1/sqrt(D_in); B zero, so training starts at the base."""
        bound = 1 / math.sqrt(self.lora_A.shape[1])
        values = (torch.rand(self.lora_A.shape, generator=generator) * 2 - 1) * bound
        with torch.no_grad():
            self.lora_A.copy_(values)
            self.lora_B.zero_()

    def _is_plain(self, x: Tensor, base: Any) -> bool:
        """Does the product by hand apply? Not to a quantised layer, under autocast, or with dropout."""
        if not self.plain or (self.training and self.drops):
            return False
        return base.weight.dtype == x.dtype and not torch.is_autocast_enabled(_device_type(x))

    def _weighting(self, x: Tensor) -> Weighting:
        if self.router is None:
            return Weighting(self.state.cast(self.gates, x.dtype), None)
        weighting = self.router(x) if self.routes_itself else self.router.block.weighting
        if weighting is None:
            raise RecipeError(
                f"adapter.target_modules: {self.router.name} is not called as a whole when its layers are, so no "
                "router can choose at its input; set router.scope: module"
            )
        return weighting

    def forward(self, x: Tensor) -> Tensor:
        weighting = self._weighting(x)
        base = self.base_layer
        if self._is_plain(x, base):
            return pool_linear(x, base, self.lora_A, self.lora_B, weighting, self.state)
        y = base(x)
        gates, weights = weighting
        # Worked size: B, T = 4, 512, D_in = 4096, n = 8, r = 8.
        down = F.linear(self.dropout(x), self.lora_A.to(x.dtype))  # (4, 512, 64), or (4, 512, 8) of a shared A
        if self.shares_a:
            down = down.repeat(1, 1, self.pool_size)
        if weights is None:
            mixed = down * gates.to(down.dtype)
        else:
            mixed = (down.unflatten(-1, (self.pool_size, self.rank)) * weights.to(x.dtype).unsqueeze(-1)).flatten(-2)
        return y + F.linear(mixed, self.lora_B.to(x.dtype))  # (4, 512, D_out)
