"""The learning-rate range test: what it reads off a curve, what it trains, and that it keeps nothing."""

import json

import numpy as np
import pytest
from helpers.tiny import recipe_text, write_recipe
from rich.console import Console

from remix_cli.errors import RecipeError
from remix_cli.recipe import load_recipe
from remix_cli.train import rate_range
from remix_cli.train.rate_range import find_rate, read_off, smooth

RATES = np.geomspace(1e-5, 1, 101).tolist()


def curve(fall_at, rise_at):
    """A loss that falls by 1 around one rate and runs away around another, both by logistic functions."""
    logs = np.log10(RATES)
    fall = 1 / (1 + np.exp(-8 * (logs - np.log10(fall_at))))
    rise = 5 / (1 + np.exp(-8 * (logs - np.log10(rise_at))))
    return rise - fall


def test_the_steepest_descent_of_the_smoothed_loss_is_suggested():
    noisy = curve(3e-3, 0.3) + 0.02 * np.random.default_rng(0).standard_normal(101)
    found = read_off(noisy.tolist(), RATES, 101, router_rate=0.3)
    assert 2e-3 < found.steepest < 4.5e-3
    assert 5e-3 < found.lowest < 0.2
    assert found.suggested == float(f"{(found.steepest * found.lowest) ** 0.5:.2g}")
    assert found.steepest < found.suggested < found.lowest


def test_a_loss_that_never_falls_suggests_nothing():
    found = read_off(np.linspace(0, 3, 101).tolist(), RATES, 101, router_rate=None)
    assert (found.suggested, found.steepest, found.lowest) == (None, None, None)


def test_smoothing_takes_as_many_neighbours_on_either_side():
    line = np.arange(10.0)
    assert smooth(line) == pytest.approx(line)
    assert smooth(np.eye(9)[4])[4] == pytest.approx(1 / 7)


@pytest.fixture
def recipe(stage, tmp_path):
    """A recipe with these groups in place of the usual ones."""

    def load(**groups):
        model, rows, _ = stage
        text = recipe_text(model, rows, tmp_path / "run") | groups
        return load_recipe(write_recipe(tmp_path / "recipe.yaml", text))

    return load


METHODS = [
    ({"adapter": {"method": "rslora", "rank": 4}, "router": {}}, None),
    ({"router": {"selections": 2, "learning_rate": 0.2}}, 0.2),
    ({"router": {"fixed": True, "level": "sequence", "clusters": 4}}, None),
]


@pytest.mark.parametrize(("groups", "router_rate"), METHODS, ids=["lora", "learnt", "clusters"])
def test_rates_grow_by_a_factor_and_the_routers_stays(groups, router_rate, recipe, tmp_path, monkeypatch):
    used = []
    real = rate_range._Rising._update

    def noting(self, step, sums):
        real(self, step, sums)
        used.append([group["lr"] for group in self.setup.optimizer.param_groups])

    monkeypatch.setattr(rate_range._Rising, "_update", noting)
    loaded = recipe(**groups)
    found = find_rate(loaded, 24, Console(quiet=True))
    of_loras, of_routers = zip(*used, strict=True)
    assert list(of_loras) == pytest.approx(np.geomspace(1e-5, 1, 24)[: len(used)])
    assert set(of_routers) == {loaded.router.learning_rate}
    assert found.router_rate == router_rate
    assert found.rates == pytest.approx(list(of_loras)[: len(found.points)])
    assert min(found.smoothed) < -0.02  # it learns
    # rows of unlike difficulty do not show: at rates that do nothing, nothing changes
    assert max(abs(change) for change in found.changes[:5]) < 2e-3
    assert not (tmp_path / "run").exists()


def test_weights_of_rows_do_not_show_as_changes(stage, recipe, tmp_path):
    """The loss before training is weighted as the training loss is."""
    model, rows, _ = stage
    weighted = tmp_path / "weighted.jsonl"
    with weighted.open("w") as file:
        for number, line in enumerate(rows.read_text().splitlines()):
            file.write(json.dumps(json.loads(line) | {"weight": 0.1 if number % 3 else 5}) + "\n")
    data = recipe_text(model, weighted, tmp_path / "run")["data"]
    found = find_rate(recipe(data=data), 20, Console(quiet=True))
    assert max(abs(change) for change in found.changes[:4]) < 2e-3


def test_a_loss_that_runs_away_ends_the_test(recipe, monkeypatch):
    monkeypatch.setattr(rate_range, "RUN_AWAY", -1.0)  # as if having learnt nothing were bad enough
    found = find_rate(recipe(), 40, Console(quiet=True))
    assert len(found.points) == 3
    assert found.suggested is None or found.suggested <= found.rates[-1]


def test_the_base_model_has_no_rate_to_find(recipe):
    with pytest.raises(RecipeError, match=r"adapter.method: none trains nothing, at whatever rate"):
        find_rate(recipe(adapter={"method": "none"}, router={}), 20, Console(quiet=True))


@pytest.mark.slow
def test_the_verb_prints_curve_suggestion_and_what_next(stage, tmp_path, verb):
    model, rows, _ = stage
    path = write_recipe(tmp_path / "recipe.yaml", recipe_text(model, rows, tmp_path / "run"))
    out, _ = verb("find-rate", path, "--steps", 30, "--plot", tmp_path / "figures")
    assert "the router's rate was 0.3 throughout" in out
    suggested = out.split("suggestion: train.learning_rate=")[1].split(",")[0]
    assert f"remix sweep {path} train.learning_rate={suggested}  #" in out
    assert out.count("\n") < 40
    assert {file.name for file in (tmp_path / "figures").iterdir()} == {"rates.png", "rates.svg"}
    found = json.loads(verb("find-rate", path, "--steps", 30, "--json")[0])
    assert (found["suggested"], found["steps"]) == (float(suggested), 30)
