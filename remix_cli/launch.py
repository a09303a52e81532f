"""Which of the processes of a launch this is: `accelerate launch -m remix_cli ...`."""

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def launch_rank() -> int:
    """Counted over all machines. RANK alone is none: cluster schedulers and notebooks leave it about."""
    rank = os.environ.get("RANK", "")
    return int(rank) if "LOCAL_RANK" in os.environ and rank.isdecimal() else 0


def launch_size() -> int:
    """How many processes were launched together."""
    size = os.environ.get("WORLD_SIZE", "")
    return int(size) if "LOCAL_RANK" in os.environ and size.isdecimal() else 1


def own_device() -> "torch.device":
    """This process's GPU, or the CPU."""
    import torch

    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ["LOCAL_RANK"]) if launch_size() > 1 else 0)


def leave() -> None:
    """End the processes' connection, where there is one; all of them must come here. NCCL warns of any left open."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
