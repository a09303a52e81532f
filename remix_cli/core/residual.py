"""LoRAs with paths between neighbouring layers while they are trained: ResLoRA (arXiv 2402.18039), its three kinds.

For the linears of one name in the layers 0, 1, ..., x_l what comes into the one of layer l, m how many layers back:

    input    y_l = W x_l + s B_l A_l (x_l + x_{l-1} + ... + x_{l-m})
    block    y_l = W x_l + s (B_l A_l + B_{l-1} A_{l-1} + ... + B_{l-m} A_{l-m}) x_l
    middle   y_l = W x_l + s B_l (A_l x_l + A_{l-1} x_{l-1} + ... + A_{l-m} x_{l-m})

Layers that do not exist add nothing. `block` is a LoRA of rank (m + 1) r in weights of its own, exactly; the other two
depend on what came into other layers, which no weights of one layer hold.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from remix_cli.core.layer import RoutedLinear
from remix_cli.errors import RecipeError


class ResidualLinear(RoutedLinear):
    """A frozen linear layer and one LoRA that is joined to those of the layers before; see the module's formulas.

    `earlier`: their linears, the nearest first. What later layers need is handed on, and forgotten with its last use,
    so that no pass keeps another's graph. A layer that is repeated alone, as recomputed activations are, is refused.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.kind = ""
        self.earlier: tuple[ResidualLinear, ...] = ()
        self.hands_on = False  # is there a later layer?
        self.forgets: tuple[ResidualLinear, ...] = ()  # those of `earlier` that no later layer needs
        self.handed: Tensor | None = None
        self.to_b = nn.Identity()  # what B is given goes through it, so that a hook can see it

    def join(
        self, kind: str, earlier: tuple["ResidualLinear", ...], forgets: tuple["ResidualLinear", ...], hands_on: bool
    ) -> None:
        self.kind, self.earlier, self.forgets, self.hands_on = kind, earlier, forgets, hands_on

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D_out) from x (B, T, D_in). Raises RecipeError where the layers before have not run."""
        inner = self.to_b(self._inner(x))  # (B, T, r), or (B, T, (m + 1) r)
        omega = self.gates[..., :1].to(x.dtype)
        added = F.linear(inner * omega, self.outer().to(x.dtype))
        return self.base_layer(x) + added

    def outer(self) -> Tensor:
        """B (D_out, r), or of this layer and the earlier ones side by side, (D_out, (m + 1) r)."""
        if self.kind != "block":
            return self.lora_B
        return torch.cat([self.lora_B, *(other.lora_B for other in self.earlier)], 1)

    def reading(self) -> Tensor:
        """A (r, D_in), or with the earlier ones below it, ((m + 1) r, D_in)."""
        if self.kind != "block":
            return self.lora_A
        return torch.cat([self.lora_A, *(other.lora_A for other in self.earlier)])

    def _inner(self, x: Tensor) -> Tensor:
        if self.kind == "block":
            return F.linear(self.dropout(x), self.reading().to(x.dtype))
        before = self._handed_over()
        if self.kind == "input":
            self._hand_on(x)
            return F.linear(self.dropout(sum(before, x)), self.lora_A.to(x.dtype))
        own = F.linear(self.dropout(x), self.lora_A.to(x.dtype))
        self._hand_on(own)
        return sum(before, own)

    def _handed_over(self) -> list[Tensor]:
        before = [other.handed for other in self.earlier if other.handed is not None]
        if len(before) < len(self.earlier):
            raise RecipeError(
                f"adapter.shortcut: {self.kind} needs the layers before, and one was run alone, as recomputed "
                "activations are; leave gradient checkpointing out"
            )
        return before

    def _hand_on(self, value: Tensor) -> None:
        self.handed = value if self.hands_on else None
        for other in self.forgets:
            other.handed = None
