"""accelerate keeps the state of a process in class attributes, and a launch file's in environment variables."""

import os
from dataclasses import dataclass


def forget_state() -> None:
    """The next Accelerator of this process starts afresh.

    accelerate/state.py keeps device, precision and launch for the life of the process, and offers no public way to
    forget them: a second Accelerator with another `mixed_precision` raises ValueError
    (https://github.com/huggingface/accelerate/issues/2463). A worker of a sweep trains one run after another. Seen
    with accelerate 1.15.
    """
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


@dataclass(frozen=True)
class FsdpLaunch:
    """What a launch file with `distributed_type: FSDP` asks for, as far as it bears on a frozen base."""

    version: int
    offload: bool


def take_fsdp_launch() -> FsdpLaunch | None:
    """What was asked for, once: from now on accelerate takes the launch for one of plain processes. None: nothing.

    Its own `prepare` with FSDP2 puts trained parameters into the optimizer as DTensors, and its loading from one
    process stops at parameters that are ignored because they must stay whole (utils/fsdp_utils.py,
    `fsdp2_load_full_state_dict`, reads `device_mesh` of every one). Seen with accelerate 1.15.
    """
    if not _is_true(os.environ.pop("ACCELERATE_USE_FSDP", "false")):
        return None
    version = int(os.environ.get("FSDP_VERSION", "1"))
    return FsdpLaunch(version, _is_true(os.environ.get("FSDP_OFFLOAD_PARAMS", "false")))


def asks_for_deepspeed() -> bool:
    return _is_true(os.environ.get("ACCELERATE_USE_DEEPSPEED", "false"))


def _is_true(value: str) -> bool:
    return value.lower() in ("true", "1")
