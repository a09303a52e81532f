"""What was written is loaded again and must give the run's logits."""

import torch
from torch import Tensor

from remix_cli.errors import ArtefactError
from remix_cli.runs import LoadedRun


def probe(run: LoadedRun) -> Tensor:
    """Token ids of a short text, (1, T), on the run's device."""
    return torch.tensor([run.tokenizer("The quick brown fox counts: 1, 2, 3")["input_ids"]], device=run.device)


def logits_differ(ours: Tensor, theirs: Tensor) -> float:
    """By how much, relative to ours, in norm."""
    return float((ours.float() - theirs.float()).norm() / ours.float().norm())


def check_logits(difference: float, dtype: torch.dtype, what: str, rounding: float = 2e-2) -> float:
    """The difference, if it is no more than 1e-5 in float32, or `rounding` in 16 bits. Raises ArtefactError."""
    if not difference <= (1e-5 if dtype == torch.float32 else rounding):
        raise ArtefactError(f"{what} (logits differ by {difference:.2g})")
    return difference
