"""lm-evaluation-harness on a live run: `make lm-eval`, which installs the harness first.

Not part of `make test`, whose environment does not hold the harness; what needs none is in test_harness_scores.py.
"""

import json
import logging

import pytest
import torch
import yaml
from helpers.tiny import recipe_text, write_recipe

pytestmark = pytest.mark.agreement
ROUTERS = {"token": {}, "clusters": {"level": "sequence", "clusters": 3}}
IN_FRONT = {"adapter": {"method": "prompt", "virtual_tokens": 3}}  # by PEFT
WORDS = [f"w{i}" for i in range(30)]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder with a task of likelihoods, one of generation, and one of whole texts; prompts of many lengths."""
    folder = tmp_path_factory.mktemp("tasks")
    generator = torch.Generator().manual_seed(3)

    def words(count):
        return " ".join(WORDS[i] for i in torch.randint(0, 30, (count,), generator=generator).tolist())

    lengths = [3, 11, 5, 8, 2, 14, 7, 4, 9, 6, 12, 3, 10, 5, 13, 8]
    with (folder / "rows.jsonl").open("w") as file:
        for i, length in enumerate(lengths):
            options = [words(1), words(1), words(1 + i % 3), words(4)]
            row = {"question": words(length), "options": options, "right": i % 4, "answer": words(2)}
            file.write(json.dumps(row) + "\n")
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl"), "train": str(folder / "rows.jsonl")}},
        "test_split": "test",
        "fewshot_split": "train",
        "doc_to_text": "{{question}}",
        "metadata": {"version": 2.0},
    }
    mean = {"aggregation": "mean", "higher_is_better": True}
    made = {
        "own_choice": {
            "output_type": "multiple_choice",
            "doc_to_target": "right",
            "doc_to_choice": "{{options}}",
            "metric_list": [{"metric": "acc"} | mean, {"metric": "acc_norm"} | mean],
        },
        "own_answer": {
            "output_type": "generate_until",
            "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": ["?"], "do_sample": False, "max_gen_toks": 8},
            "metric_list": [{"metric": "exact_match"} | mean],
            "filter_list": [{"name": "first-word", "filter": [{"function": "regex", "regex_pattern": r"(\S+)"}]}],
        },
        "own_text": {
            "output_type": "loglikelihood_rolling",
            "doc_to_target": "{{question}}",
            "doc_to_text": "",
            "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
        },
    }
    for name, settings in made.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name} | common | settings))
    return folder


@pytest.fixture(scope="module")
def trained(stage, tmp_path_factory):
    """Finished runs by what routers read, long enough that the adapter matters."""
    from rich.console import Console

    from remix_cli.recipe import load_recipe
    from remix_cli.train.trainer import train

    made = {}

    def run(name):
        if name not in made:
            folder = tmp_path_factory.mktemp("trained")
            more = {"max_steps": 12, "learning_rate": 0.2, "eval_steps": None, "save_steps": None}
            evaluation = {"batch_size": 5}  # so that rows of several lengths are padded together
            recipe = recipe_text(*stage[:2], folder / "run", train=more, eval=evaluation, adapter={"rank": 8})
            if name == "prompt":
                recipe = {key: value for key, value in recipe.items() if key != "router"} | IN_FRONT
            else:
                recipe["router"] |= ROUTERS[name]
            train(load_recipe(write_recipe(folder / "r.yaml", recipe)), Console(quiet=True))
            made[name] = folder / "run"
        return made[name]

    return run


def lines(folder, name):
    return [json.loads(line) for line in (folder / "eval" / name).read_text().splitlines()]


def by_the_harness(exported, tasks, names, batch_size):
    """Samples of an exported folder by task, as `lm_eval --model hf` has them, without any code of ours."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    found = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(exported), "trust_remote_code": True, "device": "cpu", "dtype": "float32"},
        tasks=names,
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        batch_size=batch_size,
        bootstrap_iters=0,
    )
    return {name: sorted(found["samples"][name], key=lambda sample: sample["doc_id"]) for name in names}


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    made = {}

    def folder(verb, name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp("exported") / "hf"
            verb("export", trained(name), "-o", made[name])
        return made[name]

    return folder


def asked(verb, run, tasks, names, *more):
    out, _ = verb("eval", run, "--lm-eval", names, "--lm-eval-path", tasks, "--json", *more)
    return json.loads(out)


@pytest.mark.parametrize("name", ROUTERS)
def test_generation_is_that_of_the_exported_folder(verb, trained, exported, tasks, name):
    """To the last character: padding on the left is no part of a prompt, which decides for its whole answer."""
    run = trained(name)
    asked(verb, run, tasks, "own_answer")
    mine = [line["output"][0][0] for line in lines(run, "adapter-lm-eval-own_answer.jsonl")]
    theirs = by_the_harness(exported(verb, name), tasks, ["own_answer"], 5)["own_answer"]
    assert mine == [sample["resps"][0][0] for sample in theirs]
    asked(verb, run, tasks, "own_answer", "--base")
    base = [line["output"][0][0] for line in lines(run, "base-lm-eval-own_answer.jsonl")]
    assert sum(one != other for one, other in zip(mine, base, strict=True)) > 8, "the adapter must matter"
    filtered = [line["filtered"]["first-word"] for line in lines(run, "adapter-lm-eval-own_answer.jsonl")]
    assert filtered == [sample["filtered_resps"] for sample in theirs]


def test_likelihoods_by_token_are_those_of_the_exported_folder(verb, trained, exported, tasks):
    run = trained("token")
    report = asked(verb, run, tasks, "own_choice,own_text")
    theirs = by_the_harness(exported(verb, "token"), tasks, ["own_choice", "own_text"], 5)
    mine = lines(run, "adapter-lm-eval-own_choice.jsonl")
    for line, sample in zip(mine, theirs["own_choice"], strict=True):
        assert [nats for ((nats, _),) in line["output"]] == pytest.approx([r[0][0] for r in sample["resps"]], abs=1e-4)
        assert [greedy for ((_, greedy),) in line["output"]] == [r[0][1] for r in sample["resps"]]
        assert (line["acc"], line["acc_norm"]) == (sample["acc"], sample["acc_norm"])
    texts = lines(run, "adapter-lm-eval-own_text.jsonl")
    for line, sample in zip(texts, theirs["own_text"], strict=True):
        assert line["output"][0][0] == pytest.approx(sample["resps"][0][0], abs=1e-4)
    choice, text = report["results"]
    assert choice["scores"]["acc"] == sum(sample["acc"] for sample in theirs["own_choice"]) / 16
    aggregates = text["protocol"]["aggregates"]
    for name in ("word_perplexity", "bits_per_byte"):
        low, high = text["intervals"][name]
        assert text["scores"][name] == pytest.approx(aggregates[f"{name},none"])
        assert low < text["scores"][name] < high


def test_likelihoods_by_sequence_are_those_of_the_exported_folder(verb, trained, exported, tasks):
    """Asked in two steps, as in generation, every one: there the context decides.

    The harness asks in one step, in which the folder's routers read context and option together. So its figures are
    ours where both lie in one cluster; alone in its batch, for it has no mask for its padding.
    """
    from remix_cli.export.hf import load_exported

    run = trained("clusters")
    asked(verb, run, tasks, "own_choice")
    mine = lines(run, "adapter-lm-eval-own_choice.jsonl")
    theirs = by_the_harness(exported(verb, "clusters"), tasks, ["own_choice"], 1)["own_choice"]
    model = load_exported(exported(verb, "clusters"), torch.float32).requires_grad_(False)
    tokenizer = tokenizer_of(exported(verb, "clusters"))
    same = other = 0
    for line, sample in zip(mine, theirs, strict=True):
        for ((found, _),), ((stock, _),), (context, option) in zip(
            line["output"], sample["resps"], sample["arguments"], strict=True
        ):
            given, scored = tokenizer.encode(context), tokenizer.encode(option)
            assert found == pytest.approx(in_two_steps(model, given, scored), abs=1e-4)
            if cluster(model, given) == cluster(model, given + scored[:-1]):
                same += 1
                assert found == pytest.approx(stock, abs=1e-4)
            else:
                other += 1
                assert found != pytest.approx(stock, abs=1e-4)
    print(f"clusters: {same} options scored as the harness does, {other} in another cluster with their option")
    assert same > 40


def tokenizer_of(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=True)


@torch.no_grad()
def in_two_steps(model, given, scored):
    """Log-likelihood in nats of token ids after others, which are read first."""
    first = model(input_ids=torch.tensor([given]), use_cache=True)
    logits = [first.logits[0, -1:]]
    if len(scored) > 1:
        second = model(input_ids=torch.tensor([scored[:-1]]), past_key_values=first.past_key_values)
        logits.append(second.logits[0])
    logs = torch.cat(logits).log_softmax(-1)
    return float(logs[range(len(scored)), scored].sum())


@torch.no_grad()
def cluster(model, ids):
    """Which centre each router reads after `ids`, as one tuple."""
    model(input_ids=torch.tensor([ids]))
    kept = model._selection.kept
    return tuple(tuple(gates.flatten().tolist()) for gates in kept.values())


@pytest.mark.parametrize("name", ROUTERS)
def test_the_exported_folder_may_be_asked_here(verb, trained, exported, tasks, name):
    """In one step, as the harness does, but padding takes no part."""
    folder = exported(verb, name)
    asked(verb, folder, tasks, "own_choice,own_answer", "--trust-remote-code")
    theirs = by_the_harness(folder, tasks, ["own_choice", "own_answer"], 1)
    for line, sample in zip(lines(folder, "model-lm-eval-own_choice.jsonl"), theirs["own_choice"], strict=True):
        likely = [nats for ((nats, _),) in line["output"]]
        assert likely == pytest.approx([r[0][0] for r in sample["resps"]], abs=1e-4)
    texts = [line["output"] for line in lines(folder, "model-lm-eval-own_answer.jsonl")]
    assert texts == [sample["resps"] for sample in theirs["own_answer"]]


@pytest.mark.parametrize("name", [*ROUTERS, "prompt"])
def test_answers_are_those_of_our_own_evaluation(verb, trained, tasks, name):
    """The same tokens scored and continued by what the other tasks of `remix eval` use."""
    from remix_cli.data.rows import EncodedRow
    from remix_cli.evaluation.generate import Decoding, generate
    from remix_cli.evaluation.nll import iter_row_losses
    from remix_cli.runs import load_run

    asked(verb, trained(name), tasks, "own_choice,own_answer")
    run = load_run(trained(name))
    questions = [json.loads(line) for line in (tasks / "rows.jsonl").read_text().splitlines()]
    prompts = [run.tokenizer.encode(question["question"]) for question in questions]
    rows = []
    for prompt, question in zip(prompts, questions, strict=True):
        for option in question["options"]:
            ids = torch.tensor(prompt + run.tokenizer.encode(f" {option}"))
            rows.append(EncodedRow(ids.numpy(), (torch.arange(len(ids)) >= len(prompt)).numpy(), "t"))
    scored = {i: -loss.nats for i, loss in iter_row_losses(run.model, run.adapter, rows, 5)}
    found = likely_nats(line["output"] for line in lines(trained(name), "adapter-lm-eval-own_choice.jsonl"))
    assert [nats for options in found for nats in options] == pytest.approx([scored[i] for i in range(64)], abs=1e-4)
    texts = dict(generate(run, prompts, list(range(16)), Decoding(8), 5))
    mine = [line["output"][0][0] for line in lines(trained(name), "adapter-lm-eval-own_answer.jsonl")]
    ours = [texts[i].partition("?")[0] for i in range(16)]
    assert mine == [text.removeprefix(" ") for text in ours]  # the harness decodes an answer alone


@pytest.mark.parametrize("name", ROUTERS)
def test_batches_and_their_padding_change_nothing(trained, tasks, name):
    from remix_cli.evaluation.harness import Asked, evaluate_by_harness, load_tasks
    from remix_cli.runs import load_run
    from remix_cli.tasks.base import Settings

    found = []
    for size in (1, 16):
        run = load_run(trained(name))
        evaluation = run.recipe.eval.model_copy(update={"batch_size": size})
        run.recipe = run.recipe.model_copy(update={"eval": evaluation})
        request = Asked(load_tasks("own_choice,own_answer,own_text", tasks))
        evaluate_by_harness(run, request, Settings(), Silent)
        texts = [line["output"] for line in lines(run.folder.path, "adapter-lm-eval-own_answer.jsonl")]
        likely = [line["output"] for line in lines(run.folder.path, "adapter-lm-eval-own_choice.jsonl")]
        whole = [line["output"] for line in lines(run.folder.path, "adapter-lm-eval-own_text.jsonl")]
        found.append((texts, torch.tensor(likely_nats(likely)), torch.tensor(whole)))
    assert found[0][0] == found[1][0]
    assert torch.allclose(found[0][1], found[1][1], atol=1e-4, rtol=0)
    assert torch.allclose(found[0][2], found[1][2], atol=1e-4, rtol=0)


def likely_nats(likely):
    return [[nats for ((nats, _),) in options] for options in likely]


class Silent:
    def __init__(self, *_):
        pass

    def advance(self, count, value=None):
        pass


def test_results_stand_with_ours_and_are_compared(verb, trained, tasks):
    run = trained("token")
    verb("eval", run, "--task", "nll")
    asked(verb, run, tasks, "own_choice,own_answer", "--base")
    asked(verb, run, tasks, "own_answer")
    report = asked(verb, run, tasks, "own_choice", "--shots", "2", "--limit", "10")
    (result,) = report["results"]
    stamp = result["protocol"]
    assert (result["count"], stamp["shots"], stamp["dataset"], stamp["lm_eval"][:2]) == (10, 2, "json", "0.")
    assert stamp["protocol"] == "lm-eval task, version 2.0"
    out, _ = verb("compare", run / "eval" / "base.json", run, "--json", expect=0)
    assert "other shots" in " ".join(json.loads(out)["skipped"])
    asked(verb, run, tasks, "own_choice")
    stored = json.loads((run / "eval" / "adapter.json").read_text())
    assert {"nll", "lm-eval-own_choice"} <= {result["task"] for result in stored["results"]}
    out, _ = verb("compare", run / "eval" / "base.json", run, "--json")
    compared = json.loads(out)["tasks"]["lm-eval-own_choice"]
    both = [[line["acc"] for line in lines(run, f"{model}-lm-eval-own_choice.jsonl")] for model in ("base", "adapter")]
    difference = (sum(both[1]) - sum(both[0])) / 16
    assert compared["items"] == 16
    assert compared["scores"]["acc"][1]["difference"] == pytest.approx(difference)
    table, _ = verb("eval", run, "--lm-eval", "own_choice", "--lm-eval-path", tasks)
    assert "lm-eval-own_choice" in table
    assert all(len(line) <= 80 for line in table.split("written:")[0].splitlines())


def test_an_interrupted_evaluation_asks_only_for_the_rest(trained, tasks):
    from remix_cli.evaluation.harness import Asked, evaluate_by_harness, load_tasks
    from remix_cli.runs import load_run
    from remix_cli.tasks.base import Settings

    class Interrupting(Silent):
        answered = 0

        def advance(self, count, value=None):
            Interrupting.answered += count
            if Interrupting.answered == 30:
                raise KeyboardInterrupt

    run = load_run(trained("clusters"))
    request = Asked(load_tasks("own_choice,own_answer", tasks))
    evaluate_by_harness(run, request, Settings(), Silent)
    whole = lines(run.folder.path, "adapter-lm-eval-own_choice.jsonl")
    with pytest.raises(KeyboardInterrupt):
        evaluate_by_harness(run, Asked(load_tasks("own_choice,own_answer", tasks)), Settings(), Interrupting)
    kept = run.folder.evaluations / "adapter-lm-eval.partial.jsonl"
    assert len(kept.read_text().splitlines()) == 31  # and what they were made under
    evaluation = evaluate_by_harness(run, Asked(load_tasks("own_choice,own_answer", tasks)), Settings(), Silent)
    assert not kept.exists()
    assert 0 < evaluation.report.results[0].asked < 16
    assert lines(run.folder.path, "adapter-lm-eval-own_choice.jsonl") == whole


def test_a_group_has_a_result_for_each_task_and_a_note(verb, trained, tasks, tmp_path):
    for name in ("own_choice", "own_answer"):
        (tmp_path / f"{name}.yaml").write_text((tasks / f"{name}.yaml").read_text())
    aggregate = [{"metric": "acc", "aggregation": "mean", "weight_by_size": True}]
    group = {"group": "both", "task": ["own_choice", "own_answer"], "aggregate_metric_list": aggregate}
    (tmp_path / "both.yaml").write_text(yaml.safe_dump(group))
    report = asked(verb, trained("token"), tmp_path, "both", "--limit", "5")
    assert [result["task"] for result in report["results"]] == ["lm-eval-own_choice", "lm-eval-own_answer"]
    (note,) = report["notes"]
    assert note.startswith(f"both: acc {report['results'][0]['scores']['acc']:.4f}")


def test_what_cannot_be_asked_is_said_in_one_line(verb, trained, tasks, tmp_path):
    run = trained("token")
    broken = {"output_type": "generate_until", "test_split": "test", "doc_to_text": "{{q}}", "doc_to_target": "x"}
    written = {
        "far_away": broken | {"dataset_path": "somebody/far-away-rows"},
        "gone": broken | {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "/nowhere/rows.jsonl"}}},
        "unsafe": yaml.safe_load((tasks / "own_answer.yaml").read_text()) | {"unsafe_code": True},
    }
    for name, settings in written.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(settings | {"task": name}))

    def said(names, *more):
        _, err = verb("eval", run, "--lm-eval", names, *(more or ["--lm-eval-path", tmp_path]), expect=2)
        assert len(err.splitlines()) == 1, err
        return err

    assert "'somebody/far-away-rows'" in said("far_away")
    assert "/nowhere/rows.jsonl" in said("gone")
    assert "unconfined" in said("unsafe")
    assert "did you mean" in said("arc_eazy", "--limit", "2")


def test_the_harness_chatters_unless_quiet(tmp_path, monkeypatch, capfd):
    import lm_eval.evaluator
    import lm_eval.models.huggingface as models

    from remix_cli.compat.lm_eval import quiet

    monkeypatch.chdir(tmp_path)

    def talk():
        capfd.readouterr()
        list(models.tqdm([1, 2], desc="a bar"))
        logging.getLogger("lm_eval.models").warning("advice")
        lm_eval.evaluator.get_git_commit_hash()
        results = {}
        lm_eval.evaluator.add_env_info(results)
        return capfd.readouterr().err, results

    loud, looked_up = talk()
    assert "a bar" in loud
    assert looked_up
    with quiet():
        assert talk() == ("", {})
    assert talk()[1]


def test_a_model_folder_is_asked_as_well(verb, stage, tasks):
    report = asked(verb, stage[0], tasks, "own_choice", "--lm-eval-chat", "--limit", "4")
    (result,) = report["results"]
    assert report["model"] == "model"
    assert result["protocol"]["chat_template"]
    _, err = verb("eval", stage[0], "--lm-eval", "own_choice", "--selection", "top", "--lm-eval-path", tasks, expect=2)
    assert "--selection" in err


def test_answers_are_sampled_anew(tmp_path):
    from remix_cli.evaluation.answers import open_lines
    from remix_cli.evaluation.harness_model import Answered

    with open_lines(tmp_path, "some", {}) as kept:
        answered = Answered(kept)
        answered.add_partial("generate_until", ("a", {"do_sample": True}), "b")
        answered.add_partial("generate_until", ("a", {"do_sample": False}), "c")
    with open_lines(tmp_path, "some", {}) as kept:
        assert list(Answered(kept).answers.values()) == ["c"]
