"""RemixModel: several adapters on one base, folders that `remix train` reads and writes."""

import dataclasses

import pytest
import torch
from helpers.tiny import fill_adapter, recipe_text, tiny_model, write_recipe, write_rows, write_tiny_model
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from remix_cli.core.trace import Trace
from remix_cli.errors import ArtefactError
from remix_cli.integrations import AdapterConfig, RemixModel, get_remix_model
from remix_cli.integrations.model import prompts_of
from remix_cli.recipe import load_recipe
from remix_cli.runs import load_run
from remix_cli.train.trainer import train

CONFIG = AdapterConfig(pool_size=4, active=2, rank=3, router_init_std=1.0)
BY_SEQUENCE = dataclasses.replace(CONFIG, level="sequence")
IDS = torch.arange(3, 19).view(2, 8)


def filled(config=CONFIG, seed=1, model=None) -> RemixModel:
    adapted = get_remix_model(tiny_model() if model is None else model, config)
    fill_adapter(adapted.adapter, seed=seed)
    return adapted.eval()


@torch.no_grad()
def logits(model, **inputs) -> torch.Tensor:
    return model(input_ids=IDS, **inputs).logits


def test_a_new_adapter_changes_nothing_and_alone_is_trained():
    base = tiny_model()
    before = logits(base)
    model = get_remix_model(base, CONFIG).eval()
    assert torch.equal(logits(model), before)
    assert {id(p) for p in model.parameters() if p.requires_grad} == {
        id(p) for p in model.adapter.parameters().values()
    }
    assert model.config is base.config  # what is not its own is the model's
    assert model.device == base.device


def test_the_count_of_what_is_trained(capsys):
    model = get_remix_model(tiny_model(), CONFIG)
    trained = sum(p.numel() for p in model.adapter.parameters().values())
    total = trained + sum(p.numel() for p in tiny_model().parameters())
    model.print_trainable_parameters()
    assert capsys.readouterr().out == (
        f"trainable params: {trained:,} || all params: {total:,} || trainable%: {100 * trained / total:.4f}\n"
    )


def test_without_the_adapter_it_is_the_base_model():
    model = filled()
    wanted, routed = logits(tiny_model()), logits(model)
    assert not torch.allclose(routed, wanted)
    with model.disable_adapter():
        assert torch.equal(logits(model), wanted)
    assert torch.equal(logits(model), routed)


@pytest.mark.parametrize("scope", ["block", "module", "model"])
def test_adapters_take_turns_on_one_base(scope):
    config = dataclasses.replace(CONFIG, scope=scope)
    model = filled(config)
    first = logits(model)
    model.add_adapter("other", dataclasses.replace(config, pool_size=8, rank=2), seed=5)
    fill_adapter(model.adapter, seed=7)
    second = logits(model)
    assert not torch.allclose(first, second)
    mine = {id(p) for p in model.adapter.parameters().values()}
    assert {id(p) for p in model.parameters() if p.requires_grad} == mine
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    model.set_adapter("other")
    assert torch.equal(logits(model), second)
    model.delete_adapter("other")
    assert model.active_adapter == "default"
    assert torch.equal(logits(model), first)
    model.delete_adapter("default")
    assert torch.equal(logits(model), logits(tiny_model()))
    assert not [name for name, _ in model.base_model.named_modules() if "lora" in name or "router" in name]


def test_an_adapter_that_was_off_follows_its_base():
    model = filled()
    model.add_adapter("other", CONFIG)
    model.to("meta")
    model.set_adapter("default")
    assert {p.device.type for p in model.adapter.lora_parameters().values()} == {"meta"}


def test_names_of_adapters():
    model = filled()
    for wrong in (lambda: model.add_adapter("default", CONFIG), lambda: model.set_adapter("x")):
        with pytest.raises(ValueError, match="default"):
            wrong()
    with pytest.raises(ValueError, match="no linear layer matches"):
        model.add_adapter("b", dataclasses.replace(CONFIG, target_modules=("nowhere",)))
    assert model.active_adapter == "default"
    assert not torch.allclose(logits(model), logits(tiny_model()))  # still in place


@pytest.mark.parametrize("config", [CONFIG, dataclasses.replace(BY_SEQUENCE, clusters=3)])
def test_what_was_saved_comes_back(config, tmp_path):
    model = filled(config)
    for tensor in model.adapter.cluster_tensors().values():
        tensor.normal_()
    model.save_pretrained(tmp_path)
    again = RemixModel.from_pretrained(tiny_model(), tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert not any(p.requires_grad for p in again.parameters())
    assert any(
        p.requires_grad for p in RemixModel.from_pretrained(tiny_model(), tmp_path, is_trainable=True).parameters()
    )


def test_another_base_or_tokenizer_is_refused(tmp_path):
    folder = write_tiny_model(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    filled().save_pretrained(tmp_path / "a", tokenizer=tokenizer)
    with pytest.raises(ArtefactError, match="another base model"):
        RemixModel.from_pretrained(tiny_model(seed=1), tmp_path / "a")
    RemixModel.from_pretrained(tiny_model(), tmp_path / "a", tokenizer=tokenizer)
    tokenizer.add_tokens(["w99"])
    with pytest.raises(ArtefactError, match="another tokenizer"):
        RemixModel.from_pretrained(tiny_model(), tmp_path / "a", tokenizer=tokenizer)
    with pytest.raises(ArtefactError, match="no such folder, and the hub"):
        RemixModel.from_pretrained(tiny_model(), tmp_path / "nowhere")


def test_a_repository_of_the_hub_is_read_like_a_folder(tmp_path, monkeypatch):
    filled().save_pretrained(tmp_path)
    asked = {}

    def download(repo, **options):
        asked.update(options, repo=repo)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    loaded = RemixModel.from_pretrained(tiny_model(), "me/adapter", revision="v1")
    assert torch.equal(logits(loaded), logits(filled()))
    assert asked == {
        "repo": "me/adapter",
        "revision": "v1",
        "allow_patterns": ["remix_config.json", "adapter.safetensors"],
    }


def recipe(folder, **adapter):
    text = recipe_text(
        folder / "model", folder / "rows.jsonl", folder / "run", router={"init_std": 1.0}, adapter=adapter
    )
    return load_recipe(write_recipe(folder / "recipe.yaml", text))


def test_a_run_is_read_and_begins_from_what_was_saved(tmp_path):
    write_tiny_model(tmp_path / "model")
    write_rows(tmp_path / "rows.jsonl", 20)
    train(recipe(tmp_path), Console(quiet=True))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with pytest.raises(ArtefactError, match=r"is a run; give .*best or .*adapter"):
        RemixModel.from_pretrained(base, tmp_path / "run")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    model = RemixModel.from_pretrained(base, tmp_path / "run" / "adapter", tokenizer=tokenizer)
    run = load_run(tmp_path / "run")
    assert torch.equal(logits(model), logits(run.model.eval()))

    fill_adapter(model.adapter)
    model.save_pretrained(tmp_path / "mine", tokenizer=tokenizer)
    second = recipe(tmp_path, init_from=str(tmp_path / "mine")).model_copy(
        update={"output_dir": str(tmp_path / "run2")}
    )
    summary = train(second, Console(quiet=True))
    assert summary["steps"] == 4


def test_by_sequence_a_generation_keeps_the_choice_of_its_prompt(tmp_path):
    folder = write_tiny_model(tmp_path / "model")
    model = filled(BY_SEQUENCE, model=AutoModelForCausalLM.from_pretrained(folder))
    prompts = [[4, 5, 6, 7, 8], [9, 10]]
    greedy = {"max_new_tokens": 6, "do_sample": False}
    alone = [model.generate(input_ids=torch.tensor([p]), **greedy)[0, len(p) :] for p in prompts]
    padded = torch.tensor([prompts[0], [1, 1, 1, *prompts[1]]])
    mask = torch.tensor([[1] * 5, [0, 0, 0, 1, 1]])
    together = model.generate(input_ids=padded, attention_mask=mask, **greedy)[:, 5:]
    for one, found in zip(alone, together, strict=True):
        assert torch.equal(one, found[: len(one)])


def test_the_prompt_is_what_comes_before_the_first_label():
    ids = torch.ones(3, 5, dtype=torch.long)
    mask = torch.tensor([[1, 1, 1, 1, 0], [0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    labels = torch.tensor([[-100, -100, 7, 7, -100], [-100, -100, -100, 7, 7], [7, 7, -100, 7, 7]])
    assert prompts_of(ids, mask, labels).long().tolist() == [[1, 1, 0, 0, 0], [0, 1, 1, 0, 0], [1, 0, 0, 0, 0]]
    assert prompts_of(ids, mask, None).long().tolist() == mask.tolist()
    assert prompts_of(ids, None, None).all()


def test_a_trace_in_force_is_left_alone():
    model = filled(BY_SEQUENCE)
    prompt = torch.zeros_like(IDS, dtype=torch.bool)
    prompt[:, :3] = True
    trace = Trace(prompt=prompt)
    with model.adapter.tracing(trace):
        short = logits(model)
    assert len(trace.decisions) == 2
    assert not torch.equal(short, logits(model))  # which reads all positions
    labels = IDS.masked_fill(prompt, -100)
    assert torch.equal(short, logits(model, labels=labels))


def test_checkpointing_repeats_the_selections_that_were_drawn():
    gradients = []
    for checkpointing in (False, True):
        model = filled().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        noise = model.adapter.noise((0, 0), torch.arange(2), 8)
        with model.adapter.tracing(Trace(noise=noise)):
            loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        gradients.append([p.grad for p in model.adapter.lora_parameters().values()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)
