"""Agreement with an independent implementation, lm-evaluation-harness: `make agreement DATA=FOLDER`.

Not part of `make test`: it needs the extra `lm-eval`, ARC-Challenge and GSM8K as local files, and some minutes.
"""

import json
import os
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.agreement
DATA = Path(os.environ.get("REMIX_DATA", "data"))
ITEMS = 200


@pytest.fixture(scope="module")
def subject(demo_model, tmp_path_factory):
    """The demo model under a routed adapter that changes what it says."""
    from remix_cli.core.config import AdapterConfig
    from remix_cli.core.patch import apply_adapter
    from remix_cli.data.encode import Encoder
    from remix_cli.models import load_model, load_tokenizer
    from remix_cli.recipe import Recipe
    from remix_cli.runs import Subject

    recipe = Recipe(
        model={"name_or_path": str(demo_model), "dtype": "float32"},
        data={"train": [{"path": str(DATA / "gsm8k" / "train.jsonl"), "format": "gsm8k"}]},
        output_dir=str(tmp_path_factory.mktemp("run")),
    )
    model, tokenizer = load_model(recipe.model, torch.device("cpu")), load_tokenizer(recipe.model)
    adapter = apply_adapter(model, AdapterConfig(), seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in adapter.parameters().items():
        if name.endswith("lora_B"):
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.01)
    return Subject(recipe, model, tokenizer, adapter, Encoder(tokenizer, 512, None))


@pytest.mark.parametrize("adapted", [False, True])
def test_arc_choices_are_those_of_lm_eval(subject, adapted):
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    from remix_cli.recipe import Source, Task
    from remix_cli.tasks.base import Settings
    from remix_cli.tasks.registry import task_class

    path = DATA / "arc_challenge" / "test.jsonl"
    task = {
        "task": "arc_local",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "{{choices.label.index(answerKey)}}",
        "doc_to_choice": "{{choices.text}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }

    def both():
        theirs = lm_eval.simple_evaluate(
            model=HFLM(pretrained=subject.model, tokenizer=subject.tokenizer, batch_size=16),
            tasks=[task],
            limit=ITEMS,
            bootstrap_iters=0,
        )["samples"]["arc_local"]
        source = Source(path=str(path), format="arc", limit=ITEMS)
        scorer = task_class("arc")(subject, Task(task="arc", source=source), Settings())
        ours = dict(scorer.run(list(range(ITEMS))))
        return sorted(theirs, key=lambda sample: sample["doc_id"]), ours

    if adapted:
        theirs, ours = both()
    else:
        with subject.adapter.disabled():
            theirs, ours = both()
    same = same_norm = 0
    for i, sample in enumerate(theirs):
        logs = [float(pair[0]) for pair in sample["filtered_resps"]]
        assert ours[i]["nats_text"] == pytest.approx([-x for x in logs], abs=2e-3)
        labels, texts = sample["doc"]["choices"]["label"], sample["doc"]["choices"]["text"]
        same += ours[i]["text"] == labels[logs.index(max(logs))]
        normed = [x / len(text) for x, text in zip(logs, texts, strict=True)]
        same_norm += ours[i]["text_norm"] == labels[normed.index(max(normed))]
        assert bool(sample["acc"]) == ours[i]["text_correct"]
    print(f"agreement: acc {same}/{ITEMS}, acc_norm {same_norm}/{ITEMS}")
    assert min(same, same_norm) >= 0.995 * ITEMS


def lm_eval_verdicts(outputs: list[str], answers: list[str]) -> dict[str, list[bool]]:
    """Strict and flexible verdicts of the harness's own gsm8k task."""
    import lm_eval.tasks
    import yaml
    from lm_eval.api.metrics import exact_match_hf_evaluate
    from lm_eval.filters.extraction import RegexFilter

    text = (Path(lm_eval.tasks.__file__).parent / "gsm8k" / "gsm8k.yaml").read_text()
    config = yaml.safe_load(text)
    options = {k: v for k, v in config["metric_list"][0].items() if k.startswith(("ignore", "regexes"))}
    found = {}
    for entry in config["filter_list"]:
        regex = {k: v for k, v in entry["filter"][0].items() if k != "function"}
        picked = [r[0] for r in RegexFilter(**regex).apply([[o] for o in outputs], [{}] * len(outputs))]
        found[entry["name"]] = [
            bool(exact_match_hf_evaluate(predictions=[p], references=[a], **options)["exact_match"])
            for p, a in zip(picked, answers, strict=True)
        ]
    return found


def test_gsm8k_verdicts_are_those_of_lm_eval():
    """On the reference answers, mutated as models do; and on REMIX_ANSWERS, a file of `remix eval`, if given."""
    from remix_cli.tasks.gsm8k import flexible_answer, strict_answer

    rows = [json.loads(line) for line in (DATA / "gsm8k" / "test.jsonl").read_text().splitlines()][:ITEMS]
    answers = [row["answer"] for row in rows]
    mutate = [
        lambda text, gold: text,
        lambda text, gold: text.replace("####", "The answer is"),
        lambda text, gold: text.split("####")[0],
        lambda text, gold: f"So it is ${gold}.\n#### ${gold}",
        lambda text, gold: f"#### {gold} dollars, 3 of them",
        lambda text, gold: f"#### {int(gold.replace(',', '')) + 1}",
        lambda text, gold: f"#### -{gold}",
        lambda text, gold: "I do not know",
    ]
    outputs = [mutate[i % 8](text, text.split("#### ")[1]) for i, text in enumerate(answers)]
    given = os.environ.get("REMIX_ANSWERS")
    if given:
        lines = [json.loads(line) for line in Path(given).read_text().splitlines()]
        outputs += [line["output"] for line in lines]
        answers += [f"#### {line['gold']}" for line in lines]
    theirs = lm_eval_verdicts(outputs, answers)
    for name, read in (("strict-match", strict_answer), ("flexible-extract", flexible_answer)):
        ours = [read(o) == strict_answer(a) for o, a in zip(outputs, answers, strict=True)]
        everything = zip(outputs, answers, ours, theirs[name], strict=True)
        different = [(o[-60:], a[-12:], x, y) for o, a, x, y in everything if x != y]
        print(f"{name}: {len(outputs) - len(different)}/{len(outputs)} agree", different[:6])
        assert len(different) <= 0.005 * len(outputs)
