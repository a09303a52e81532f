"""Runs with `train.precondition: riemannian`: what a step does to the LoRAs, stopping, loading."""

import json
import signal

import pytest
import torch
from helpers.common import close
from helpers.methods import small_method
from helpers.runs import TRAIN, outcome, run
from helpers.tiny import recipe_text, write_recipe, write_rows, write_tiny_model
from safetensors.torch import load_file

from remix_cli.core.precondition import DAMPING, FLOOR
from remix_cli.errors import Interrupted
from remix_cli.evaluation.nll import mean_loss, row_losses
from remix_cli.recipe import load_recipe
from remix_cli.runs import load_run
from remix_cli.train import trainer

ON = {"precondition": "riemannian"}
ROUTERS = {"remix": {"estimator": "control_variate", "selections": 2}}
LIMIT = 0.005  # of the gradient's norm: so low that steps are clipped
ROUNDING = 1e-3  # of float32: the columns of a B that has taken one step are hardly different in a model so small
BETAS, EPSILON = (0.9, 0.999), 1e-8  # torch's, of AdamW


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stage")
    return write_tiny_model(folder / "model"), write_rows(folder / "rows.jsonl", 24)


def recipe_of(stage, folder, method, **train):
    recipe = recipe_text(*stage, folder, train=TRAIN | train)
    recipe["adapter"] = small_method(method) | {"dropout": 0.2}
    recipe["router"] = ROUTERS.get(method, {})
    return load_recipe(write_recipe(folder.with_suffix(".yaml"), recipe))


def recorded(monkeypatch):
    """The adapter's parameters and its gradients before they are preconditioned, step by step, in float64."""
    seen = []
    original = trainer.precondition_gradients

    def record(adapter, **how):
        named = adapter.lora_parameters().items()
        values = {name: p.detach().double().clone() for name, p in named}
        seen.append((values, {name: p.grad.double().clone() for name, p in named}))
        original(adapter, **how)

    monkeypatch.setattr(trainer, "precondition_gradients", record)
    return seen


def scaled(gradient, other, omega):
    """(r, D): a gradient of a factor, times the inverse of omega^2 times the damped Gram matrix of the `other`; without
    omega, divided by its mean eigenvalue instead."""
    gram = sum(torch.outer(column, column) for column in other.T)  # (r, r)
    damping = DAMPING * gram.trace() / len(gram) + FLOOR
    length = omega**2 if omega else len(gram) / gram.trace()
    return torch.inverse(gram + damping * torch.eye(len(gram), dtype=gram.dtype)) @ gradient / length


def preconditioned(values, gradients, rank, omega):
    """By name, LoRA by LoRA."""
    found = {}
    for name in values:
        if name.endswith("lora_B"):
            continue
        of_b = name.replace("lora_A", "lora_B")
        a, b = values[name].split(rank), values[of_b].T.split(rank)
        on_a, on_b = gradients[name].split(rank), gradients[of_b].T.split(rank)
        found[name] = torch.cat([scaled(g, other, omega) for g, other in zip(on_a, b, strict=True)])
        found[of_b] = torch.cat([scaled(g, other, omega) for g, other in zip(on_b, a, strict=True)]).T
    return found


def norm_of(gradients):
    return torch.stack([g.norm() for g in gradients.values()]).norm()


WAYS = [(method, "riemannian") for method in ("lora", "rslora", "remix", "mixlora")]


@pytest.mark.parametrize(("method", "way"), [*WAYS, ("rslora", "riemannian_unit"), ("remix", "riemannian_unit")])
def test_two_steps_are_adamw_on_the_preconditioned_clipped_gradient(method, way, stage, monkeypatch, tmp_path):
    """Written out: first preconditioned, then clipped, then AdamW; the log has the norm between the first two."""
    seen = recorded(monkeypatch)
    recipe = recipe_of(stage, tmp_path / "run", method, max_steps=2, max_grad_norm=LIMIT, precondition=way)
    run(recipe)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    logged = [record for record in records if "lora_grad_norm" in record]
    config = recipe.adapter_config()
    first, second = {}, {}
    assert len(seen) == len(logged) == 2
    parameters = dict(seen[0][0])
    for step, ((values, gradients), record) in enumerate(zip(seen, logged, strict=True), start=1):
        made = preconditioned(values, gradients, config.rank, config.scale if way == "riemannian" else None)
        norm = norm_of(made)
        assert norm > LIMIT
        assert close(torch.tensor(record["lora_grad_norm"]), norm, ROUNDING)
        for name, gradient in made.items():
            gradient = gradient * LIMIT / (norm + 1e-6)  # as torch clips
            first[name] = BETAS[0] * first.get(name, 0.0) + (1 - BETAS[0]) * gradient
            second[name] = BETAS[1] * second.get(name, 0.0) + (1 - BETAS[1]) * gradient**2
            mean, spread = first[name] / (1 - BETAS[0] ** step), (second[name] / (1 - BETAS[1] ** step)).sqrt()
            parameters[name] = parameters[name] - record["learning_rate"] * mean / (spread + EPSILON)
    last = load_file(tmp_path / "run" / "adapter" / "adapter.safetensors")
    for name, expected in parameters.items():
        assert close(last[name] - seen[0][0][name], expected - seen[0][0][name], 5 * ROUNDING), name


@pytest.mark.parametrize("method", ["lora", "remix", "mixlora"])
def test_a_stopped_run_ends_with_the_same_bits_and_is_evaluated_as_it_was(method, stage, monkeypatch, tmp_path):
    whole = tmp_path / "whole"
    run(recipe_of(stage, whole, method, **ON))
    recipe = recipe_of(stage, tmp_path / "stopped", method, **ON)
    original = trainer.Trainer._step

    def stops(self, index):
        if index in (0, 3):
            self.signals.received = signal.SIGTERM
        return original(self, index)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "_step", stops)
        for again in (False, True):
            with pytest.raises(Interrupted):
                run(recipe, resume=again)
    run(recipe, resume=True)
    found = outcome(whole)
    assert outcome(tmp_path / "stopped") == found

    loaded = load_run(tmp_path / "stopped")
    assert loaded.recipe.train.precondition == "riemannian"
    losses = row_losses(loaded.model, loaded.adapter, loaded.rows_to_look_at(None, None), 4)
    measured = [record["eval_loss"] for record in found["metrics"] if "eval_loss" in record]
    assert mean_loss(losses) == pytest.approx(measured[-1], rel=1e-5)

    plain = tmp_path / "plain"
    run(recipe_of(stage, plain, method))
    assert "precondition" not in (plain / "recipe.yaml").read_text()  # runs of earlier versions are resumed as before
    assert outcome(plain)["adapter"] != found["adapter"]
