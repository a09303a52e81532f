"""Routing statistics on hand-made decisions."""

import dataclasses
import json
import math
import re
import shutil
import subprocess

import pytest
import torch
from helpers.tiny import fill_adapter, tiny_model

from remix_cli.core.config import AdapterConfig
from remix_cli.core.patch import apply_adapter
from remix_cli.core.step_routing import StepRouting
from remix_cli.core.trace import Decision
from remix_cli.diagnostics.health import Watch, short_name, verdict
from remix_cli.diagnostics.history import sparkline
from remix_cli.diagnostics.page import page
from remix_cli.diagnostics.route_stats import BlockCounter, _count_sets, mutual_information, update_similarity
from remix_cli.recipe.schema import Alarm

N, K = 4, 2


def decision(logits, chosen):
    """(1, T, n) logits and (1, T, k) ids, with constant weights 0.5 on the chosen."""
    logits, chosen = torch.tensor(logits).float().unsqueeze(0), torch.tensor(chosen).unsqueeze(0)
    weights = torch.zeros_like(logits).scatter(-1, chosen, 0.5)
    inputs, length = torch.zeros(1, logits.shape[1], 3), torch.ones_like(logits[..., :1])
    return Decision(inputs, logits, length, chosen, weights, gates=weights)


def count(*parts):
    """`parts`: (decision, mask, token ids, task ids), each one batch; odd token ids are completion and numbers."""
    counter = BlockCounter("b", N, vocabulary=10, tasks=2, device=torch.device("cpu"))
    for d, mask, tokens, tasks in parts:
        as_row = lambda values, kind: torch.tensor([values], dtype=kind)  # noqa: E731
        learnt = as_row(tokens, torch.long) % 2
        counter.add(d, as_row(mask, torch.bool), as_row(tokens, torch.long), as_row(tasks, torch.long), learnt)
    return counter.result(torch.arange(10) % 2, torch.eye(N).unsqueeze(0))


def test_uniform_router_by_hand():
    d = decision([[0.0] * N] * 2, [[0, 1], [2, 3]])
    r = count((d, [1, 1], [5, 6], [0, 0]))
    assert r.tokens == 2
    assert r.entropy == pytest.approx(math.log(4))
    assert r.entropy_share == pytest.approx(1)
    assert (r.ess_q, r.ess_q_worst, r.ess_weights) == pytest.approx((4, 4, 2))
    assert r.share == [0.5] * 4
    assert (r.distinct_sets, r.commonest_set, r.dead) == (2, 0.5, [])
    assert r.task_information == pytest.approx(0)
    assert r.token_information == pytest.approx(math.log(2))  # the token tells which pair, not which of the two


def test_collapsed_router_by_hand():
    d = decision([[90.0, 80.0, 0.0, 0.0]] * 3, [[0, 1], [1, 0], [0, 1]])
    r = count((d, [1, 1, 1], [1, 2, 3], [0, 1, 0]))
    assert r.entropy == pytest.approx(5e-4, abs=1e-4)
    assert r.ess_q == pytest.approx(1, abs=1e-3)
    assert r.share == [1, 1, 0, 0]
    assert r.dead == [2, 3]
    assert (r.distinct_sets, r.commonest_set) == (1, 1.0)  # the order of a set does not matter
    assert r.token_information == pytest.approx(0)
    assert (r.dominating, r.load_variation) == ([0, 1], pytest.approx(1))
    assert r.margin == pytest.approx(80)
    assert r.chosen_mass == pytest.approx(1)
    assert r.agreement == pytest.approx(1)


def test_uniform_choice_agrees_with_a_sample_by_chance():
    r = count((decision([[0.0] * N] * 2, [[0, 1], [2, 3]]), [1, 1], [5, 6], [0, 0]))
    assert r.agreement == pytest.approx(K / N)
    assert r.chosen_mass == pytest.approx(K / N)
    assert (r.margin, r.load_variation, r.dominating) == (pytest.approx(0), pytest.approx(0), [])


def test_part_and_class_determined_router_by_hand():
    """In `count` odd token ids are completion and of another class."""
    r = count((decision([[0.0] * N] * 4, [[0, 1], [2, 3], [0, 1], [2, 3]]), [1] * 4, [2, 3, 4, 5], [0] * 4))
    assert r.part_information == pytest.approx(math.log(2))
    assert r.class_information == pytest.approx(math.log(2))
    assert r.task_information == pytest.approx(0)


def test_soft_weights_count_as_they_are():
    d = decision([[0.0] * N] * 2, [[0, 1], [0, 1]])
    d.weights[0] = torch.tensor([[0.9, 0.1, 0, 0], [0.5, 0.5, 0, 0]])
    r = count((d, [1, 1], [1, 1], [0, 0]))
    assert r.ess_weights == pytest.approx((1 / 0.82 + 2) / 2)
    assert r.ess_weights_worst == pytest.approx(1 / 0.82)


def test_similarity_of_updates_by_hand():
    adapter = apply_adapter(tiny_model(), AdapterConfig(pool_size=3, active=1, rank=2), seed=0)
    fill_adapter(adapter)
    linear = next(iter(adapter.linears.values()))
    with torch.no_grad():  # LoRA 2 is minus three times LoRA 0
        linear.lora_A[4:6] = 3 * linear.lora_A[0:2]
        linear.lora_B[:, 4:6] = -linear.lora_B[:, 0:2]
    updates = [linear.lora_B[:, 2 * i : 2 * i + 2] @ linear.lora_A[2 * i : 2 * i + 2] for i in range(3)]
    wanted = [[torch.cosine_similarity(a.flatten(), b.flatten(), 0).item() for b in updates] for a in updates]
    found = update_similarity(linear)
    assert torch.allclose(found, torch.tensor(wanted, dtype=torch.float64), atol=1e-5)
    assert found[0, 2] == pytest.approx(-1)


def test_sets_are_counted_in_pools_of_any_size():
    for n in (5, 62, 63, 130):
        active = torch.zeros(4, n, dtype=torch.bool)
        active[:3, [0, n - 1]] = True
        active[3, [0, n - 2]] = True
        assert sorted(_count_sets(active).values()) == [1, 3]


def report_of(*decisions):
    return [count((d, [1] * d.logits.shape[1], [1] * d.logits.shape[1], [0] * d.logits.shape[1])) for d in decisions]


def test_verdicts_name_block_and_reason():
    fine = decision([[0.0] * N] * 4, [[0, 1], [2, 3], [0, 2], [1, 3]])
    fixed = decision([[0.0] * N] * 4, [[0, 1]] * 4)
    soft = decision([[0.0] * N] * 4, [[0, 1], [2, 3], [0, 2], [1, 3]])
    soft.weights = soft.weights * 0 + torch.tensor([1.0, 1e-3, 1e-3, 0.0])
    blocks = report_of(fine, fixed, soft)
    for block, name in zip(blocks, ("m.layers.0.mlp", "m.layers.10.mlp", "m.layers.2.mlp"), strict=True):
        block.name = name
    healthy, words = verdict(blocks[:1], K, Alarm())
    assert healthy
    assert words.startswith("healthy: 1 routers")
    healthy, words = verdict(blocks, K, Alarm())
    assert not healthy
    assert "collapsing in 2 of 3 blocks (2.mlp, 10.mlp)" in words
    assert "one set serves 100 % of the tokens" in words
    assert "effective support of 1.00 of 2" in words
    assert verdict(blocks, K, Alarm(ess=1.0, commonest=1.0, dead=1.0))[1].startswith("collapsing in 1 of 3")
    assert verdict(blocks, N, Alarm())[1].startswith("nothing to route")


def test_training_warns_after_patience_and_once():
    def step(ess, used):
        sums = torch.tensor([[0.0, 0.0, ess * 10, 10.0], [0.0, 0.0, 20.0, 10.0]], dtype=torch.float64)
        return StepRouting(sums, torch.tensor([used, [5.0] * 4], dtype=torch.float64), torch.tensor(1.0))

    watch = Watch(["l.0.mlp", "l.1.mlp"], 2, Alarm(patience=3))
    even, dead = [5.0, 5.0, 5.0, 5.0], [10.0, 0.0, 0.0, 0.0]
    assert [watch.see(step(1.2, even)) is None for _ in range(3)] == [True, True, False]
    assert watch.see(step(1.2, even)) is None  # said already
    assert watch.see(step(2.0, even)) is None  # recovered
    assert [watch.see(step(2.0, dead)) is None for _ in range(3)] == [True, True, False]
    assert "in 1 of 2 blocks (0.mlp)" in Watch(["l.0.mlp", "l.1.mlp"], 2, Alarm(patience=1)).see(step(1.2, even))
    assert Watch(["l.0.mlp", "l.1.mlp"], 4, Alarm(patience=1)).see(step(1.2, even)) is None


def test_step_routing_by_hand():
    """Two micro-batches of one router, masked positions left out, equal their union."""
    logits = torch.tensor([[[[[0.0] * 4, [50.0, 0, 0, 0], [9.0, 9, 9, 9]]]]])  # (1, 1, 1, 3, 4)
    chosen = torch.tensor([[[[[0, 1], [0, 2], [3, 2]]]]])
    weights = torch.tensor([[[[[0.5, 0.5, 0, 0], [0.9, 0, 0.1, 0], [1.0, 0, 0, 0]]]]])
    mask = torch.tensor([[True, True, False]])
    found = StepRouting.add([StepRouting.measure(logits, chosen, weights, mask), StepRouting.none(1, 4, mask.device)])
    summary = found.summary()
    assert summary["router_entropy"] == pytest.approx(math.log(4) / 2)
    assert summary["ess"] == pytest.approx((4 + 1) / 2)
    assert summary["ess_weights"] == pytest.approx((2 + 1 / 0.82) / 2)
    assert summary["ess_weights_worst"] == pytest.approx(1 / 0.82)
    assert summary["dead_loras"] == 1
    assert summary["largest_share"] == 1.0
    assert found.used.tolist() == [[2, 1, 1, 0]]


def test_short_names():
    assert short_name("model.layers.12.mlp") == "12.mlp"
    assert short_name("model.layers.3.self_attn.q_proj") == "3.self_attn.q_proj"
    assert short_name("ffn") == "ffn"


def test_sparklines_keep_the_scale():
    assert sparkline([0.0, 1.0, 2.0], 0.0, 2.0, 10) == "▁▅█"
    assert sparkline([1.0] * 100, 0.0, 2.0, 5) == "▅▅▅▅▅"
    assert sparkline([0, 0, 4, 4], 0.0, 4.0, 2) == "▁█"


def test_route_stats_answers_first_and_writes_what_is_asked(verb, finished, tmp_path):
    out, _ = verb("route-stats", finished, "--plot", tmp_path / "p", "--trace", tmp_path / "t.jsonl")
    assert out.startswith(("healthy: ", "collapsing in "))
    assert (
        max(len(line.rstrip()) for line in out.splitlines() if "written" not in line and "collapsing" not in line) <= 80
    )
    assert {p.name for p in (tmp_path / "p").iterdir()} == {"use.png", "use.svg"}
    lines = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    report = json.loads((finished / "stats" / "routing-adapter.json").read_text())
    assert len(lines) == report["tokens"]
    for block in report["blocks"]:  # the trace and the statistics tell the same
        for i, share in enumerate(block["share"]):
            assert sum(i in line["chosen"][block["name"]] for line in lines) / len(lines) == pytest.approx(share)
    assert {line["part"] for line in lines} == {"prompt", "completion"}
    assert "".join(line["token"] for line in lines if line["row"] == 0).replace(" ", "").startswith("<user>w")


def test_the_page_is_whole_and_loads_nothing(verb, finished, tmp_path):
    verb("route-stats", finished, "--html", tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert not re.search(r"""(src|href)\s*=|url\(|@import|https?://""", text)
    report = json.loads((finished / "stats" / "routing-adapter.json").read_text())
    assert report["verdict"] in text
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.S).group(1))
    assert len(data["rows"]) == 8
    for row in data["rows"]:
        assert len(row["tokens"]) == len(row["sets"]) > row["prompt"] > 0
        assert all(len(sets) == len(report["blocks"]) for sets in row["sets"])


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no browser here")
def test_the_page_works_in_a_browser(verb, finished, tmp_path):
    """The script has run: the tokens of the first block stand there, coloured."""
    verb("route-stats", finished, "--html", tmp_path / "page.html")
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", f"file://{tmp_path}/page.html"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert shown.count('class="tokens"') == 8
    assert "the commonest serves" in shown
    assert len(re.findall(r"background: (hsl|rgb)", shown)) > 20


def test_a_token_cannot_end_the_page_s_script():
    line = {"row": 0, "task": "t", "position": 0, "token": "</script><b>", "part": "prompt", "chosen": {"b": [0, 1]}}
    block = report_of(decision([[0.0] * N] * 2, [[0, 1], [2, 3]]))[0]
    report = {"healthy": True, "verdict": "<i>", "tokens": 2, "rows": 1, "active": K, "pool_size": N, "tasks": ["t"]}
    text = page("<run>", report | {"blocks": [vars(block)]}, None, [line])
    assert "</script><b>" not in text
    assert "&lt;run&gt;" in text
    assert "&lt;i&gt;" in text


def test_route_stats_compares_and_shows_history(verb, finished, tmp_path):
    found = json.loads(verb("route-stats", finished, "--compare", finished, "--json")[0])
    assert found["compared"]["blocks"] == found["blocks"]
    out, _ = verb("route-stats", finished, "--compare", finished)
    assert out.count("0.000") >= 2
    out, _ = verb("route-stats", finished, "--history", "--plot", tmp_path)
    assert "ESS of the weights, mean" in out
    assert (tmp_path / "history.svg").stat().st_size > 1000
    found = json.loads(verb("route-stats", finished, "--history", "--json")[0])["runs"][0]
    assert found["steps"] == [1, 2, 3, 4]
    assert found["values"]["ess_weights"] == pytest.approx([2.0] * 4)
    assert "not a run folder" in verb("route-stats", tmp_path, "--history", expect=5)[1]


def test_route_stats_fails_on_collapse(verb, finished, monkeypatch):
    from remix_cli.diagnostics import view

    # which loads no model, and so could not fail
    assert "--fail-on-collapse" in verb("route-stats", finished, "--history", "--fail-on-collapse", expect=2)[1]
    monkeypatch.setattr(view, "verdict", lambda *_: (False, "collapsing in 1 of 2 blocks (0.mlp): because"))
    assert "error: collapsing in 1 of 2" in verb("route-stats", finished, "--fail-on-collapse", expect=1)[1]
    verb("route-stats", finished)


@pytest.mark.parametrize("flag", [("--limit", 2), ("--data", "x.jsonl"), ("--trace", "t.jsonl"), ("--best",)])
def test_flags_that_history_does_not_read_are_errors(verb, finished, flag):
    assert f"{flag[0]}: is not read with --history" in verb("route-stats", finished, "--history", *flag, expect=2)[1]


def test_runs_are_compared_on_the_same_tokens(finished):
    """Under one tokenizer, and both at their best if one is."""
    from remix_cli.diagnostics import view
    from remix_cli.errors import RecipeError
    from remix_cli.runs import load_run

    first = load_run(finished, best=True)
    request = view.Request(compare_with=finished, best=True)
    assert view._beside(first, request).which == "best"
    first.identity = dataclasses.replace(first.identity, tokenizer_fingerprint="another")
    with pytest.raises(RecipeError, match="has another tokenizer"):
        view._beside(first, request)


def test_task_determined_router_by_hand():
    d = decision([[0.0] * N] * 4, [[0, 1], [0, 1], [2, 3], [2, 3]])
    r = count((d, [1] * 4, [1, 1, 1, 1], [0, 0, 1, 1]))
    assert r.task_information == pytest.approx(math.log(2))
    assert r.token_information == pytest.approx(0)


def test_padding_and_batching_change_nothing():
    logits, chosen = torch.randn(6, N).tolist(), [[0, 1], [1, 2], [2, 3], [0, 3], [1, 3], [0, 2]]
    tokens, tasks = [1, 2, 3, 4, 5, 6], [0, 1, 0, 1, 0, 1]
    whole = count((decision(logits, chosen), [1] * 6, tokens, tasks))
    junk = [[99.0, 0, 0, 0]]
    first = decision(logits[:4] + junk, [*chosen[:4], [0, 1]])
    second = decision(logits[4:], chosen[4:])
    split = count((first, [1] * 4 + [0], [*tokens[:4], 9], [*tasks[:4], 0]), (second, [1, 1], tokens[4:], tasks[4:]))
    assert split.share == whole.share
    assert split.entropy == pytest.approx(whole.entropy)
    assert split.ess_q == pytest.approx(whole.ess_q)
    assert split.tokens == whole.tokens == 6
    assert split.task_information == pytest.approx(whole.task_information)


def test_mutual_information_by_hand():
    assert mutual_information(torch.eye(2)) == pytest.approx(math.log(2))
    assert mutual_information(torch.ones(3, 5)) == pytest.approx(0)
