"""`python -m remix_cli`, `accelerate launch -m remix_cli` and the script `remix` all begin here.

Standard library only before a Ctrl-C is heeded: the imports take a while.
"""

import os
import signal
from typing import Any


def main() -> None:
    """Ctrl-C while modules are imported ends at once: nothing has been begun, and no import is left half done."""
    asks = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # else someone wants it to be ignored
    if asks:
        signal.signal(signal.SIGINT, _end)
    from remix_cli.cli import main as run

    if asks:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    run()


def _end(*_: Any) -> None:
    os._exit(128 + signal.SIGINT)


if __name__ == "__main__":
    main()
