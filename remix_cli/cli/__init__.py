"""The `remix` command. Each verb parses, calls one function and prints what it returned.

Workers are imported inside the commands, so that `remix --help` needs neither torch nor half a second.

training.py  train, sweep, budget, validate, schema, verify-estimator
results.py   eval, compare, route-stats
taking.py    export, generate
common.py    what they share: the app, their arguments, progress bars
"""

import errno
import re
import sys
from typing import NoReturn

from remix_cli.cli import training  # isort: skip  (the order in which --help lists the commands)
from remix_cli.cli import results, taking  # isort: skip
from remix_cli.cli.common import app, launch_rank
from remix_cli.compat.hub_kernels import fetch_no_code
from remix_cli.errors import RemixError, is_out_of_memory
from remix_cli.streams import guarded

SAME_EVERYWHERE = (2, 129, 130, 143)  # exit codes whose reason every rank of a launch would print alike

__all__ = ["app", "main", "results", "taking", "training"]


def main() -> None:
    """Entry point: every expected failure is one `error:` line and its documented exit code."""
    debug = "--debug" in sys.argv
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    fetch_no_code()
    with guarded():
        _run(arguments, debug)


def _run(arguments: list[str], debug: bool) -> NoReturn:
    try:
        _verb(arguments)
    except RemixError as error:
        if debug:
            raise
        rank = launch_rank()
        if rank == 0 or error.exit_code not in SAME_EVERYWHERE:
            for line in error.problems:
                print(f"error: {f'rank {rank}: ' if rank else ''}{_one_line(line)}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if debug:
            raise
        if is_out_of_memory(error):
            fix = "lower train.per_device_train_batch_size, data.max_length or eval.batch_size"
            print(f"error: out of memory; {fix}, or set train.gradient_checkpointing", file=sys.stderr)
            sys.exit(2)
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            print(f"error: {_one_line(str(error.filename))[:60]}...: the name is too long", file=sys.stderr)
            sys.exit(2)
        what = _one_line(f"{type(error).__name__}: {error}")
        print(f"error: unexpected {what} (a bug: run again with --debug and report it)", file=sys.stderr)
        sys.exit(1)


def _verb(arguments: list[str]) -> NoReturn:
    """Ends with SystemExit, as the parser does, after everything that was printed has been taken."""
    try:
        app(args=arguments, prog_name="remix")
    except SystemExit as ended:
        if not ended.code:
            sys.stdout.flush()
        raise
    raise AssertionError("the parser always ends the process")


def _one_line(text: str) -> str:
    """Without line breaks, and without the user name and password of any address."""
    return re.sub(r"(:/+)[^/@\s]+@", r"\1***@", " ".join(text.split()))
