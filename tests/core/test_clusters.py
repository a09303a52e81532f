"""Routing by the cluster that a prompt is in."""

import json

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from helpers.common import close
from helpers.tiny import recipe_text, tiny_model, write_recipe, write_rows, write_tiny_model
from rich.console import Console
from safetensors.torch import load_file

from remix_cli.core.clusters import centred, common_part, spherical_k_means
from remix_cli.core.config import AdapterConfig
from remix_cli.core.patch import apply_adapter
from remix_cli.core.store import load_stored
from remix_cli.core.trace import Trace
from remix_cli.data.rows import EncodedRow
from remix_cli.errors import ArtefactError, DataError, RecipeError
from remix_cli.recipe import load_recipe
from remix_cli.train.cluster_prompts import find_clusters, rows_to_cluster
from remix_cli.train.trainer import train

CONFIG = AdapterConfig(pool_size=8, active=4, rank=2, level="sequence", clusters=3, router_init_std=1.0)


def kinds_of_rows(count=12, kinds=3, length=12):
    """Rows of `kinds` kinds, each with words of its own, in turn."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for i in range(count):
        words = torch.randint(0, 2, (length,), generator=generator) + 4 + 15 * (i % kinds)
        supervised = torch.arange(length) >= length - 3
        rows.append(EncodedRow(words.numpy(), supervised.numpy(), "one"))
    return rows


def batch_of(rows):
    ids = torch.stack([torch.from_numpy(row.input_ids) for row in rows])
    prompt = ~torch.stack([torch.from_numpy(row.supervised) for row in rows])
    return ids, prompt


def test_k_means_finds_planted_groups_whatever_their_order():
    generator = torch.Generator().manual_seed(0)
    planted = F.normalize(torch.randn(5, 32, generator=generator), dim=-1)
    group = torch.arange(200) % 5
    rows = F.normalize(planted[group] + 0.05 * torch.randn(200, 32, generator=generator), dim=-1)
    for order in (torch.arange(200), torch.randperm(200, generator=generator)):
        centres = spherical_k_means(rows[order], 5)
        assert close(centres.norm(dim=-1), torch.ones(5), 1e-6)
        of = (rows[order] @ centres.T).argmax(-1)
        pairs = {(int(a), int(b)) for a, b in zip(of, group[order], strict=True)}
        assert len(pairs) == 5, "every group is one cluster"
    assert torch.equal(spherical_k_means(rows, 5), spherical_k_means(rows, 5))


def test_a_centre_without_members_stays_and_equal_rows_are_no_trouble():
    centres = spherical_k_means(F.normalize(torch.ones(4, 3), dim=-1), 3)
    assert torch.isfinite(centres).all()
    assert close(centres, F.normalize(torch.ones(3, 3), dim=-1), 1e-6)


def test_prompts_of_one_kind_get_one_set_and_others_another():
    """The router reads the nearest centre: by hand the same logits, and within a kind the same sets."""
    model = tiny_model()
    adapter = apply_adapter(model, CONFIG, seed=0)
    rows = kinds_of_rows()
    find_clusters(adapter, rows, 5, Accelerator(cpu=True))
    ids, prompt = batch_of(rows)
    with torch.no_grad(), adapter.tracing(Trace(prompt=prompt)) as trace:
        model(ids)
    with torch.no_grad(), adapter.tracing(Trace(prompt=prompt, quantise=False)) as plain:
        model(ids)
    for decision in trace.decisions.values():
        sets = [frozenset(ids.flatten().tolist()) for ids in decision.chosen]
        assert all(sets[i] == sets[i % 3] for i in range(12))
        assert len(set(sets)) > 1
        assert close(decision.inputs.norm(dim=-1), torch.ones(12, 1), 1e-5)
    first = next(iter(adapter.routers))  # where nothing that is adapted comes before
    means = plain.decisions[first].inputs[:, 0]
    router = adapter.routers[first]
    nearest = (F.normalize(F.normalize(means, dim=-1) - router.common, dim=-1) @ router.centres.T).argmax(-1)
    assert close(trace.decisions[first].logits[:, 0], router.centres[nearest] @ router.weight.T, 1e-5)


def test_the_clusters_are_those_of_the_base_models_inputs():
    model = tiny_model()
    adapter = apply_adapter(model, CONFIG, seed=0)
    rows = kinds_of_rows()
    find_clusters(adapter, rows, 4, Accelerator(cpu=True))
    other = apply_adapter(tiny_model(), CONFIG, seed=7)
    find_clusters(other, rows, 12, Accelerator(cpu=True))
    for a, b in zip(adapter.cluster_tensors().values(), other.cluster_tensors().values(), strict=True):
        assert close(a, b, 1e-4)
    ids, prompt = batch_of(rows)
    with torch.no_grad(), adapter.tracing(Trace(prompt=prompt, quantise=False)) as trace:
        model(ids)
    name, router = next(iter(adapter.routers.items()))
    means = trace.decisions[name].inputs[:, 0]
    assert close(router.common, common_part(means), 1e-5)
    assert close(router.centres, spherical_k_means(centred(means, router.common), 3), 1e-4)


def test_a_sample_of_the_rows_is_enough_and_the_same_for_a_seed():
    rows = kinds_of_rows(1000)
    some = rows_to_cluster(rows, 3, 5)
    assert len(some) == 256
    assert len({id(row) for row in some}) == 256
    assert len(rows_to_cluster(rows, 20, 5)) == 320
    assert [id(r) for r in some] == [id(r) for r in rows_to_cluster(rows, 3, 5)]
    assert [id(r) for r in some] != [id(r) for r in rows_to_cluster(rows, 3, 6)]


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stage")
    return write_tiny_model(folder / "model"), write_rows(folder / "rows.jsonl", 24), folder


def recipe_for(stage, output, **router):
    settings = {"max_steps": 4, "eval_steps": 2, "save_steps": 2, "logging_steps": 1, "learning_rate": 0.05}
    groups = {"router": {"level": "sequence", "clusters": 4, "init_std": 1.0} | router, "train": settings}
    return load_recipe(write_recipe(output.with_suffix(".yaml"), recipe_text(*stage[:2], output, **groups)))


@pytest.fixture(scope="module")
def whole(stage):
    recipe = recipe_for(stage, stage[2] / "whole")
    train(recipe, Console(quiet=True))
    return stage[2] / "whole"


def test_a_run_keeps_its_clusters_and_a_stopped_one_takes_them_up(stage, whole, monkeypatch, tmp_path):
    from remix_cli.train import trainer

    recipe = recipe_for(stage, tmp_path / "run")
    step, found = trainer.Trainer._step, []

    def stop_at_three(run, number):
        if number == 3:
            raise OSError("stop")
        return step(run, number)

    monkeypatch.setattr(trainer.Trainer, "_step", stop_at_three)
    monkeypatch.setattr(trainer, "find_clusters", lambda *args: found.append(1) or find_clusters(*args))
    with pytest.raises(OSError, match="stop"):
        train(recipe, Console(quiet=True))
    monkeypatch.setattr(trainer.Trainer, "_step", step)
    train(recipe, Console(quiet=True), resume=True)
    assert len(found) == 1, "a checkpoint holds them"
    ours, theirs = (load_file(folder / "adapter" / "adapter.safetensors") for folder in (tmp_path / "run", whole))
    assert ours.keys() == theirs.keys()
    assert sum(name.endswith(".router_centres") for name in ours) == 2
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_an_adapter_without_its_centres_is_refused(whole, tmp_path):
    from safetensors.torch import save_file

    from remix_cli.storage import seal, sha256

    folder = tmp_path / "adapter"
    folder.mkdir()
    tensors = load_file(whole / "adapter" / "adapter.safetensors")
    save_file({k: v for k, v in tensors.items() if "router_centres" not in k}, folder / "adapter.safetensors")
    described = json.loads((whole / "adapter" / "remix_config.json").read_text())
    described["weights_sha256"] = sha256(folder / "adapter.safetensors")
    described.pop("sha256")
    (folder / "remix_config.json").write_text(json.dumps(seal(described)))
    with pytest.raises(ArtefactError, match="router_centres"):
        load_stored(folder)


@pytest.mark.parametrize(
    ("router", "message"),
    [
        ({"level": "token"}, "router.clusters"),
        ({"unit_input": False}, "router.unit_input"),
        ({"clusters": -1}, "router.clusters"),
        ({"clusters": 5000}, "router.clusters"),
    ],
)
def test_clusters_that_cannot_be_meant_are_refused(stage, tmp_path, router, message):
    with pytest.raises(RecipeError, match=message):
        recipe_for(stage, tmp_path / "run", **router)


def test_more_clusters_than_rows_are_refused(stage, tmp_path):
    with pytest.raises(DataError, match=r"router.clusters: 100 clusters need at least as many training rows"):
        train(recipe_for(stage, tmp_path / "run", clusters=100), Console(quiet=True))
