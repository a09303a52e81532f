"""How the routers chose in one training step: sums that add up over micro-batches and ranks, for the log."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from remix_cli.core import routing

DEAD_SHARE = 0.01  # a LoRA that serves fewer than 1 % of the tokens is as good as unused
DOMINATING_SHARE = 0.95  # one that serves at least so many does not depend on the token any more


@dataclass
class StepRouting:
    """L routers of n LoRAs. A decision is one router's choice for one real token under one selection."""

    sums: Tensor  # (L, 4) float64, over decisions: entropy of q, ESS of q, ESS of the weights, 1
    used: Tensor  # (L, n) float64: decisions in which each LoRA was active
    worst: Tensor  # () float64: the smallest ESS of the weights

    @classmethod
    def measure(cls, logits: Tensor, chosen: Tensor, weights: Tensor, mask: Tensor) -> StepRouting:
        """logits and weights (M, L, B, T, n), chosen (M, L, B, T, k), mask (B, T) True at real tokens."""
        n = logits.shape[-1]
        ess = routing.effective_support_size(weights.float())
        parts = routing.entropy(logits), routing.effective_support_size(logits.softmax(-1)), ess
        sums = [(part * mask).double().sum((0, 2, 3)) for part in (*parts, torch.ones_like(ess))]
        used = (routing.selection_mask(chosen, n) & mask.unsqueeze(-1)).sum((0, 2, 3)).double()
        return cls(torch.stack(sums, -1), used, ess.masked_fill(~mask, n).amin().double())

    @classmethod
    def none(cls, routers: int, pool_size: int, device: torch.device) -> StepRouting:
        """What a rank without a micro-batch adds."""
        wide: dict[str, Any] = {"dtype": torch.float64, "device": device}
        worst = torch.full((), float(pool_size), **wide)
        return cls(torch.zeros(routers, 4, **wide), torch.zeros(routers, pool_size, **wide), worst)

    @classmethod
    def add(cls, parts: list[StepRouting]) -> StepRouting:
        return cls(
            torch.stack([p.sums for p in parts]).sum(0),
            torch.stack([p.used for p in parts]).sum(0),
            torch.stack([p.worst for p in parts]).amin(),
        )

    @property
    def decisions(self) -> Tensor:
        return self.sums[:, 3].sum()

    def shares(self) -> Tensor:
        """(L, n): of each router's decisions, those in which each LoRA was active."""
        return self.used * (len(self.used) / float(self.decisions))

    def summary(self) -> dict[str, Any]:
        """Means over decisions; LoRAs serving under 1 % of their router's tokens, and the largest share.

        Empty where there is no router.
        """
        if not len(self.sums):
            return {}
        entropy, ess_q, ess_weights, decisions = self.sums.sum(0).tolist()
        share = self.shares()
        return {
            "router_entropy": entropy / decisions,
            "ess": ess_q / decisions,
            "ess_weights": ess_weights / decisions,
            "ess_weights_worst": float(self.worst),
            "dead_loras": int((share < DEAD_SHARE).sum()),
            "largest_share": float(share.max()),
        }
