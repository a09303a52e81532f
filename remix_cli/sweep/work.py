"""What a worker process of a sweep does. Imports nothing heavy before the worker knows its GPU."""

import gc
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from multiprocessing import connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from remix_cli.compat.accelerate import forget_state
from remix_cli.compat.hub_kernels import fetch_no_code
from remix_cli.errors import ArtefactError, DivergedError, Interrupted, RemixError, is_out_of_memory
from remix_cli.recipe import Recipe
from remix_cli.runs import RunFolder
from remix_cli.streams import outlive_both
from remix_cli.terminal import Console

if TYPE_CHECKING:
    from remix_cli.evaluation.report import TaskResult

WIDTH = 100  # of a log
PATIENCE = 10.0  # seconds a worker whose parent is gone has to save
_ended: Any = None  # in a worker: an event, set when the sweep is to end


class Cause(Enum):
    """What a sweep does about a failure depends on this."""

    NO_MEMORY = "out of memory"  # perhaps there is enough when the run is alone
    DIVERGED = "diverged"  # the setting is a bad one
    OTHER = "other"  # nothing is known of the setting


@dataclass(frozen=True)
class Failure:
    """What went wrong with a run, in one line, and the exit code with which the run alone would have ended."""

    line: str
    exit_code: int
    cause: Cause = Cause.OTHER


@dataclass(frozen=True)
class Ended:
    """How a job ended, and after how long."""

    failure: Failure | None
    seconds: float


def timed(work: Callable[[Recipe], Failure | None], recipe: Recipe) -> Ended:
    begun = time.monotonic()
    failure = work(recipe)
    return Ended(failure, time.monotonic() - begun)


def set_up(devices: Any, threads: int, ended: Any) -> None:
    """Give this process a GPU of its own, if there are several, and its share of the cores.

    Ctrl-C and a closed terminal reach the parent, which then asks every run to save and end.
    """
    global _ended
    _ended = ended
    threading.Thread(target=_end_with_parent, daemon=True).start()
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    outlive_both()
    fetch_no_code()
    device = devices.get()
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device  # before torch looks
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch

    torch.set_num_threads(threads)


def train_run(recipe: Recipe) -> Failure | None:
    """Train, or go on, or do nothing if the run is complete. What went wrong; None if nothing.

    Output goes to a log beside the run's folder. Raises Interrupted.
    """
    from remix_cli.train.trainer import train

    _check_ended()
    folder = RunFolder(Path(recipe.output_dir))
    folder.path.parent.mkdir(parents=True, exist_ok=True)
    with folder.path.with_name(f"{folder.path.name}.log").open("a", encoding="utf-8", errors="backslashreplace") as log:
        console = Console(file=log, width=WIDTH)
        try:
            train(recipe, console, resume=folder.recipe.is_file())
        except Interrupted:
            raise
        except Exception as error:
            return _told(error, console)
        finally:
            _let_go()
    return None


def score_run(recipe: Recipe, allow_code: bool) -> Failure | None:
    """Score the finished run on the recipe's tasks, unless that is done. As `train_run`."""
    from remix_cli.evaluation.evaluator import evaluate
    from remix_cli.runs import load_run
    from remix_cli.tasks.base import Settings

    _check_ended()
    folder = RunFolder(Path(recipe.output_dir))
    if is_scored(recipe):
        return None
    with folder.path.with_name(f"{folder.path.name}.log").open("a", encoding="utf-8", errors="backslashreplace") as log:
        try:
            found = evaluate(
                load_run(folder.path),
                recipe.eval.tasks,
                Settings(sampled=recipe.eval.selection == "sample", allow_code=allow_code),
                lambda *_: _Silent(),
            )
            log.writelines(f"{line}\n" for line in found.notes)
        except Exception as error:
            return _told(error, Console(file=log, width=WIDTH))
        finally:
            _let_go()
    return None


def report_file(recipe: Recipe) -> Path:
    """Where the scores of the run's last adapter are, in the selection mode that the recipe asks for."""
    name = "adapter-sampled" if recipe.eval.selection == "sample" else "adapter"
    return RunFolder(Path(recipe.output_dir)).evaluations / f"{name}.json"


def is_scored(recipe: Recipe) -> bool:
    """Does the report answer every task of the recipe, as it now stands?"""
    from remix_cli.evaluation.evaluator import task_digest
    from remix_cli.recipe.schema import labelled

    results = scored_tasks(report_file(recipe))
    for label, task in labelled(recipe.eval.tasks):
        if label not in results or results[label].task_digest != task_digest(task):
            return False
    return True


def scored_tasks(file: Path) -> "dict[str, TaskResult]":
    """Results by task of a report; none if there is none of the adapter that is there now."""
    from remix_cli.evaluation.report import read_report

    try:
        report = read_report(file)
    except ArtefactError:
        return {}
    return {result.task: result for result in report.results}


def _end_with_parent() -> None:
    """A parent that was killed asks for nothing any more: save, if a run is in hand, and end.

    The first SIGTERM lets training save and stop; where nothing heeds it, before and after training, it ends the
    process. Whoever still lives when the patience is over is stuck in a step.
    """
    parent = multiprocessing.parent_process()
    if parent is None:  # a test, which works in its own process
        return
    connection.wait([parent.sentinel])
    for _ in range(round(PATIENCE / 0.2)):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.2)
    os._exit(128 + signal.SIGTERM)


def _check_ended() -> None:
    """A job that was dealt to this worker before the sweep was interrupted is not begun. Raises Interrupted."""
    if _ended is not None and _ended.is_set():
        raise Interrupted(signal.SIGTERM, "not begun")


def _told(error: Exception, console: Console) -> Failure:
    """The failure, which the log says in full. Its line begins with the cause where that is a known one."""
    line = f"{type(error).__name__}: {error}"
    exit_code = 1
    if is_out_of_memory(error):
        exit_code = 2
    if isinstance(error, RemixError):
        line = "; ".join(error.problems)
        exit_code = error.exit_code
    else:
        console.print_exception()
    cause = _cause_of(error)
    if cause is not Cause.OTHER and not line.startswith(cause.value):
        line = f"{cause.value}: {line}"
    console.print(f"error: {line}", highlight=False, soft_wrap=True)
    return Failure(" ".join(line.split())[:300], exit_code, cause)


def _cause_of(error: Exception) -> Cause:
    if isinstance(error, DivergedError):
        return Cause.DIVERGED
    if is_out_of_memory(error):
        return Cause.NO_MEMORY
    return Cause.OTHER


def _let_go() -> None:
    """The next run in this process starts afresh, and other processes need the memory."""
    import torch

    forget_state()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.empty_cache()


class _Silent:
    def advance(self, *_: float) -> None:
        pass
