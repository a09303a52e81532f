"""The tasks of `remix eval`: scores, one line per example, and a stamp that says how they were made."""

import json
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

import remix_cli
from remix_cli.data.encode import load_examples
from remix_cli.data.formats import Example
from remix_cli.data.splits import evenly, split_examples
from remix_cli.errors import DataError
from remix_cli.evaluate import gsm8k
from remix_cli.evaluate.generate import generate
from remix_cli.evaluate.nll import mean_loss, row_losses
from remix_cli.recipe import Recipe, Source, Task
from remix_cli.runs import LoadedRun
from remix_cli.storage import write_json, write_text


@dataclass
class TaskResult:
    """Scores of one task; `examples` go to a file of their own. A second task of a kind is `nll-2` and so on."""

    task: str
    scores: dict[str, float]
    count: int
    examples: list[dict[str, Any]]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return {
            "task": self.task,
            "count": self.count,
            "scores": self.scores,
            "seconds": round(self.seconds, 3),
        }


Progress = Callable[[str, int], Any]  # (task, total) -> an object with advance(n)


def evaluate(
    run: LoadedRun, tasks: list[Task], *, base: bool, limit: int | None, progress: Progress
) -> tuple[dict[str, Any], Path]:
    """Score `tasks`, write `eval/<name>.json` and `eval/<name>-<task>.jsonl`, return the report and its path.

    `<name>` is `adapter`, `best`, or for the unadapted model `base`. Raises DataError.
    """
    name = "base" if base else run.which
    results: list[TaskResult] = []
    with run.adapter.disabled() if base else nullcontext():
        for task in tasks:
            examples = task_examples(run.recipe, task, limit or task.limit)
            if not examples:
                raise DataError(f"eval task {task.task}: no rows; give data.validation or a source for the task")
            begun = time.monotonic()
            score = {"nll": _nll, "gsm8k": _gsm8k}[task.task]
            scores, lines = score(run, task, examples, progress)
            same = sum(result.task.split("-")[0] == task.task for result in results)
            label = f"{task.task}-{same + 1}" if same else task.task
            results.append(TaskResult(label, scores, len(lines), lines, time.monotonic() - begun))
    report = {
        "model": name,
        "results": [r.to_dict() for r in results],
        "protocol": _protocol(run, tasks, base) | {"limit": limit},
    }
    for result in results:
        path = run.folder.evaluations / f"{name}-{result.task}.jsonl"
        write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in result.examples))
    target = run.folder.evaluations / f"{name}.json"
    write_json(target, report)
    return report, target


def task_examples(recipe: Recipe, task: Task, limit: int | None = None) -> list[Example]:
    """The task's own rows, or the rows the recipe held out of training; at most `limit`, spread evenly over them."""
    examples = load_examples([task.source])[0] if task.source is not None else split_examples(recipe)[2]
    return evenly(examples, limit) if limit else examples


def override_source(recipe: Recipe, task: Task, path: str | None) -> Task:
    """The task on another file: in the task's own format, or for `nll` in that of the recipe's first source."""
    if path is None:
        return task
    default = Source(path=path, format="gsm8k") if task.task == "gsm8k" else recipe.data.train[0]
    place = {"path": path, "reasoning_gym": None, "subset": None, "limit": None}
    return task.model_copy(update={"source": (task.source or default).model_copy(update=place)})


def _nll(run: LoadedRun, task: Task, examples: list[Example], progress: Progress) -> tuple[dict[str, float], list]:
    """Token-weighted loss over all rows, and the same for each task name."""
    rows = run.encoder.encode_rows(examples).rows
    if not rows:
        raise DataError("eval task nll: no row has a supervised token within data.max_length")
    bar = progress("nll", len(rows))
    losses = row_losses(run.model, run.adapter, rows, run.recipe.eval.batch_size, bar.advance)
    scores = {"loss": mean_loss(losses)}
    scores["perplexity"] = math.exp(min(scores["loss"], 700))
    names = sorted({row.task for row in rows})
    for name in names if len(names) > 1 else []:
        scores[f"loss/{name}"] = mean_loss([x for x, row in zip(losses, rows, strict=True) if row.task == name])
    lines = [
        {"row": i, "task": row.task, "nats": loss.nats, "tokens": loss.tokens}
        for i, (row, loss) in enumerate(zip(rows, losses, strict=True))
    ]
    return scores, lines


def _gsm8k(run: LoadedRun, task: Task, examples: list[Example], progress: Progress) -> tuple[dict[str, float], list]:
    """Greedy generation; a share of exact matches by each of the two readings, and how many answers had `####`."""
    prompts = [run.encoder.prompt_ids(example) for example in examples]
    bar = progress("gsm8k", len(prompts))
    lines: list[dict[str, Any]] = []
    for i, text in generate(
        run.model,
        run.adapter,
        run.tokenizer,
        prompts,
        batch_size=run.recipe.eval.batch_size,
        max_new_tokens=task.max_new_tokens,
    ):
        gold = gsm8k.strict_answer(examples[i].messages[-1]["content"])
        if gold is None:
            raise DataError(f"eval task gsm8k: row {i + 1}: the reference answer has no number after ####")
        strict, flexible = gsm8k.strict_answer(text), gsm8k.flexible_answer(text)
        lines.append(
            {
                "row": i,
                "output": text,
                "gold": str(gold),
                "strict": None if strict is None else str(strict),
                "flexible": None if flexible is None else str(flexible),
                "strict_correct": strict == gold,
                "flexible_correct": flexible == gold,
            }
        )
        bar.advance(1)
    lines.sort(key=lambda line: line["row"])
    share = {key: sum(line[key] for line in lines) / len(lines) for key in ("strict_correct", "flexible_correct")}
    formatted = sum(line["strict"] is not None for line in lines) / len(lines)
    return {
        "strict": share["strict_correct"],
        "flexible": share["flexible_correct"],
        "has_answer": formatted,
    }, lines


def _protocol(run: LoadedRun, tasks: list[Task], base: bool) -> dict[str, Any]:
    return {
        "tasks": [task.model_dump() for task in tasks],
        "decoding": "greedy",
        "shots": 0,
        "routing": "none"
        if base
        else f"top-{run.adapter.config.active} of {run.adapter.config.pool_size} by {run.adapter.config.level}",
        "chat_template": run.encoder.chat,
        "model": run.recipe.model.name_or_path,
        "dtype": run.recipe.model.dtype,
        "base_fingerprint": run.identity.base_fingerprint,
        "versions": {
            "remix": remix_cli.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
