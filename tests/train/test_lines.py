"""Lines are broken between words only, and what follows stands below what it belongs to."""

import io
import json

import pytest
from helpers.runs import TRAIN, recipe_for, run
from rich.console import Console

from remix_cli.train import console
from remix_cli.train.lines import fitted

PATH = "/somewhere/very/deep/that/is/longer/than/a/line/learning_rate=0.000333-seed0"
BROKEN = [
    ("short", "short"),
    (
        "warning   held-out rows: 10 only, so much",
        "warning   held-out\n          rows: 10\n          only, so\n          much",
    ),
    ("held out  10 rows, 25 tokens of these", "held out  10 rows,\n          25 tokens\n          of these"),
    ("  pool: worse by 0.066 (0.049 to 0.082)", "  pool: worse by\n    0.066 (0.049 to\n    0.082)"),
    ("one\n\ntwo words of some length", "one\n\ntwo words of some\n  length"),
    (f"adapter in {PATH}", f"adapter in\n  {PATH}"),
    ("a 12-fold 3e-4, -0.012 to -0.034", "a 12-fold 3e-4,\n  -0.012 to -0.034"),
]


@pytest.mark.parametrize(("text", "lines"), BROKEN)
def test_lines_are_broken_between_words(text, lines):
    assert fitted(text, 20) == lines


def test_the_first_step_is_logged_whatever_logging_steps_says(stage, tmp_path):
    """A forecast that waits for the tenth step comes after minutes on a CPU."""
    run(recipe_for(stage, tmp_path / "run", train=TRAIN | {"max_steps": 5, "logging_steps": 3, "eval_steps": 5}))
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "step_seconds" in record] == [1, 3, 5]


def test_what_takes_long_says_how_far_it_is(monkeypatch):
    """Clusters are found before the first step, in minutes on a CPU."""
    clock = iter([0.0, 5.0, 16.0, 20.0, 40.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    out = Console(file=io.StringIO(), width=80)
    view = console.TrainingConsole.__new__(console.TrainingConsole)
    view.console, view.main = out, True
    advance = view.counting("prompts read", 512)
    for count in (128, 128, 128, 128):
        advance(count)
    assert out.file.getvalue() == "          256 of 512 prompts read, 0:16 left\n"
