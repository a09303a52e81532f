"""sweep.json and the report of a sweep: what is written is read back, and what earlier versions wrote still is."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.common import ROOT, written_again

from remix_cli.errors import DivergedError, RecipeError
from remix_cli.evaluation.evaluated import Evaluated, TrainingCosts
from remix_cli.evaluation.report import Report, TaskResult
from remix_cli.evaluation.statistics import Score
from remix_cli.sweep import work
from remix_cli.sweep.differences import ArmsRuns
from remix_cli.sweep.record import SweepRecord
from remix_cli.sweep.report import SweepReport
from remix_cli.tasks.registry import TASKS
from remix_cli.terminal import Console

STORED = Path(__file__).parent / "stored"  # as version 0.1.0 wrote them on 27 November 2026
KINDS = {
    "sweep.json": SweepRecord,
    "sweep-report.json": SweepReport,
    "sweep-report-one-seed.json": SweepReport,
}


@pytest.mark.parametrize("name", KINDS)
def test_stored_results_are_read_and_written_again_to_the_byte(name):
    assert written_again(KINDS[name], STORED / name) == (STORED / name).read_text()


def test_a_score_of_a_single_run_has_no_interval_and_json_no_infinity():
    report = SweepReport.from_dict(json.loads((STORED / "sweep-report-one-seed.json").read_text()))
    scores = [score for arm in report.arms for score in arm.scores.values()]
    assert scores
    assert all((score.low, score.high) == (-math.inf, math.inf) for score in scores)
    json.dumps(report.to_dict(), allow_nan=False)


def run_with(words, seed):
    """An evaluation of examples/own_task.py, whose measure `words` is better low."""
    stored = (STORED.parents[1] / "evaluation" / "stored" / "report.json").read_text()
    protocol = Report.from_dict(json.loads(stored)).results[0].protocol
    asked = replace(protocol.asked, task="terse", samples=None)
    result = TaskResult(
        "terse", 2, {"words": Score(words, 0, 9, 2, share=False)}, 1.0, 2, replace(protocol, asked=asked)
    )
    lines = [{"prompt": str(item), "words": words + item / 100, "answers": 1} for item in range(2)]
    folder = Path(f"arm/seed{seed}/eval")
    return Evaluated("run", Report("adapter", [result]), folder, TrainingCosts(), lines_read={"terse": lines})


def test_better_is_what_the_task_declares_to_be(monkeypatch):
    """For tasks of one's own, too: it went by the names `loss` and `perplexity`."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    monkeypatch.setitem(TASKS, "terse", "own_task:Terse")
    few, many = ([run_with(words + seed / 100, seed) for seed in (0, 1)] for words in (2.0, 5.0))
    found = ArmsRuns({"many": many, "few": few}).differences("few", "many")
    assert found["terse words"].in_words().startswith("better by 3.0000 ")


FAILURES = [
    (DivergedError("step 3: loss nan"), work.Failure("diverged: step 3: loss nan", 3, work.Cause.DIVERGED)),
    (DivergedError("diverged at step 3"), work.Failure("diverged at step 3", 3, work.Cause.DIVERGED)),
    (MemoryError("9 GiB"), work.Failure("out of memory: MemoryError: 9 GiB", 2, work.Cause.NO_MEMORY)),
    (RecipeError("diverged: a word\nin it"), work.Failure("diverged: a word in it", 2, work.Cause.OTHER)),
    (KeyError("x"), work.Failure("KeyError: 'x'", 1, work.Cause.OTHER)),
]


@pytest.mark.parametrize(("error", "failure"), FAILURES, ids=[repr(error) for error, _ in FAILURES])
def test_what_a_worker_reports_says_its_cause(error, failure, tmp_path):
    with (tmp_path / "log").open("w") as log:
        try:
            raise error
        except Exception as raised:
            told = work._told(raised, Console(file=log))
    assert told == failure
