"""A frozen linear layer with its pool of LoRAs. Its router is in router.py, the product in product.py."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from remix_cli.core.config import AdapterConfig
from remix_cli.core.product import pool_linear, pool_linear_by_autograd
from remix_cli.core.router import Router, autocast_device
from remix_cli.core.trace import RoutingState, Weighting
from remix_cli.errors import RecipeError


class RoutedLinear(nn.Module):
    """A frozen linear layer plus its pool: y = W x + sum_i w_i B_i A_i x, with the router's weights w.

    The pool is stored stacked, `lora_A` (n r, D_in) and `lora_B` (D_out, n r), and the weights multiply
    the rank-r activations: two products whatever n, and every LoRA gets a (possibly zero) gradient. A shared A
    is stored once, (r, D_in). Without a router every weight is omega. In a pool of a layer's modules it holds the LoRA
    number `place` alone, n is 1 here, and w that LoRA's weight.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        config: AdapterConfig,
        router: Router | None,
        state: RoutingState,
        place: int | None = None,
    ):
        super().__init__()
        self.base_layer = base_layer
        self.pool_size = config.on_each
        self.rank = config.rank
        self.shares_a = config.shares_a
        self.state = state
        self.place = place
        width_in, width_out = int(base_layer.in_features), int(base_layer.out_features)  # type: ignore[arg-type]
        stacked = config.on_each * config.rank
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
        else:  # owned by a block; kept out of this module's parameters
            object.__setattr__(self, "router", router)

    def reset_parameters(self, generator: torch.Generator) -> None:
        """A uniform as in LoRA's reference code, bound 1/sqrt(D_in); B zero, so training starts at the base."""
        bound = 1 / math.sqrt(self.lora_A.shape[1])
        values = (torch.rand(self.lora_A.shape, generator=generator) * 2 - 1) * bound
        with torch.no_grad():
            self.lora_A.copy_(values)
            self.lora_B.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D_out) from x (B, T, D_in). Raises RecipeError where no router can have chosen."""
        weighting = self._weighting(x)
        base = self.base_layer
        if self._is_plain(x, base):
            return pool_linear(x, base, self.lora_A, self.lora_B, weighting, self.state)
        y = base(x)
        return pool_linear_by_autograd(self.dropout(x), y, self.lora_A, self.lora_B, weighting)

    def reading(self) -> Tensor:
        """All of A that x is read by, (n r, D_in), or (r, D_in) if it is shared."""
        return self.lora_A

    def outer(self) -> Tensor:
        """All of B that adds to y, (D_out, n r)."""
        return self.lora_B

    def _is_plain(self, x: Tensor, base: Any) -> bool:
        """Does the product by hand apply? Not to a quantised layer, under autocast, or with dropout."""
        if not self.plain or (self.training and self.drops):
            return False
        return base.weight.dtype == x.dtype and not torch.is_autocast_enabled(autocast_device(x))

    def _weighting(self, x: Tensor) -> Weighting:
        """Constant without a router; else what its own router says of x, or its block's or the model's has said."""
        if self.router is None:
            return Weighting(self.state.cast(self.gates, x.dtype), None)
        if self.routes_itself:
            return self.router(x)
        weighting = self.router.in_force()
        if weighting is None:
            raise RecipeError(
                f"adapter.target_modules: {self.router.name} is not called as a whole when its layers are, so no "
                "router can choose at its input; set router.scope: module"
            )
        return weighting if self.place is None else self._share(weighting, self.place)

    def _share(self, weighting: Weighting, place: int) -> Weighting:
        """Of a layer's weighting, for n LoRAs, that of the one LoRA here."""
        gates = weighting.gates[..., place * self.rank : (place + 1) * self.rank]
        weights = None if weighting.weights is None else weighting.weights[..., place : place + 1]
        return Weighting(gates, weights)
