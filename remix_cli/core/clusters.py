"""Which prompts belong together: the centres that a router with `clusters` reads instead of the prompt itself.

Routing by the nearest of C centres gives prompts of one kind one set of LoRAs; a router that reads the prompt itself
scatters them, because prompts of one kind differ. Found before the first step, from the base model's inputs to the
router and nothing else: no labels, no gradient.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

STARTS = 4  # of k-means
ROUNDS = 30  # of each; most stop changing earlier


def centred(prompts: Tensor, common: Tensor) -> Tensor:
    """Rows of prompts (..., D) scaled to unit length, less their common part (D,), at unit length again.

    Without that prompts look alike: most of every one is the same direction.
    """
    return F.normalize(F.normalize(prompts, dim=-1) - common, dim=-1)


def common_part(prompts: Tensor) -> Tensor:
    """(D,): the mean of prompts (N, D) after each is scaled to unit length."""
    return F.normalize(prompts, dim=-1).mean(0)


def spherical_k_means(rows: Tensor, count: int) -> Tensor:
    """Centres (count, D) of unit length for rows (N, D) of unit length, N >= count (Dhillon and Modha 2001).

    The best of `STARTS`, each begun as k-means++ has it (Arthur and Vassilvitskii 2007). Always the same draws.
    """
    generator = torch.Generator().manual_seed(0)
    attempts = [_refined(rows, _spread_out(rows, count, generator)) for _ in range(STARTS)]
    likenesses = torch.stack([(rows @ centres.T).amax(-1).mean() for centres in attempts])
    return attempts[int(likenesses.argmax())]


def _spread_out(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` of the rows, each drawn in proportion to its squared distance from those drawn before."""
    draws = torch.rand(count, generator=generator).tolist()
    chosen = [int(draws[0] * len(rows))]
    distance = 2 - 2 * (rows @ rows[chosen[0]])  # squared, (N,)
    for draw in draws[1:]:
        mass = distance.clamp(min=0).cumsum(0)
        chosen.append(min(int((mass <= draw * mass[-1]).sum()), len(rows) - 1))
        distance = torch.minimum(distance, 2 - 2 * (rows @ rows[chosen[-1]]))
    return rows[chosen]


def _refined(rows: Tensor, centres: Tensor) -> Tensor:
    """Lloyd's rounds; a centre without members stays where it is."""
    for _ in range(ROUNDS):
        members = F.one_hot((rows @ centres.T).argmax(-1), len(centres)).to(rows.dtype)  # (N, count)
        sums = members.T @ rows
        moved = torch.where(sums.norm(dim=-1, keepdim=True) > 0, F.normalize(sums, dim=-1), centres)
        if torch.equal(moved, centres):
            break
        centres = moved
    return centres
