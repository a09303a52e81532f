"""The `remix` command. One file a verb: it parses, calls a room and prints what that returned.

Rooms are imported inside the verbs, so that `remix --help` needs neither torch nor half a second.

train.py, sweep.py, find_rate.py, budget.py, validate.py, schema.py   start from a recipe
verify_estimator.py                                     needs none
eval.py, compare.py, route_stats.py                     look at finished runs
export.py, generate.py, chat.py                         use the trained model
common.py, answers.py                                   what they share: the app, arguments, bars; what is typed
"""

import errno
import re
import sys
from typing import NoReturn

from remix_cli.cli import (
    budget,
    chat,
    compare,
    export,
    find_rate,
    generate,
    route_stats,
    schema,
    sweep,
    train,
    validate,
)
from remix_cli.cli import eval as evaluate
from remix_cli.cli import verify_estimator as verify
from remix_cli.cli.common import app
from remix_cli.compat.hub_kernels import fetch_no_code
from remix_cli.errors import RemixError, is_out_of_memory
from remix_cli.launch import launch_rank, leave
from remix_cli.streams import guarded

SAME_EVERYWHERE = (2, 129, 130, 143)  # exit codes whose reason every rank of a launch would print alike

__all__ = ["app", "main"]

# in the order in which --help lists them; a short help where the first sentence of the verb's own is cut at 80 columns
app.command("train")(train.train)
app.command("validate", short_help="Check a recipe, and say what a run of it would do.")(validate.validate)
app.command("sweep", short_help="Compare methods on your data, and decide.")(sweep.sweep)
app.command("find-rate", short_help="Suggest a learning rate, from one short training.")(find_rate.find_rate)
app.command("budget", short_help="The size of every method for equal parameter counts.")(budget.budget)
app.command("verify-estimator", short_help="Prove that the router's gradient is unbiased.")(verify.verify_estimator)
app.command("schema")(schema.schema)
app.command("eval", short_help="Score a run, or a model folder, on tasks.")(evaluate.evaluate)
app.command("compare", short_help="Compare evaluated runs on the same items.")(compare.compare)
app.command("route-stats", short_help="Show how the routers choose.")(route_stats.route_stats)
app.command("export")(export.export)
app.command("generate", short_help="Try prompts.")(generate.generate)
app.command("chat", short_help="Talk to a run: it remembers the conversation.")(chat.chat)


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
            who = f"rank {rank}: " if rank else ""
            for line in error.problems:
                print(f"error: {who}{_one_line(line)}", file=sys.stderr)
        if error.exit_code in SAME_EVERYWHERE:
            leave()
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
            leave()
        raise
    raise AssertionError("the parser always ends the process")


def _one_line(text: str) -> str:
    """Without line breaks, and without the user name and password of any address."""
    return re.sub(r"(:/+)[^/@\s]+@", r"\1***@", " ".join(text.split()))
