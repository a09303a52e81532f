"""accelerate keeps the state of a process in class attributes."""


def forget_state() -> None:
    """The next Accelerator of this process starts afresh.

    accelerate/state.py keeps device, precision and launch for the life of the process, and offers no public way to
    forget them: a second Accelerator with another `mixed_precision` raises ValueError
    (https://github.com/huggingface/accelerate/issues/2463). A worker of a sweep trains one run after another. Seen
    with accelerate 1.15.
    """
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
