"""The two modules of a routed adapter: a pool of LoRAs on one linear layer, and the router that serves it.

Shapes: B sequences, T positions, D_in and D_out widths of the linear, n LoRAs of rank r, k of them active.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from remix_cli.adapter import kernel, routing
from remix_cli.adapter.config import AdapterConfig
from remix_cli.adapter.product import gates_of, pool_linear
from remix_cli.adapter.trace import Decision, RoutingState, Trace


class Router(nn.Module):
    """Scores the n LoRAs of a pool for each position: logits = P x / ||x||, P (n, D) in float32.

    The input is scaled to unit length, so that neither the residual stream's growth over the layers nor
    the model's width changes how fast the router learns, and the initial logits have the standard
    deviation `router_init_std` everywhere; `router_unit_input: false` takes P x, as published. x is detached
    for ReMix: given the selection the loss does not depend on P, and the score's gradient with respect to x is
    noise for the LoRAs below.
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
        self.state = state
        self.selected: Tensor | None = None  # weights of the block being computed, (B, T, n)
        self.gates: Tensor | None = None  # the same for each column of its stacked pools, (B, T, n r)

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
        with torch.autocast(x.device.type, enabled=False):
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
        self.weight.grad = gradient if self.weight.grad is None else self.weight.grad.add_(gradient)

    def forward(self, x: Tensor) -> Tensor:
        """Weights of the n LoRAs for each position, (B, T, n), following the current trace's mode.

        With `level: sequence` (B, 1, n), and the first forward pass under a trace decides for all later ones.
        """
        trace = self.state.trace or Trace()
        if self.name in trace.kept:
            return trace.kept[self.name]
        soft = self.config.method == "mixlora"
        recorded = trace.replay.decisions[self.name] if trace.replay else None
        if recorded and not soft:
            return recorded.weights  # the very tensor, so that its gradient gathers there
        mode = trace.replay or trace
        noise = None if soft or mode.noise is None else mode.noise[self.index]
        dtype = x.dtype  # in which the pool will be weighted
        x = x if soft else x.detach()
        if self.config.level == "sequence":
            x = _mean_over_prompt(x, mode.prompt)
        if soft:
            decision = self._soft(x, recorded.chosen if recorded else None)
        else:
            differentiated = mode.selection_grad and torch.is_grad_enabled()
            decision = self._constant(x, noise, _wide_type(dtype) if differentiated else dtype)
            if differentiated:
                decision.weights.requires_grad_()
        if self.state.trace is not None and not recorded:
            if trace.record:
                trace.add(self.name, decision)
            if self.config.level == "sequence":
                trace.kept[self.name] = decision.weights
        return decision.weights

    @torch.no_grad()
    def _constant(self, x: Tensor, noise: Tensor | None, dtype: torch.dtype) -> Decision:
        """ReMix's rule: the top k of logits + noise, each with the weight omega."""
        active, scale, unit = self.active, self.scale, self.config.router_unit_input
        if kernel.serves(x, self.config.pool_size):
            return Decision(x, *kernel.choose(x, self.weight, noise, active, scale, unit, dtype))
        logits, length = self.scores(x)
        chosen = routing.top_k(logits if noise is None else logits + noise, active)
        weights = torch.zeros_like(logits, dtype=dtype).scatter_(-1, chosen, scale)
        return Decision(x, logits, length, chosen, weights)

    def _soft(self, x: Tensor, chosen: Tensor | None) -> Decision:
        """MixLoRA's rule: a softmax over the k largest logits, times k * omega."""
        logits, length = self.scores(x)
        if chosen is None:
            chosen = routing.top_k(logits.detach(), self.active)
        share = logits.gather(-1, chosen).softmax(-1) * (self.active * self.scale)
        weights = torch.zeros_like(logits).scatter(-1, chosen, share)
        return Decision(x.detach(), logits.detach(), length.detach(), chosen, weights)


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
    the rank-r activations: two products whatever n, and every LoRA gets a (possibly zero) gradient.
    """

    def __init__(self, base_layer: nn.Module, config: AdapterConfig, router: Router):
        super().__init__()
        self.base_layer = base_layer
        self.pool_size, self.rank = config.pool_size, config.rank
        self.state = router.state
        width_in, width_out = int(base_layer.in_features), int(base_layer.out_features)  # type: ignore[arg-type]
        stacked = config.pool_size * config.rank
        where = next(base_layer.parameters()).device
        self.lora_A = nn.Parameter(torch.zeros(stacked, width_in, dtype=torch.float32, device=where))
        self.lora_B = nn.Parameter(torch.zeros(width_out, stacked, dtype=torch.float32, device=where))
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self.plain = type(base_layer) is nn.Linear  # not quantised
        self.routes_itself = config.scope == "module"
        if self.routes_itself:
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

    def _is_plain(self, x: Tensor) -> bool:
        """Does the product by hand apply? Not to a quantised layer, under autocast, or with dropout."""
        if not self.plain or (self.training and isinstance(self.dropout, nn.Dropout)):
            return False
        return self.base_layer.weight.dtype == x.dtype and not torch.is_autocast_enabled(x.device.type)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.router(x) if self.routes_itself else self.router.selected
        if weights is None:
            raise RuntimeError(f"{self.router.name}: an adapted linear ran outside of its block's forward")
        if self._is_plain(x):
            return pool_linear(
                x, self.base_layer, self.lora_A, self.lora_B, weights, self._gates(weights, x), self.state
            )
        y = self.base_layer(x)
        # Worked size: B, T = 4, 512, D_in = 4096, n = 8, r = 8.
        down = F.linear(self.dropout(x), self.lora_A.to(x.dtype))  # (4, 512, 64)
        mixed = down.unflatten(-1, (self.pool_size, self.rank)) * weights.to(x.dtype).unsqueeze(-1)
        return y + F.linear(mixed.flatten(-2), self.lora_B.to(x.dtype))  # (4, 512, D_out)

    def _gates(self, weights: Tensor, x: Tensor) -> Tensor:
        """Made once for all linears of a block; the block forgets them when its forward pass ends."""
        if self.routes_itself:
            return gates_of(weights, self.rank, x.dtype)
        if self.router.gates is None:
            self.router.gates = gates_of(weights, self.rank, x.dtype)
        return self.router.gates
