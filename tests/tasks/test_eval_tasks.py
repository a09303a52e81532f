"""The tasks of `remix eval`: what is asked, how answers are read, and that nothing depends on batches."""

import json
import shutil
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from remix_cli.core.store import TrainedOn
from remix_cli.data.said import digest_of
from remix_cli.data.splits import held_out_examples
from remix_cli.errors import ArtefactError, DataError
from remix_cli.evaluation import evaluator as run
from remix_cli.evaluation.answers import open_lines
from remix_cli.evaluation.generate import check_fits
from remix_cli.evaluation.report import TaskResult
from remix_cli.evaluation.request import requested_tasks
from remix_cli.recipe import Source, Task
from remix_cli.recipe.schema import Adapter
from remix_cli.runs import RunFolder, load_run
from remix_cli.tasks import arc, gsm8k
from remix_cli.tasks.base import Measure, Settings
from remix_cli.tasks.humaneval import load_problems, program_of
from remix_cli.tasks.registry import task_class


@pytest.fixture(scope="module")
def loaded(finished):
    return load_run(finished)


@pytest.fixture
def questions(tmp_path):
    """Four ARC rows over the tiny model's words, options of unequal length."""
    path = tmp_path / "arc.jsonl"
    rows = [
        {
            "question": f"w{i} w{i + 1} ?",
            "choices": {"label": ["A", "B", "C"], "text": [f"w{i + 5}", f"w{i + 6} w3", "w9 w8 w7"]},
            "answerKey": "ABC"[i % 3],
        }
        for i in range(4)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# --- tasks


def test_arc_scores_are_the_options_likelihoods(loaded, questions):
    scorer = task_class("arc")(loaded, Task(task="arc", source=Source(path=str(questions), format="arc")), Settings())
    lines = dict(scorer.run([0, 1, 2, 3]))
    tok, model = loaded.tokenizer, loaded.model
    question = scorer.questions[1]
    for j, option in enumerate(question.options):
        given, answer = tok(f"Question: {question.question}\nAnswer:")["input_ids"], tok(option)["input_ids"]
        with torch.no_grad():
            log_q = model(torch.tensor([given + answer])).logits[0].log_softmax(-1)
        nats = -sum(float(log_q[len(given) - 1 + p, token]) for p, token in enumerate(answer))
        assert lines[1]["nats_text"][j] == pytest.approx(nats, rel=1e-5)
    per_character = [n / len(o) for n, o in zip(lines[1]["nats_text"], question.options, strict=True)]
    assert lines[1]["text_norm"] == "ABC"[int(np.argmin(per_character))]
    assert lines[1]["text"] == "ABC"[int(np.argmin(lines[1]["nats_text"]))]
    assert all(line["gold"] == "ABC"[i % 3] for i, line in lines.items())


def test_arc_letters_are_supervised_alone_and_after_the_shots(loaded, questions):
    source = Source(path=str(questions), format="arc")
    task = Task(task="arc", source=source, shots=2, shots_from=source)
    scorer = task_class("arc")(loaded, task, Settings())
    for rows in scorer.options:  # three by letter, then three by text
        for row in rows:
            assert row.supervised.any()
            assert row.supervised[-1]
            assert row.supervised.sum() == 1 + np.diff(np.flatnonzero(row.supervised)).sum()  # one stretch
    words = loaded.tokenizer.decode(scorer.options[3][0].input_ids)
    assert words.count("<bot>") == 3
    assert [r.supervised.sum() for r in scorer.options[0][:3]] == [1, 1, 1]
    bare = task_class("arc")(loaded, Task(task="arc", source=source), Settings())
    assert scorer.keys != bare.keys
    assert scorer.stamp().data == bare.stamp().data


def test_arc_verdict_by_hand():
    question = arc.Question("q", ["1", "2", "3"], ["aa", "bbbb", "c"], 1)
    line = arc.verdict(question, [3.0, 2.0, 1.0], [4.0, 5.0, 3.0])
    assert (line["letter"], line["text"], line["text_norm"]) == ("3", "3", "2")
    assert (line["letter_correct"], line["text_correct"], line["text_norm_correct"]) == (False, False, True)


PROBLEM = {
    "prompt": 'import math\n\n\ndef helper(x):\n    return x + 1\n\n\ndef f(x):\n    """Square."""\n',
    "entry_point": "f",
    "test": "def check(candidate):\n    assert candidate(2) == 4\n",
}


@pytest.mark.parametrize(
    ("text", "chat", "program"),
    [
        ("    return x * x\n", False, PROBLEM["prompt"] + "    return x * x\n\n"),
        ("    return x * x\n\n\ndef g():\n    pass", False, PROBLEM["prompt"] + "    return x * x\n\n\n"),
        ("    return x * x\nprint(f(2))", False, PROBLEM["prompt"] + "    return x * x\n"),
        ("Sure:\n```python\ndef f(x):\n    return helper(x)\n```\nDone.", True, "def f(x):\n    return helper(x)"),
        ("```\n    return x * x\n```", True, PROBLEM["prompt"] + "    return x * x\n"),
        ("```python\ndef f(x):\n    return 1", True, "def f(x):\n    return 1"),
        ("def f(x):\n    return 3", True, "def f(x):\n    return 3"),
    ],
)
def test_the_program_in_an_answer(text, chat, program):
    found = program_of(text, PROBLEM, chat)
    if program.startswith("def f"):
        assert found.program.endswith(program + "\n")
        assert found.program.startswith("import math\n\n\ndef helper(x):\n    return x + 1\n")
        assert found.program.count("def f(") == 1
    else:
        assert found.program == program
    compile(found.program, "p", "exec")


def test_the_package_has_all_problems():
    problems = load_problems(None)
    assert len(problems) == 164
    assert all(p["prompt"].endswith("\n") for p in problems)


@pytest.mark.parametrize("task", ["nll", "gsm8k", "arc", "humaneval", "reasoning_gym"])
def test_X11_every_task_is_stamped_and_goes_on_after_an_interruption(verb, finished, questions, tmp_path, task):
    """The second half is asked once, the first half not again."""
    source = {"arc": Source(path=str(questions), format="arc")}.get(task)
    if task == "reasoning_gym":
        source = Source(reasoning_gym="chain_sum", size=6)
    subject = load_run(finished)
    one = Task(task=task, source=source, max_new_tokens=None if task in ("nll", "arc") else 4)
    settings = Settings(limit=4, allow_code=True)
    asked = []
    scorer = task_class(task)
    plain = scorer.run

    def stops(self, todo):
        for n, answer in enumerate(plain(self, todo)):
            if n == 2:
                raise KeyboardInterrupt
            asked.append(answer[0])
            yield answer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scorer, "run", stops)
        with pytest.raises(KeyboardInterrupt):
            run.evaluate(subject, [one], settings, _silent)
    (label,) = run.result_labels(subject.recipe, [one])
    partial = finished / "eval" / f"adapter-{label}.partial.jsonl"
    partial.write_bytes(partial.read_bytes() + b'{"item": 3, "torn')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scorer, "run", lambda self, todo: (asked.append(a[0]) or a for a in plain(self, todo)))
        found = run.evaluate(subject, [one], settings, _silent)
    assert sorted(asked) == list(range(4))
    assert not partial.exists()
    (result,) = found.report.results
    assert result.asked == 2
    assert result.count == 4
    lines = [json.loads(line) for line in (finished / "eval" / f"adapter-{label}.jsonl").read_text().splitlines()]
    assert [line["item"] for line in lines] == [0, 1, 2, 3]
    assert all(line["prompt"] for line in lines)
    for score in result.scores.values():
        assert score.low <= score.value <= score.high
    written = json.loads(found.file.read_text())
    (document,) = [one for one in written["results"] if one["task"] == label]
    stamp = document["protocol"]
    assert {"task", "data", "prompt_template", "prompts", "shots", "decoding", "adapter", "versions"} <= stamp.keys()
    assert TaskResult.from_dict(document) == result
    again = run.evaluate(subject, [one], settings, _silent).report.results[0]
    for name, score in again.scores.items():
        assert score.value == pytest.approx(result.scores[name].value, rel=1e-6)  # other batches round differently
    assert again.asked == 4


class _silent:
    def __init__(self, *_):
        pass

    def advance(self, *_):
        pass


def test_an_interrupted_evaluation_of_another_kind_is_not_continued(finished, loaded):
    one = Task(task="gsm8k", max_new_tokens=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gsm8k.Gsm8k, "run", _one_answer_then_stop)
        with pytest.raises(KeyboardInterrupt):
            run.evaluate(loaded, [one], Settings(), _silent)
    other = run.evaluate(loaded, [one.model_copy(update={"max_new_tokens": 4})], Settings(), _silent)
    (result,) = other.report.results
    assert result.asked == result.count == 8


def _one_answer_then_stop(self, todo):
    yield 0, {"flexible_correct": True}
    raise KeyboardInterrupt


def test_scores_agree_with_the_lines(loaded, finished):
    found = run.evaluate(loaded, [Task(task="gsm8k", max_new_tokens=6)], Settings(), _silent)
    lines = [json.loads(line) for line in (finished / "eval" / "adapter-gsm8k.jsonl").read_text().splitlines()]
    strict = sum(line["strict"] == line["gold"] for line in lines) / len(lines)
    assert found.report.results[0].scores["strict"].value == strict


def test_a_report_keeps_the_other_tasks_of_the_same_weights(verb, finished):
    verb("eval", finished, "--task", "nll")
    verb("eval", finished, "--task", "gsm8k")
    report = json.loads((finished / "eval" / "adapter.json").read_text())
    assert {"nll", "gsm8k"} <= {result["task"] for result in report["results"]}


def test_held_out_rows_that_a_package_makes_otherwise_now_are_refused(loaded):
    """Another version of reasoning-gym draws other rows from the same seed."""
    pytest.importorskip("reasoning_gym")
    data = loaded.recipe.data.model_copy(update={"validation": [Source(reasoning_gym="chain_sum", size=4)]})
    recipe = loaded.recipe.model_copy(update={"data": data})
    now = digest_of(held_out_examples(recipe))
    for digest in (now, "of other rows"):
        stored = replace(loaded.stored, trained_on=TrainedOn(held_out=digest))
        with nullcontext() if digest == now else pytest.raises(ArtefactError, match="chain_sum: changed since"):
            task = Task(task="reasoning_gym", max_new_tokens=200)
            task_class("reasoning_gym")(replace(loaded, recipe=recipe, stored=stored), task, Settings())


@pytest.mark.parametrize("how", ["{", "[1]", '{"results": [{"task": "nll"}]}', '{"results": 5}'])
def test_a_damaged_report_is_not_replaced_in_silence(verb, finished, tmp_path, how):
    run = shutil.copytree(finished, tmp_path / "run")
    (run / "eval").mkdir(exist_ok=True)
    (run / "eval" / "adapter.json").write_text(how)
    ask = ["eval", run, "--task", "nll", "--limit", 3]
    assert "adapter.json: was damaged, so the scores of other tasks in it are gone" in " ".join(verb(*ask)[0].split())
    out, err = verb(*ask, "--json")
    assert json.loads(out)["notes"] == []
    assert "damaged" not in err


def test_a_flag_that_the_scored_thing_cannot_heed_is_refused(verb, finished, stage):
    told = verb("eval", finished, "--trust-remote-code", expect=2)[1]
    assert "model.trust_remote_code" in told
    ask = ["eval", stage[0], "--task", "gsm8k", "--data", stage[1]]
    for flags in (["--active", "2"], ["--selection", "sample"], ["--best"], ["--any-base"]):
        assert f"{flags[0]}" in verb(*ask, *flags, expect=2)[1]


def test_an_answer_beyond_the_positions_is_refused(verb, finished):
    """The model has 256; a prompt of these rows 6 tokens."""
    ask = ["eval", finished, "--task", "gsm8k", "--limit", 2]
    err = verb(*ask, "--max-new-tokens", 251, expect=2)[1]
    assert "max_new_tokens: 251 after a prompt of 6, but the model reads at most 256 tokens; lower it" in err
    err = verb("generate", finished, "w1 w2 w7 ?", "--max-new-tokens", 251, expect=2)[1]
    assert "--max-new-tokens: 251 after a prompt of 6, but the model reads at most 256 tokens; give 250 or fewer" in err
    verb("generate", finished, "w1 w2 w7 ?", "--max-new-tokens", 250)


def test_virtual_tokens_count_among_the_positions_of_options(loaded):
    front = Adapter.model_construct(method="prefix", virtual_tokens=250)
    wanted = replace(loaded, recipe=loaded.recipe.model_copy(update={"adapter": front}))
    check_fits(wanted, Task(task="nll"), [[0] * 6])
    with pytest.raises(DataError, match="longest row has 7 tokens and 250 virtual tokens"):
        check_fits(wanted, Task(task="nll"), [[0] * 7])


def test_other_numbers_of_active_loras(loaded):
    """The total weight stays as trained; afterwards everything is as before."""
    router = next(iter(loaded.adapter.routers.values()))
    rule = router.rule
    ids = torch.tensor([[4, 5, 6]])
    plain = loaded.model(ids).logits
    with loaded.adapter.activating(4):
        assert router.rule.active * router.rule.scale == pytest.approx(rule.active * rule.scale)
        assert not torch.allclose(loaded.model(ids).logits, plain)
    assert router.rule == rule
    assert torch.equal(loaded.model(ids).logits, plain)
    with pytest.raises(ValueError, match="between 1 and"), loaded.adapter.activating(5):
        pass


def test_flags_reach_the_tasks(verb, finished, stage):
    rows = stage[1]
    out, _ = verb("eval", finished, "--task", "gsm8k", "--active", "1,4", "--limit", 3, "--json")
    reports = json.loads(out)["reports"]
    assert [r["model"] for r in reports] == ["adapter-k1", "adapter-k4"]
    assert reports[0]["results"][0]["protocol"]["routing"] == "top 1 of 4 by token"
    out, _ = verb("eval", finished, "--task", "gsm8k", "--shots", 2, "--shots-from", rows, "--selection", "sample",
                  "--temperature", 0.5, "--limit", 3, "--json")  # fmt: skip
    (result,) = json.loads(out)["results"]
    assert result["protocol"]["shots"] == 2
    assert result["protocol"]["routing"] == "sampled 2 of 4 by token"
    assert "temperature 0.5" in result["protocol"]["decoding"]
    for wrong, message in (
        (("--active", "0"), "between 1 and 4"),
        (("--active", "two"), "between 1 and 4"),
        (("--selection", "best"), "use top or sample"),
        (("--task", "gsm8k", "--shots", "2"), "shots_from"),
        (("--task", "nll", "--shots", "2", "--shots-from", "x.jsonl"), "without solved examples"),
        (("--samples", "3"), "humaneval"),
        (("--task", "humaneval", "--samples", "3", "--allow-code-execution"), "set temperature"),
        (("--task", "arc"), "give the task a source"),
        (("--task", "reasoning_gym"), "no reasoning_gym source"),
        (("--base", "--active", "1"), "--active: is of an adapter"),
        (("--base", "--selection", "sample"), "--selection sample: is of an adapter"),
        (("--base", "--best"), "--best: is of an adapter"),
        (("--task", "nll", "--temperature", "0.7"), "--temperature: is not read"),
        (("--task", "nll", "--max-new-tokens", "4"), "--max-new-tokens: is not read"),
        (("--task", "gsm8k", "--shots-from", rows), "--shots-from: say with --shots"),
        (("--task", "gsm8k", "--shots", 50, "--shots-from", rows), "asked for, and shots_from has 40"),
        (("--task", "gsm8k", "--shots", 40, "--shots-from", rows), "but the model reads at most 256"),
    ):
        assert message in verb("eval", finished, *wrong, expect=2)[1]


def test_a_kind_names_all_tasks_of_the_kind(finished, stage):
    """It named the last one."""
    recipe = RunFolder(finished).load_recipe()
    source = Source(path=str(stage[1]), format="gsm8k")
    both = [Task(task="gsm8k", max_new_tokens=3), Task(task="gsm8k", max_new_tokens=6, source=source)]
    recipe = recipe.model_copy(update={"eval": recipe.eval.model_copy(update={"tasks": [Task(task="nll"), *both]})})
    assert requested_tasks(recipe, ["gsm8k"], None, {}, None) == both
    hot = requested_tasks(recipe, None, None, {"temperature": 0.5}, None)
    assert [task.temperature for task in hot] == [0, 0.5, 0.5]
    (one,) = requested_tasks(recipe, ["gsm8k"], str(stage[1]), {"max_new_tokens": 4}, None)
    assert one.max_new_tokens == 4


@pytest.mark.parametrize("answer", ["1/2", "3:30", "1e5", "5-6", "1.2.3"])
def test_a_reference_that_is_no_plain_number_is_no_number(answer):
    assert gsm8k.strict_answer(f"#### {answer}") is not None
    assert gsm8k.reference_answer(f"#### {answer}") is None
    assert None not in [gsm8k.reference_answer(f"#### {text}") for text in ("1,200.50", "7 apples", "5%", "9.")]


@pytest.mark.parametrize(
    "task",
    [
        {"task": "nll", "temperature": 0.8},
        {"task": "arc", "max_new_tokens": 8},
        {"task": "gsm8k", "shots_from": {"path": "x.jsonl", "format": "gsm8k"}},
    ],
)
def test_keys_that_a_task_does_not_read_are_errors(task):
    with pytest.raises(ValidationError, match=r"is not read|how many solved examples"):
        Task.model_validate(task)


def test_eval_table_at_80_columns(verb, finished):
    out, _ = verb("eval", finished, "--task", "gsm8k")
    assert "95 % interval" in out
    assert all(len(line.rstrip()) <= 80 for line in out.splitlines() if not line.startswith(("gsm8k:", "written", "/")))


# --- compare


def test_compare_is_paired_and_refuses_what_was_not_asked_the_same(verb, finished):
    verb("eval", finished, "--task", "nll")
    verb("eval", finished, "--task", "nll", "--base")
    base = finished / "eval" / "base.json"
    found = json.loads(verb("compare", base, finished, "--json")[0])
    first, second = found["tasks"]["nll"]["scores"]["loss"]
    assert second["difference"] == pytest.approx(second["value"] - first["value"], rel=1e-9)
    low, high = second["difference_interval"]
    assert low <= second["difference"] <= high
    assert found["runs"][1]["trained_parameters"] > found["runs"][1]["active_parameters"] > 0
    out, _ = verb("compare", base, finished)
    assert "difference" in out
    assert max(map(len, out.splitlines())) <= 80
    other = json.loads(base.read_text())
    other["results"] = [r for r in other["results"] if r["task"] == "nll"]
    base.write_text(json.dumps(other))
    verb("eval", finished, "--task", "nll", "--base", "--limit", 3)
    assert "not asked the same" in verb("compare", base, finished, expect=2)[1]
    for arguments in ((finished, "--base"), (finished,)):
        verb("eval", *arguments, "--task", "gsm8k")
    out, _ = verb("compare", base, finished)
    assert "skipped nll" in out
    assert "gsm8k" in out
    assert "two runs or more" in verb("compare", finished, expect=2)[1]
    assert "no such run folder" in verb("compare", finished, finished / "nothing", expect=5)[1]


def test_X11_a_killed_evaluation_counts_every_item_once(finished, tmp_path):
    """SIGKILL in the middle, from outside; what is on disk parses and the rest is asked once."""
    import shutil
    import subprocess
    import sys

    folder = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(folder / "eval", ignore_errors=True)
    code = (
        "import os, sys\n"
        "from remix_cli.tasks import gsm8k\n"
        "plain = gsm8k.Gsm8k.run\n"
        "def dies(self, todo):\n"
        "    for n, answer in enumerate(plain(self, todo)):\n"
        "        if n == 3: os.kill(os.getpid(), 9)\n"
        "        yield answer\n"
        "gsm8k.Gsm8k.run = dies\n"
        "from remix_cli.cli import main\n"
        f"sys.argv = ['remix', 'eval', {str(folder)!r}, '--task', 'gsm8k']\n"
        "main()"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == -9
    lines = (folder / "eval" / "adapter-gsm8k.partial.jsonl").read_text().splitlines()
    assert len([json.loads(line) for line in lines]) == 1 + 3  # the stamp, and what was answered
    task = next(t for t in load_run(folder).recipe.eval.tasks if t.task == "gsm8k")
    (result,) = run.evaluate(load_run(folder), [task], Settings(), _silent).report.results
    assert (result.asked, result.count) == (5, 8)


@pytest.mark.parametrize("change", ["an answer", "a score", "a line cut short", "another line's place", "no object"])
def test_answers_of_an_interrupted_evaluation_that_were_changed_are_asked_again(tmp_path, change):
    stamp = {"task": "gsm8k"}
    with open_lines(tmp_path, "adapter-gsm8k", stamp) as lines:
        for item in range(4):
            lines.add(item, {"prompt": f"p{item}", "output": "naïve 7", "correct": 0.25})
    partial = tmp_path / "adapter-gsm8k.partial.jsonl"
    written = partial.read_bytes().splitlines(keepends=True)
    forged = {
        "an answer": written[2].replace(b" 7", b" 8"),
        "a score": written[2].replace(b"0.25", b"1.0"),
        "a line cut short": written[2][: written[2].index(b', "correct"')] + b"}\n",
        "another line's place": written[2].replace(b'"item": 1', b'"item": 3'),
        "no object": b"5\n",
    }
    partial.write_bytes(b"".join([*written[:2], forged[change], *written[3:]]))
    with open_lines(tmp_path, "adapter-gsm8k", stamp) as lines:
        assert lines.done == {0: {"item": 0, "prompt": "p0", "output": "naïve 7", "correct": 0.25}}
        for item in range(1, 4):
            lines.add(item, {"prompt": f"p{item}", "output": "7", "correct": 1.0})
        lines.publish()
    final = [json.loads(line) for line in (tmp_path / "adapter-gsm8k.jsonl").read_text().splitlines()]
    assert [line["item"] for line in final] == [0, 1, 2, 3]
    assert "digest" not in final[0]


def test_another_data_set_is_scored_beside_the_runs_own_rows_and_replaces_nothing(verb, finished, tmp_path):
    from helpers.tiny import write_rows

    folder = shutil.copytree(finished, tmp_path / "run")
    verb("eval", folder, "--task", "nll")
    own = json.loads((folder / "eval" / "adapter.json").read_text())["results"][0]
    answers = (folder / "eval" / "adapter-nll.jsonl").read_bytes()
    other = write_rows(tmp_path / "test.jsonl", 5, seed=9)
    verb("eval", folder, "--task", "nll", "--data", other)
    (tmp_path / "elsewhere").mkdir()
    third = write_rows(tmp_path / "elsewhere" / "test.jsonl", 6, seed=10)
    out, _ = verb("eval", folder, "--task", "nll", "--data", third)
    results = {r["task"]: r for r in json.loads((folder / "eval" / "adapter.json").read_text())["results"]}
    assert results["nll"] == own
    assert (folder / "eval" / "adapter-nll.jsonl").read_bytes() == answers
    assert results["nll@test"]["count"] == 5
    (same_name,) = set(results) - {"nll", "nll@test"} - {t for t in results if not t.startswith("nll")}
    assert same_name.startswith("nll@test-")
    assert results[same_name]["count"] == 6
    assert same_name in out
    verb("eval", folder, "--task", "nll", "--data", other, "--base")
    assert "nll@test" in verb("compare", folder / "eval" / "base.json", folder)[0]


def test_a_model_folder_is_evaluated_like_the_base_of_a_run(verb, finished, stage, tmp_path):
    import shutil

    model = shutil.copytree(stage[0], tmp_path / "model")
    verb("eval", model, "--task", "gsm8k", "--data", stage[1], "--limit", 5, "--max-new-tokens", 200)
    verb("eval", finished, "--task", "gsm8k", "--data", stage[1], "--limit", 5, "--base")
    theirs, ours = (f / "eval" / n for f, n in ((model, "model-gsm8k@rows.jsonl"), (finished, "base-gsm8k@rows.jsonl")))
    assert [json.loads(a)["prompt"] for a in theirs.read_text().splitlines()] == [
        json.loads(b)["prompt"] for b in ours.read_text().splitlines()
    ]
    assert "say what to score" in verb("eval", model, expect=2)[1]
    verb("compare", model, finished / "eval" / "base.json", expect=2)  # another number of new tokens


@pytest.mark.parametrize(("name", "refused"), [("countdown", True), ("n_queens", True), ("chain_sum", False)])
def test_verifiers_that_run_answers_as_code_are_not_used(name, refused, tmp_path):
    from remix_cli.errors import DataError
    from remix_cli.tasks.reasoning_gym import Verifier

    source = Source(reasoning_gym=name, size=2)
    if refused:
        with pytest.raises(DataError, match="runs answers as code"):
            Verifier(source)
    else:
        verifier = Verifier(source)
        assert verifier.score(0, f"<answer>{verifier.entries[0]['answer']}</answer>") == 1.0
        assert verifier.score(0, f"__import__('os').system('touch {tmp_path}/x')") < 1
        assert not list(tmp_path.iterdir())


def test_answers_of_any_characters_are_kept_and_compared(verb, finished, monkeypatch):
    odd = "a\u2028b\u0085c\ud800"

    def answer(self, todo):
        for i in todo:
            yield i, {"output": odd, "gold": "1", "strict": None, "strict_correct": False, "flexible_correct": i == 0}

    monkeypatch.setattr(gsm8k.Gsm8k, "run", answer)
    verb("eval", finished, "--task", "gsm8k", "--base")
    verb("eval", finished, "--task", "gsm8k")
    found = json.loads(verb("compare", finished / "eval" / "base.json", finished, "--json")[0])
    assert found["tasks"]["gsm8k"]["scores"]["flexible"][1]["difference"] == 0
    lines = (finished / "eval" / "adapter-gsm8k.jsonl").read_text().split("\n")
    assert json.loads(lines[0])["output"] == odd


def test_samples_of_one_problem_are_one_item_in_comparisons():
    from remix_cli.evaluation.evaluated import parts_of_lines

    lines = [{"correct": c} for c in (1, 0, 1, 1, 0, 0)]
    assert parts_of_lines(lines, Measure("pass@1", "correct"), 2).tolist() == [[1, 2, 0], [2, 2, 2]]


def test_text_keeps_the_space_that_follows_the_prompt():
    """As with sentencepiece's decoders, which drop the space a text begins with."""
    from remix_cli.evaluation.generate import text_after

    class Tokenizer:
        pieces = ("def", " f", "\n   ", " return")

        def decode(self, ids, **_):
            return "".join(self.pieces[i] for i in ids).removeprefix(" ")

    assert text_after(Tokenizer(), [0, 1], [3, 1]) == " return f"
    assert text_after(Tokenizer(), [0], []) == ""
