"""What a sweep says in words: how far arms are apart, which to take, and where the best lies at an edge."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from remix_cli.evaluation.evaluated import Evaluated, TrainingCosts
from remix_cli.evaluation.report import Report, TaskResult
from remix_cli.evaluation.statistics import Score, SeedDifference, Variance
from remix_cli.sweep.decision import decide
from remix_cli.sweep.differences import ArmDifference, ArmsRuns
from remix_cli.sweep.record import SearchedPoint
from remix_cli.sweep.report import ArmReport, SweepReport, beyond, edges
from remix_cli.sweep.sweep_tables import sweep_notes


def difference(value, low, high, share=False, seeds=3, items=0.0, runs=0.0):
    score = Score(value, low, high, 50, share)
    return ArmDifference(SeedDifference(score, Variance(items, runs, seeds - 1), seeds), lower_is_better=not share)


WORDS = [
    (difference(-0.012, -0.018, -0.006), "better by 0.0120 (0.0060 to 0.0180)"),
    (difference(0.012, 0.006, 0.018), "worse by 0.0120 (0.0060 to 0.0180)"),
    (difference(0.02, 0.01, 0.03, share=True), "better by 2.00 points (1.00 to 3.00)"),
    (difference(-0.012, -0.018, -0.006, seeds=1), "better by 0.0120 (0.0060 to 0.0180, under one seed)"),
    (
        difference(-0.003, -0.01, 0.004, runs=2.6e-6),
        "no clear difference; about 6 seeds would settle 0.0030 (-0.0100 to +0.0040)",
    ),
    (
        difference(-0.003, -0.01, 0.004, items=1.2e-5),
        "no clear difference; about 300 scored rows would settle 0.0030, more seeds would not (-0.0100 to +0.0040)",
    ),
    (difference(0.0, -0.01, 0.01, items=1e-5, runs=1e-5), "no clear difference (-0.0100 to +0.0100)"),
    (
        difference(-0.003, -0.01, 0.004, seeds=1),
        "no clear difference under one seed; more seeds would say what training varies by (-0.0100 to +0.0040)",
    ),
]


@pytest.mark.parametrize(("found", "said"), WORDS)
def test_a_difference_is_a_sentence(found, said):
    assert found.in_words() == said


def test_a_best_value_at_the_end_of_its_grid_is_marked_with_one_beyond_it():
    rates = {1e-3: 2.0, 3e-3: 1.0, 1e-2: 3.0}
    searched = [SearchedPoint({"train.learning_rate": rate, "x": "a"}, "r", value) for rate, value in rates.items()]
    assert edges(searched, {"train.learning_rate": 3e-3, "x": "a"}) == []
    assert edges(searched, {"train.learning_rate": 1e-2}) == ["learning_rate=0.01"]
    assert beyond(searched, {"train.learning_rate": 1e-2}) == {"train.learning_rate": 0.0333}
    assert beyond(searched, {"train.learning_rate": 1e-3}) == {"train.learning_rate": 0.000333}
    failed = [*searched[:2], SearchedPoint({"train.learning_rate": 1e-2}, "r", None)]
    assert edges(failed, {"train.learning_rate": 3e-3}) == ["learning_rate=0.003"]
    assert beyond(failed, {"train.learning_rate": 3e-3}) == {"train.learning_rate": 0.00548}
    assert edges(searched[:1], {"train.learning_rate": 1e-3}) == []
    ranks = [SearchedPoint({"rank": rank}, "r", 1.0 / rank) for rank in (4, 8, 16)]
    assert beyond(ranks, {"rank": 16}) == {"rank": 32}
    dropouts = [SearchedPoint({"dropout": d}, "r", 1.0 + d) for d in (0.0, 0.1)]
    assert beyond(dropouts, {"dropout": 0.1}) == {"dropout": 0.2}


def run_of(seed, losses, protocol, rows="test.csv"):
    lines = [{"prompt": str(i), "task": "t", "nats": float(loss), "tokens": 1} for i, loss in enumerate(losses)]
    scores = {"loss": Score(float(np.mean(losses)), 0, 9, len(losses), share=False)}
    result = TaskResult("nll", len(losses), scores, 1.0, len(losses), protocol, rows=rows)
    folder = Path(f"arm/seed{seed}/eval")
    return Evaluated("run", Report("adapter", [result]), folder, TrainingCosts(), lines_read={"nll": lines})


@pytest.fixture
def arms():
    """One LoRA, a pool that is level with it, and one that is clearly worse; three seeds each."""
    return three_arms(60)


def three_arms(rows):
    stored = Path(__file__).parents[1] / "evaluation" / "stored" / "report.json"
    protocol = Report.from_dict(json.loads(stored.read_text())).results[0].protocol
    protocol = replace(protocol, asked=replace(protocol.asked, task="nll", samples=None))
    random = np.random.default_rng(0)
    items = random.random(rows)
    of = {"LoRA": 1.0, "pool": 0.999, "soft": 1.5}
    runs = {}
    for name, loss in of.items():
        runs[name] = [run_of(seed, items + loss + 0.01 * random.standard_normal(rows), protocol) for seed in range(3)]
    return ArmsRuns(runs)


def test_the_first_of_those_that_nothing_separates_from_the_best_is_taken(arms):
    scores = {name: arms.scores(name) for name in arms.runs_of}
    found = decide("eval_loss", scores, arms)
    assert (found.score, found.best, found.take, found.level) == ("nll loss", "pool", "LoRA", ["LoRA", "pool"])
    assert found.against["soft"].startswith("worse by 0.5")
    assert found.against["LoRA"].startswith("no clear difference")
    alone = ArmsRuns({"soft": arms.runs_of["soft"]})
    assert decide("eval_loss", {"soft": scores["soft"]}, alone).take == "soft"
    swapped = ArmsRuns({"soft": arms.runs_of["soft"], "pool": arms.runs_of["pool"]})
    found = decide("eval_loss", {name: scores[name] for name in ("soft", "pool")}, swapped)
    assert (found.take, found.level) == ("pool", ["pool"])


def test_under_one_seed_nothing_is_clearly_ahead(arms):
    costs = (1, 1, 1.0, 5000.0, 1.0)
    alone = ArmsRuns({name: arms.runs_of[name][:1] for name in ("soft", "pool")})
    scores = {name: alone.scores(name) for name in alone.runs_of}
    reports = [ArmReport(name, "", 1, *costs, 1.0, [], 20, scores[name], {}, {}) for name in alone.runs_of]
    report = SweepReport("eval_loss", [0], "soft", reports, [], decide("eval_loss", scores, alone), {})
    said = sweep_notes(report)
    assert said[2] == "take pool for now: it is ahead under one seed; more would say what training varies by"


def test_what_is_not_trained_is_the_same_under_every_seed(arms):
    """Beside arms of three seeds it was said to be worse under one seed, and the best to be ahead under one."""
    (base,) = three_arms(60).runs_of["soft"][:1]
    base.costs = TrainingCosts(trained_parameters=0)
    runs = ArmsRuns({"pool": arms.runs_of["pool"], "base": [base]})
    for one, other in (("base", "pool"), ("pool", "base")):
        found = runs.differences(one, other)["nll loss"].found
        assert found.seeds == 3
        values = [np.mean([line["nats"] for line in run.lines_read["nll"]]) for run in runs.runs_of["pool"]]
        assert found.variance.runs == pytest.approx(np.var(values, ddof=1) / 3)
    scores = {name: runs.scores(name) for name in runs.runs_of}
    costs = (1, 1.0, 5000.0, 1.0)
    reports = [
        ArmReport(name, "", len(some), int(name != "base"), *costs, 1.0, [], 60, scores[name], {}, {})
        for name, some in runs.runs_of.items()
    ]
    said = sweep_notes(SweepReport("eval_loss", [0, 1, 2], "pool", reports, [], decide("eval_loss", scores, runs), {}))
    assert said[2] == "take pool: it is clearly ahead of all others"
    assert "3 seeds" in said[3]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (29, "take pool for now: it is ahead, on 29 rows; give more, 30 at least"),
        (30, "take pool: it is clearly ahead of all others"),
    ],
)
def test_what_is_ahead_on_few_rows_is_not_called_clear(rows, said):
    """It counted the seeds, of which nobody has thirty: nothing was ever clearly ahead."""
    pair = ArmsRuns({name: three_arms(rows).runs_of[name] for name in ("soft", "pool")})
    scores = {name: pair.scores(name) for name in pair.runs_of}
    costs = (1, 1, 1.0, 5000.0, 1.0)
    reports = []
    for name in pair.runs_of:
        apart = {} if name == "soft" else pair.differences(name, "soft")
        differences = {key: one.found.score for key, one in apart.items()}
        reports.append(ArmReport(name, "", 3, *costs, 1.0, [], rows, scores[name], differences, {}))
    report = SweepReport("eval_loss", [0, 1, 2], "soft", reports, [], decide("eval_loss", scores, pair), {})
    assert sweep_notes(report)[2] == said


def test_the_verdict_says_what_it_rests_on(arms):
    scores = {name: arms.scores(name) for name in arms.runs_of}
    reports = []
    for name in arms.runs_of:
        apart = {} if name == "LoRA" else arms.differences(name, "LoRA")
        differences = {key: one.found.score for key, one in apart.items()}
        words = {key: one.in_words() for key, one in apart.items()}
        costs = (1, 1, 1.0, 5000.0, 1.0)
        edge = ([], 20) if name == "LoRA" else (["learning_rate=0.01"], 20)
        beyond_it = {} if name == "LoRA" else {"train.learning_rate": 0.03}
        reports.append(ArmReport(name, "", 3, *costs, 1.0, *edge, scores[name], differences, words, beyond_it))
    decision = decide("eval_loss", scores, arms)
    report = SweepReport("eval_loss", [0, 1, 2], "LoRA", reports, [], decision, {"nll": "held out"})
    assert SweepReport.from_dict(report.to_dict()) == report
    said = sweep_notes(report)
    assert said[0].startswith("pool is best by held-out loss, nats per token: ")
    assert said[3] == "take LoRA: nothing separates it from the best, and it is the first of those listed"
    assert said[4].startswith(
        "this rests on 60 scored rows, 3 seeds, 5,000 tokens of training each; the same rows chose"
    )
    assert said[5].startswith("settings chosen by 20 held-out rows: 20 only")
    assert said[6] == (
        "pool, soft: the best learning_rate=0.01 lies at an edge of what was tried; try 0.03 in train.learning_rate"
    )
