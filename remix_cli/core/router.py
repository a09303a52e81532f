"""The router of a pool: its parameters, what it reads, its scores, its choice, and its gradient in closed form.

Which path serves a call of `Router.forward`, the first row that applies:

    | a call                                                    | path             |
    |-----------------------------------------------------------|------------------|
    | chosen already: `level: sequence`, a later pass           | `_kept`          |
    | replayed under checkpointing, constant weights            | `_recorded`      |
    | replayed under checkpointing, weights with a gradient     | `_reweighted`    |
    | chosen now: constant weights on a GPU, recorded           | `_fused`         |
    | chosen now: constant weights on a GPU, not recorded       | `_fused_gates`   |
    | chosen now: anything else                                 | `_eager`         |

What a call that scores reads:

    | setting                                                   | read by          |
    |-----------------------------------------------------------|------------------|
    | `level: token`                                            | `_by_token`      |
    | `level: sequence`                                         | `_by_sequence`   |
    | `level: sequence` with `clusters`                         | `nearest_centre` |

The choice is written three times. `_eager` with rules.py is the reference: any rule, type and device, and readable.
kernel_triton.py is ReMix's rule in one launch instead of about ten, which is most of the time of a short pass.
export/modeling_remix.py travels with exported models, which load without this package. The product of a linear and
its pool is written three times as well, for the reasons in product.py. tests/core/test_paths.py holds them together.

Shapes: B sequences, T positions, D the width of what the router reads, n LoRAs of rank r, k of them active.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from remix_cli.core import kernel, routing
from remix_cli.core.clusters import centred
from remix_cli.core.config import AdapterConfig
from remix_cli.core.product import gates_of
from remix_cli.core.rules import ConstantWeight, make_rule
from remix_cli.core.trace import Decision, RoutingState, Trace, Weighting
from remix_cli.errors import RecipeError

ONE_LIST = "is given the tokens of all rows as one list (as experts are), in which no router can follow a row"


class BlockPass:
    """The one pass through what a router serves that is under way. No module: setting its attributes is slow."""

    __slots__ = ("weighting",)

    def __init__(self) -> None:
        self.weighting: Weighting | None = None


class Router(nn.Module):
    """Scores the n LoRAs of a pool for each position: logits = P x / ||x||, P (n, D) in float32.

    The input is scaled to unit length, so that neither the residual stream's growth over the layers nor
    the model's width changes how fast the router learns, and the initial logits have the standard
    deviation `router_init_std` everywhere; `router_unit_input: false` takes P x, as published. x is detached
    under a rule with constant weights: given the selection the loss does not depend on P, and the score's gradient
    with respect to x is noise for the LoRAs below. With `clusters` x is the centre nearest to the prompt's mean input.
    """

    def __init__(
        self, name: str, index: int, width: int, config: AdapterConfig, state: RoutingState, device: torch.device
    ):
        super().__init__()
        self.name = name
        self.index = index  # position of this router's slice in the drawn noise
        self.config = config
        self.rule = make_rule(config, config.active)  # another for a while under Adapter.activating
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

    def forward(self, x: Tensor) -> Weighting:
        """What the block's pools are weighted by at each position of x (B, T, D), following the current trace's mode.

        With `level: sequence` one weighting for the sequence: the first forward pass under a trace decides for all
        later ones. Raises RecipeError if x is no (B, T, D).
        """
        if x.dim() != 3:
            raise RecipeError(f"adapter.target_modules: {self.name} {ONE_LIST}")
        trace = self.state.trace or Trace(record=False)
        if self.name in trace.kept:
            return self._kept(trace)
        if trace.replay is not None:
            if self.rule.differentiable:
                return self._reweighted(x, trace.replay)
            return self._recorded(trace.replay)
        read = self._read(x, trace)
        if not self._is_fused(read):
            weighting = self._eager(read, trace, x.dtype)
        elif trace.record:
            weighting = self._fused(read, trace, x.dtype)
        else:
            weighting = self._fused_gates(read, trace, x.dtype)
        if self.config.level == "sequence":
            trace.kept[self.name] = weighting
        return weighting

    def in_force(self) -> Weighting | None:
        """What it has chosen for the blocks that it serves; None outside of them.

        Under checkpointing a later block is repeated before the first, at whose input the router sits, and perhaps
        after another pass; and a decoder layer may be repeated without its hooks, one of which asks the router. What
        was chosen then is in the trace.
        """
        trace = self.state.trace
        unasked = self.config.scope == "model" or self.block.weighting is None
        if trace is not None and trace.replay is not None and unasked:
            return self._recorded(trace.replay)
        return self.block.weighting

    # The paths of the first table.

    def _kept(self, trace: Trace) -> Weighting:
        return trace.kept[self.name]

    def _recorded(self, replayed: Trace) -> Weighting:
        """The very weights of the pass that is repeated, so that their gradient gathers there."""
        return replayed.decisions[self.name].weighting

    def _reweighted(self, x: Tensor, replayed: Trace) -> Weighting:
        """The selection of the pass that is repeated; its weights again, with a graph of their own."""
        chosen = replayed.decisions[self.name].chosen
        return self._decide(self._read(x, replayed), replayed, x.dtype, chosen).weighting

    def _fused(self, read: Tensor, trace: Trace, dtype: torch.dtype) -> Weighting:
        noise, weights_type = self._noise(trace), self._weights_type(trace, dtype)
        choice = kernel.choose(read, self.weight.detach(), noise, self._settings(), dtype, weights_type)
        if self._gathers_gradient(trace):
            choice.weights.requires_grad_()
        decision = Decision(read, *choice)
        trace.add(self.name, decision)
        return decision.weighting

    def _fused_gates(self, read: Tensor, trace: Trace, dtype: torch.dtype) -> Weighting:
        gates = kernel.choose_gates(read, self.weight.detach(), self._noise(trace), self._settings(), dtype)
        return Weighting(gates, None)

    def _eager(self, read: Tensor, trace: Trace, dtype: torch.dtype) -> Weighting:
        decision = self._decide(read, trace, dtype)
        if trace.record:
            trace.add(self.name, decision)
        return decision.weighting

    def _decide(self, read: Tensor, trace: Trace, dtype: torch.dtype, chosen: Tensor | None = None) -> Decision:
        """By the rule, from what the router reads. `chosen`: the selection, where it is made already."""
        gathers = self._gathers_gradient(trace)
        weights_type = self._weights_type(trace, dtype)
        with torch.set_grad_enabled(self.rule.differentiable and torch.is_grad_enabled()):
            logits, length = self.scores(read)
            if chosen is None:
                noise = self._noise(trace)
                preferences = logits if noise is None else logits + noise
                # Off the graph: a recomputation does not choose, and has to save as many tensors as this pass.
                chosen = routing.top_k(preferences.detach(), self.rule.active)
            weights = self.rule.weights(logits, chosen, weights_type)
            gates = gates_of(weights, self.config.rank, dtype)
        if gathers:
            weights.requires_grad_()
        if not logits.requires_grad:
            return Decision(read, logits, length, chosen, weights, gates)
        return Decision(read.detach(), logits.detach(), length.detach(), chosen, weights, gates, live=logits)

    # What a choice depends on besides the rule.

    def _noise(self, trace: Trace) -> Tensor | None:
        """This router's part of the drawn noise, (B, T or 1, n); nothing is drawn under a differentiable rule."""
        if trace.noise is None or self.rule.differentiable:
            return None
        return trace.noise[self.index]

    def _gathers_gradient(self, trace: Trace) -> bool:
        """Shall the backward pass leave a gradient by LoRA in constant weights?"""
        return trace.selection_grad and not self.rule.differentiable and torch.is_grad_enabled()

    def _weights_type(self, trace: Trace, dtype: torch.dtype) -> torch.dtype:
        """float32 or wider where a gradient goes through the weights or gathers in them; else the computation's."""
        if self.rule.differentiable or self._gathers_gradient(trace):
            return _wide_type(dtype)
        return dtype

    def _is_fused(self, read: Tensor) -> bool:
        return isinstance(self.rule, ConstantWeight) and kernel.serves(read, self.config.pool_size)

    def _settings(self) -> kernel.Settings:
        assert isinstance(self.rule, ConstantWeight)  # as `_is_fused` has found
        return kernel.Settings(self.rule.active, self.rule.scale, self.config.rank, self.config.router_unit_input)

    # What it reads: the paths of the second table.

    def _read(self, x: Tensor, trace: Trace) -> Tensor:
        if not self.rule.differentiable:
            x = x.detach()
        if self.config.level == "token":
            return self._by_token(x)
        mean = self._by_sequence(x, trace.prompt)
        if self.config.clusters and trace.quantise:
            return self.nearest_centre(mean)
        return mean

    def _by_token(self, x: Tensor) -> Tensor:
        return x

    def _by_sequence(self, x: Tensor, prompt: Tensor | None) -> Tensor:
        """Mean of x (B, T, D) where `prompt` (B, T) is True, (B, 1, D), in float32 or wider. Raises RuntimeError."""
        if prompt is None:
            raise RuntimeError(
                "routing by sequence chooses from the prompt; run the model inside adapter.tracing(Trace(prompt=mask))"
            )
        share = prompt / prompt.sum(-1, keepdim=True)
        wide = _wide(x)
        return share.to(wide.dtype).unsqueeze(1) @ wide

    @torch.no_grad()
    def nearest_centre(self, x: Tensor) -> Tensor:
        """The centre, (..., D), of the cluster that each prompt's mean x (..., D) belongs to."""
        prompts = centred(x, self.common.to(x.dtype))
        nearest = (prompts @ self.centres.to(x.dtype).mT).argmax(-1)
        return self.centres.to(x.dtype)[nearest]

    # Its mathematics.

    def scores(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits before the softmax, (..., n), and what they were divided by, (..., 1), for x (..., D).

        In float32 (float64 for a float64 model). The division comes after the product, which leaves n numbers a
        token, not D.
        """
        wide = _wide(x)
        with torch.autocast(autocast_device(x), enabled=False):
            products = F.linear(wide, self.weight.to(wide.dtype))
        if not self.config.router_unit_input:
            return products, torch.ones_like(products[..., :1])
        length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).clamp_min(1e-12)
        return products / length, length

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
        if self.weight.grad is None:
            self.weight.grad = gradient
        else:
            self.weight.grad.add_(gradient)


def autocast_device(x: Tensor) -> str:
    """The type of x's device, as autocast has it, which knows nothing of skeletons."""
    return "cpu" if x.is_meta else x.device.type


def _wide_type(dtype: torch.dtype) -> torch.dtype:
    """float32, or `dtype` if wider."""
    return torch.promote_types(dtype, torch.float32)


def _wide(x: Tensor) -> Tensor:
    return x.to(_wide_type(x.dtype))
