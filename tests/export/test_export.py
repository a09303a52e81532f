"""Exported folders, read back by the libraries that are to read them."""

import io
import json
import re
import shutil

import huggingface_hub
import pytest
import torch
from helpers.common import close
from helpers.methods import FAST, small_method
from helpers.tiny import recipe_text, tiny_model, write_recipe
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, AutoModelForCausalLM, LlamaForCausalLM

from remix_cli.core.trace import Trace
from remix_cli.data.formats import Example
from remix_cli.evaluation.generate import Decoding, generate
from remix_cli.export.hf import load_exported
from remix_cli.runs import load_run

IDS = torch.tensor([[5, 9, 22, 7, 31, 8], [4, 4, 17, 40, 3, 12]])


@pytest.fixture(scope="module")
def trained(stage, tmp_path_factory):
    """Finished runs by level and scope, long enough that the adapter matters."""
    from rich.console import Console

    from remix_cli.recipe import load_recipe
    from remix_cli.train.trainer import train

    made = {}

    def run(**router):
        name = "-".join([*map(str, router.values()), "run"])
        if name not in made:
            folder = tmp_path_factory.mktemp("trained")
            train_more = {"max_steps": 12, "learning_rate": 0.2, "eval_steps": None, "save_steps": None}
            recipe = recipe_text(*stage[:2], folder / "run", router=router, train=train_more)
            train(load_recipe(write_recipe(folder / "r.yaml", recipe)), Console(quiet=True))
            made[name] = folder / "run"
        return made[name]

    return run


@torch.no_grad()
def ours(folder):
    run = load_run(folder)
    mask = torch.ones_like(IDS)
    with run.adapter.tracing(Trace(prompt=mask.bool(), record=False)):
        routed = run.model(input_ids=IDS).logits
    with run.adapter.disabled():
        base = run.model(input_ids=IDS).logits
    assert not close(routed, base, 9e-3), "the adapter must matter"
    return run, routed


CLUSTERS = {"level": "sequence", "clusters": 3}


ONE_ROUTER = [{"scope": "model"}, CLUSTERS | {"scope": "model"}]


@pytest.mark.parametrize("router", [{}, {"level": "sequence"}, CLUSTERS, {"scope": "module"}, *ONE_ROUTER], ids=str)
@pytest.mark.parametrize("reference", [False, True])
def test_the_hf_folder_is_the_routed_model(verb, trained, tmp_path, router, reference):
    run, logits = ours(trained(**router))
    out, _ = verb("export", run.folder.path, "-o", tmp_path / "hf", *(["--reference-base"] if reference else []))
    assert "checked" in out
    by_sequence = router.get("level") == "sequence"
    assert out.count("--lm-eval") == by_sequence  # of a likelihood no pass can tell where its prompt ends
    assert (tmp_path / "hf" / "README.md").read_text().count("--lm-eval") == by_sequence
    model = load_exported(tmp_path / "hf", torch.float32).requires_grad_(False)
    assert close(model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits, logits, 1e-5)
    wide = load_exported(tmp_path / "hf", torch.bfloat16)
    routers = [p for name, p in wide.named_parameters() if "remix_router" in name]
    assert routers
    assert all(p.dtype == torch.float32 for p in routers)  # decisions must not be rounded
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    with run.adapter.tracing(Trace(prompt=mask.bool(), record=False)):
        expected = run.model.generate(input_ids=IDS, **options)
    for use_cache in (True,) if by_sequence else (True, False):
        assert torch.equal(model.generate(input_ids=IDS, use_cache=use_cache, **options), expected)
    again = model.generate(input_ids=IDS.flip(0), **(options | {"attention_mask": mask.flip(0)}))
    assert torch.equal(again, expected.flip(0))  # another prompt chooses anew


def test_stock_transformers_loads_the_hf_folder(verb, trained, tmp_path, monkeypatch):
    run, logits = ours(trained())
    verb("export", run.folder.path, "-o", tmp_path / "hf")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True, dtype=torch.float32)
    with torch.no_grad():
        assert close(model(input_ids=IDS).logits, logits, 1e-5)
    places = dict.fromkeys(["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.0"], "cpu")
    options = {"device_map": places | {"model.layers.1": "disk"}, "offload_folder": tmp_path / "offload"}
    spread = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True, **options)
    assert set(spread.hf_device_map.values()) == {"cpu", "disk"}
    with torch.no_grad():
        assert close(spread(input_ids=IDS).logits, logits, 1e-5)
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "2 of 4 LoRAs" in card
    assert "## Routing" in card


@pytest.mark.parametrize("reference", [False, True])
def test_the_hf_folder_without_its_code_is_nothing_rather_than_the_base_model(
    verb, trained, tmp_path, monkeypatch, reference
):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("sys.stdin", io.StringIO())  # nobody to ask
    folder = tmp_path / "hf"
    verb("export", trained(), "-o", folder, *(["--reference-base"] if reference else []))
    for asked in ({}, {"trust_remote_code": False}):
        for stock in (AutoConfig, AutoModelForCausalLM, AutoModel):
            with pytest.raises(ValueError, match="contains custom code"):
                stock.from_pretrained(folder, **asked)
    with pytest.raises((RuntimeError, OSError)):  # by the name of the base model's class: another shape, or no weights
        LlamaForCausalLM.from_pretrained(folder)
    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    with pytest.raises(ValueError, match="contains custom code"):  # and what was allowed once is not allowed for ever
        AutoModelForCausalLM.from_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] not in CONFIG_MAPPING  # whatever a release does about the code, it knows no such type
    del config["auto_map"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="model type"):
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)


def test_merged_folders_are_the_fitted_model_and_say_what_they_cost(verb, trained, tmp_path):
    peft = pytest.importorskip("peft")
    run, _ = ours(trained())
    out, _ = verb("export", run.folder.path, "--format", "merged", "-o", tmp_path / "merged", "--rank", "12")
    assert "KL(routed, approximation)" in out
    verb("export", run.folder.path, "--format", "peft-merged", "-o", tmp_path / "peft", "--rank", "12")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(run.recipe.model.name_or_path, dtype=torch.float32)
    wrapped = peft.PeftModel.from_pretrained(base, tmp_path / "peft")
    with torch.no_grad():
        assert close(wrapped(input_ids=IDS).logits, merged(input_ids=IDS).logits, 1e-4)
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["r"] == 12
    assert "| loss of this approximation |" in (tmp_path / "merged" / "README.md").read_text()


@pytest.mark.parametrize("tied", [False, True])
def test_a_merged_folder_names_its_tensors_as_the_base_model_does(tied, stage, tmp_path, verb):
    """Of a tied pair the embedding is written, as llama.cpp's converter and others expect."""
    tiny_model(tie_word_embeddings=tied).save_pretrained(tmp_path / "base")
    for file in stage[0].glob("tokenizer*"):
        shutil.copy(file, tmp_path / "base")
    recipe = recipe_text(tmp_path / "base", stage[1], tmp_path / "run", train={"max_steps": 1})
    verb("train", write_recipe(tmp_path / "r.yaml", recipe))
    verb("export", tmp_path / "run", "--format", "merged", "--rows", "8", "-o", tmp_path / "merged")
    verb("export", tmp_path / "run", "-o", tmp_path / "hf")
    names, written, routed = (set(load_file(tmp_path / f / "model.safetensors")) for f in ("base", "merged", "hf"))
    assert "model.embed_tokens.weight" in written
    assert written == names
    base = {name.replace(".base.", ".") for name in routed if "lora" not in name and "router" not in name}
    assert base == names


def test_export_refuses_what_it_cannot_do_and_leaves_nothing(verb, trained, stage, tmp_path):
    run = trained()
    _, err = verb("export", run, "-o", stage[2], expect=2)
    assert "exists" in err
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    verb("export", run, "-o", tmp_path / "link", expect=2)
    assert not (tmp_path / "elsewhere").exists()
    _, err = verb("export", run, "--format", "merged", "--rank", "99", "-o", tmp_path / "m", expect=2)
    assert "n r = 12" in err
    verb("export", run, "--format", "onnx", "-o", tmp_path / "o", expect=2)
    for unread in (["--rank", "4"], ["--rows", "8"], ["--public"], ["--any-base", "--format", "peft-experts"]):
        assert f"{unread[0]}: is for " in verb("export", run, *unread, "-o", tmp_path / "o", expect=2)[1]
    for flag in ("--rank", "--rows"):
        ask = ["export", run, "--format", "merged", "--prompt", "w1", flag, "8", "-o", tmp_path / "o"]
        assert f"{flag}: is for --format merged or peft-merged, for all prompts; leave" in verb(*ask, expect=2)[1]
    err = verb("export", run, "--format", "merged", "--reference-base", "-o", tmp_path / "o", expect=2)[1]
    assert "--reference-base: is for --format hf" in err
    assert not list(tmp_path.glob("[mo]*"))


def test_a_folder_that_disagrees_is_not_published(verb, trained, tmp_path, monkeypatch):
    from remix_cli.export import hf

    plain = hf._adapter_tensors
    monkeypatch.setattr(hf, "_adapter_tensors", lambda run: {k: v * 1.5 for k, v in plain(run).items()})
    _, err = verb("export", trained(), "-o", tmp_path / "hf", expect=5)
    assert "does not agree" in err
    assert not (tmp_path / "hf").exists()


def test_weights_of_another_size_are_not_published(verb, trained, tmp_path, monkeypatch):
    from remix_cli.export import hf

    plain = hf._description
    monkeypatch.setattr(hf, "_description", lambda *a: plain(*a) | {"scale": 1.5 * plain(*a)["scale"]})
    _, err = verb("export", trained(), "-o", tmp_path / "hf", expect=5)
    assert "does not agree" in err


@pytest.mark.parametrize(("positions", "expect"), [(slice(0, 1), 0), (slice(None), 5)])
def test_choices_that_rounding_flips_are_told_from_wrong_routers(
    verb, trained, tmp_path, monkeypatch, positions, expect
):
    """Logits are compared under the same choices, of which rounding may change some, and wrong routers change many."""
    from remix_cli.export import hf

    def tilted(folder, dtype):
        model = load_exported(folder, dtype)
        router = next(m for m in model.modules() if type(m).__name__ == "RemixRouter")
        choose = router.forward

        def other(x):
            gates = choose(x)
            gates[:, positions] = gates[:, positions].roll(router.c["rank"], -1)  # each LoRA's neighbour
            return gates

        router.forward = other
        return model

    monkeypatch.setattr(hf, "load_exported", tilted)
    told = "".join(verb("export", trained(), "-o", tmp_path / "hf", expect=expect))
    assert float(re.search(r"logits differ by ([\d.e+-]+)", told)[1]) < 1e-5
    share = float(re.search(r"([\d.]+)% of the choices", told)[1])
    assert 95 < share < 100 if expect == 0 else share < 90


def test_experts_and_hf_hold_the_same_numbers(verb, trained, tmp_path):
    verb("export", trained(), "-o", tmp_path / "hf")
    verb("export", trained(), "--format", "peft-experts", "-o", tmp_path / "experts")
    whole = load_file(tmp_path / "hf" / "model.safetensors")["model.layers.1.mlp.up_proj.lora_A.weight"]
    expert = load_file(tmp_path / "experts" / "lora-2" / "adapter_model.safetensors")
    assert torch.equal(whole[6:9], expert["base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"])


def test_experts_active_together_are_one_selection(verb, trained, tmp_path):
    """Loaded by PEFT as the folder's README says: W + omega (B_0 A_0 + B_2 A_2) in every adapted layer."""
    peft = pytest.importorskip("peft")
    run, _ = ours(trained())
    verb("export", run.folder.path, "--format", "peft-experts", "-o", tmp_path / "e")
    base, by_hand = (AutoModelForCausalLM.from_pretrained(run.recipe.model.name_or_path).float() for _ in range(2))
    theirs = peft.PeftModel.from_pretrained(base, str(tmp_path / "e" / "lora-0"), adapter_name="0").eval()
    theirs.load_adapter(str(tmp_path / "e" / "lora-2"), adapter_name="2")
    theirs.base_model.set_adapter(["0", "2"])
    c = run.stored.config
    with torch.no_grad():
        for name, linear in run.adapter.linears.items():
            for i in (0, 2):
                rows = slice(i * c.rank, (i + 1) * c.rank)
                update = linear.lora_B[:, rows] @ linear.lora_A[rows] * c.scale
                by_hand.get_submodule(name).weight += update
        expected = by_hand(input_ids=IDS, use_cache=False).logits
        assert close(theirs(input_ids=IDS, use_cache=False).logits, expected, 1e-5)
    readme = (tmp_path / "e" / "README.md").read_text()
    assert f"Any {c.active} of them, active together" in readme
    assert {p.name for p in (tmp_path / "e").iterdir()} == {
        "README.md",
        "router.safetensors",
        *(f"lora-{i}" for i in range(c.pool_size)),
    }


@pytest.mark.parametrize("method", ["rslora", "lora", "dora", "ia3", "vblora", "prompt", "prefix", "p_tuning"])
def test_what_has_no_router_becomes_pefts_own_folder(method, stage, tmp_path, verb):
    peft = pytest.importorskip("peft")
    recipe = recipe_text(*stage[:2], tmp_path / "run", train={"max_steps": 2, "learning_rate": FAST.get(method, 0.1)})
    recipe["adapter"] = small_method(method)
    verb("train", write_recipe(tmp_path / "r.yaml", recipe))
    out, _ = verb("export", tmp_path / "run", "-o", tmp_path / "peft")
    assert "loaded again; logits differ" in out
    run = load_run(tmp_path / "run")
    base = AutoModelForCausalLM.from_pretrained(stage[0], dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "peft").eval()
    with torch.no_grad():
        ours = run.model(input_ids=IDS, use_cache=False).logits
        assert close(theirs(input_ids=IDS, use_cache=False).logits, ours, 1e-5)
        with run.adapter.disabled():
            plain = run.model(input_ids=IDS, use_cache=False).logits
        assert not close(plain, ours[:, -IDS.shape[1] :], 1e-4)
    assert f"method: {method}" in (tmp_path / "peft" / "README.md").read_text()
    _, err = verb("export", tmp_path / "run", "--format", "hf", "-o", tmp_path / "hf", expect=2)
    assert "use --format peft" in err


def test_a_routed_run_is_no_peft_folder(verb, trained, tmp_path):
    _, err = verb("export", trained(), "--format", "peft", "-o", tmp_path / "p", expect=2)
    assert "remix has a router, which PEFT cannot hold; use --format hf, merged" in err


def test_one_selection_of_a_sequence_level_run_merges_exactly(verb, trained, tmp_path):
    peft = pytest.importorskip("peft")
    run, _ = ours(trained(level="sequence"))
    verb("export", run.folder.path, "--format", "merged", "--prompt", "w1 w2 w7 ?", "-o", tmp_path / "m")
    ids = torch.tensor([prompt_ids(run, "w1 w2 w7 ?")])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    longer = torch.cat([ids, IDS[:1]], 1)
    prompt = torch.arange(longer.shape[1])[None] < ids.shape[1]
    with torch.no_grad():
        with run.adapter.tracing(Trace(prompt=prompt)):
            expected = run.model(input_ids=longer).logits  # the choice stays for the answer
        assert close(merged(input_ids=longer).logits, expected, 1e-5)
    # the choice given as a file, as a LoRA of rank k r
    choice = tmp_path / "m" / "selection.json"
    arguments = ["--format", "peft-merged", "--selection", choice, "-o"]
    verb("export", run.folder.path, *arguments, tmp_path / "p")
    base = AutoModelForCausalLM.from_pretrained(run.recipe.model.name_or_path, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "p")
    with torch.no_grad():
        assert close(theirs(input_ids=longer).logits, expected, 1e-5)
    assert json.loads((tmp_path / "p" / "adapter_config.json").read_text())["r"] == 2 * 3
    # a choice that is none is refused, and so is a run whose choice changes with the token
    choice.write_text(json.dumps({name: [0, 0] for name in run.adapter.routers}))
    _, err = verb("export", run.folder.path, *arguments, tmp_path / "z", expect=2)
    assert "with 2 different ids from 0 to 3" in err
    _, err = verb("export", trained(), "--format", "merged", "--prompt", "w1", "-o", tmp_path / "t", expect=2)
    assert "routes token by token" in err
    assert not (tmp_path / "z").exists()


class Hub:
    """What `huggingface_hub.HfApi` would be asked."""

    def __init__(self):
        self.asked, self.private = [], True

    def create_repo(self, repo, private, exist_ok):
        self.asked.append(("create", repo, private))

    def repo_info(self, repo):
        return self

    def upload_folder(self, folder_path, repo_id, commit_message):
        self.asked.append(("upload", repo_id))


def test_an_upload_needs_its_flag_and_a_token_and_is_private(verb, trained, tmp_path, monkeypatch):
    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    push = ["--push-to-hub", "me/mine"]
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    _, err = verb("export", trained(), "-o", tmp_path / "a", *push, expect=2)
    assert "HF_HUB_OFFLINE is set" in err
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    _, err = verb("export", trained(), "-o", tmp_path / "a", *push, expect=2)
    assert "no token" in err
    assert not (tmp_path / "a").exists()  # refused before any work
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "secret")
    verb("export", trained(), "-o", tmp_path / "a")
    assert hub.asked == []
    out, _ = verb("export", trained(), "-o", tmp_path / "b", *push)
    assert hub.asked == [("create", "me/mine", True), ("upload", "me/mine")]
    assert "uploaded: https://" in out
    assert "secret" not in out
    hub.private, hub.asked = False, []
    _, err = verb("export", trained(), "-o", tmp_path / "c", *push, expect=2)
    assert "exists and is public; add --public" in err
    assert ("upload", "me/mine") not in hub.asked


def prompt_ids(run, text):
    turns = ({"role": "user", "content": text}, {"role": "assistant", "content": "."})
    return run.encoder.prompt_ids(Example(turns, "t"))


def test_generate_answers_as_evaluation_does_and_shows_the_routing(verb, trained, monkeypatch):
    run = load_run(trained())
    ((_, expected),) = generate(run, [prompt_ids(run, "w1 w2 w7 ?")], [0], Decoding(6), 1)
    ask = ["generate", trained(), "w1 w2 w7 ?", "--max-new-tokens", "6"]
    assert verb(*ask)[0].strip() == expected.strip()
    assert verb(*ask, "--base")[0].strip() != expected.strip()
    out, _ = verb(*ask, "--show-routing", "--block", "1")
    assert "LoRAs of model.layers.1.mlp" in out
    shown = [list(map(int, found.split(","))) for found in re.findall(r"\[([\d,]+)\]", out)]
    assert shown
    assert all(len(set(ids)) == 2 and set(ids) <= set(range(4)) for ids in shown)
    monkeypatch.setattr("sys.stdin", io.StringIO("w1 w2 w7 ?\n\nw3 w4 w7 ?\n"))
    out, _ = verb("generate", trained(), "--max-new-tokens", "6")
    assert out.splitlines()[0].strip() == expected.strip()
    assert len(out.strip().splitlines()) == 2
    _, err = verb("generate", trained(), "x", "--show-routing", "--block", "9", expect=2)
    assert "routers 0 to 1" in err
    _, err = verb("generate", trained(), "x", "--base", "--show-routing", expect=2)
    assert "no router" in err


def test_a_run_and_its_exported_folder_score_the_same(verb, trained, stage, tmp_path, monkeypatch):
    """Train, export, load again, evaluate: every answer and every loss is that of `remix eval RUN`."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    folder, rows = trained(), stage[1]
    verb("export", folder, "-o", tmp_path / "hf")
    ask = ["--task", "gsm8k", "--data", rows, "--max-new-tokens", "6"]
    _, err = verb("eval", tmp_path / "hf", *ask, expect=2)
    assert "add --trust-remote-code" in err  # transformers alone would have scored the base model
    for task in (ask, ["--task", "nll", "--data", rows, "--data-format", "gsm8k"]):
        verb("eval", folder, *task)
        verb("eval", tmp_path / "hf", *task, "--trust-remote-code")
    found = json.loads(verb("compare", folder, tmp_path / "hf", "--json")[0])
    assert set(found["tasks"]) >= {"gsm8k@rows", "nll@rows"}
    for run in (folder / "eval" / "adapter-gsm8k@rows.jsonl", folder / "eval" / "adapter-nll@rows.jsonl"):
        theirs = tmp_path / "hf" / "eval" / run.name.replace("adapter", "model")
        for one, two in zip(run.read_text().splitlines(), theirs.read_text().splitlines(), strict=True):
            one, two = json.loads(one), json.loads(two)
            assert one.get("output") == two.get("output")
            assert one.get("nats", 0.0) == pytest.approx(two.get("nats", 0.0), rel=1e-5)
    _, err = verb("eval", folder, "--data-format", "gsm8k", expect=2)
    assert "with --data" in err


@pytest.fixture(scope="module")
def one_lora(stage, tmp_path_factory):
    from rich.console import Console

    from remix_cli.recipe import load_recipe
    from remix_cli.train.trainer import train

    folder = tmp_path_factory.mktemp("plain")
    recipe = recipe_text(*stage[:2], folder / "run") | {"adapter": {"method": "rslora", "rank": 3}}
    train(load_recipe(write_recipe(folder / "recipe.yaml", recipe)), Console(quiet=True))
    return folder / "run"


@pytest.fixture
def plain(one_lora, tmp_path):
    return shutil.copytree(one_lora, tmp_path / "run")


def test_a_run_of_one_lora_merges_exactly(plain, tmp_path, verb):
    out, _ = verb("export", plain, "-o", tmp_path / "merged", "--format", "merged")
    assert "exact: the LoRA is in the weights" in out
    assert "the model as trained" in " ".join((tmp_path / "merged" / "README.md").read_text().split())
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    run = load_run(plain)
    ids = torch.tensor([[5, 9, 11, 40]])
    with torch.no_grad():
        logits = merged(input_ids=ids).logits
        assert close(logits, run.model(input_ids=ids).logits, 1e-6)
        with run.adapter.disabled():
            assert not close(logits, run.model(input_ids=ids).logits, 1e-3)
    _, err = verb("export", plain, "-o", tmp_path / "b", "--format", "merged", "--rank", "2", expect=2)
    assert "--rank: rslora is one LoRA, which is merged as it is; leave it out" in err
    assert not (tmp_path / "b").exists()


def test_a_run_its_peft_folder_and_its_merged_folder_answer_and_score_alike(plain, stage, tmp_path, verb):
    asked = ("--task", "nll", "--data", stage[1], "--data-format", "gsm8k")
    for form in ("peft", "merged"):
        verb("export", plain, "-o", tmp_path / form, "--format", form)
    said, scores = [], []
    for folder in (plain, tmp_path / "peft", tmp_path / "merged"):
        out, _ = verb("generate", folder, "w1 w2 w7 ?", "--max-new-tokens", "6")
        said.append(out)
        found, _ = verb("eval", folder, *asked, "--json")
        scores.append(json.loads(found)["results"][0]["scores"]["loss"])
    assert said[0] == said[1] == said[2]
    assert scores == pytest.approx([scores[0]] * 3, rel=1e-6)
    bases = [json.loads(verb("eval", folder, *asked, "--base", "--json")[0]) for folder in (plain, tmp_path / "peft")]
    assert bases[0]["results"][0]["scores"] == bases[1]["results"][0]["scores"]
    assert bases[0]["results"][0]["scores"]["loss"] > scores[0] * 1.001


def test_folders_that_are_no_run_are_told_by_what_they_lack(plain, stage, tmp_path, verb):
    verb("export", plain, "-o", tmp_path / "peft", "--format", "peft")
    _, err = verb("eval", plain / "adapter", "--task", "nll", "--data", stage[1], expect=5)
    assert "the adapter of a run; give that run's folder" in err
    _, err = verb("eval", tmp_path / "peft", expect=2)
    assert "a PEFT adapter, not a run: say what to score with --task and --data" in err
    _, err = verb("export", tmp_path / "peft", "-o", tmp_path / "b", expect=5)
    assert "a PEFT adapter, not a run" in err
    file = tmp_path / "peft" / "adapter_config.json"
    said = json.loads(file.read_text())
    file.write_text(json.dumps(said | {"base_model_name_or_path": "/gone/model"}))
    _, err = verb("generate", tmp_path / "peft", "w1", expect=5)
    assert "base_model_name_or_path: /gone/model is not on this machine; write there where" in err
    file.write_text(json.dumps(said | {"target_modules": ["no_such"]}))
    _, err = verb("generate", tmp_path / "peft", "w1", expect=5)
    assert "PEFT cannot put this adapter on its base model" in err
    (tmp_path / "peft" / "adapter_model.safetensors").unlink()
    _, err = verb("generate", tmp_path / "peft", "w1", expect=5)
    assert "pickled weights (.bin) are not read" in err
    recipe = plain / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(stage[0]), "/gone/model"))
    _, err = verb("generate", plain, "w1", expect=5)
    assert f"{recipe}: model.name_or_path: /gone/model is not on this machine" in err
