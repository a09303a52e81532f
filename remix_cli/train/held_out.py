"""What is measured between training steps: the held-out loss, and if asked for the recipe's tasks on a few rows."""

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from remix_cli.data.rows import EncodedRow
from remix_cli.evaluation.nll import row_losses
from remix_cli.recipe.schema import tasks_while_training
from remix_cli.runs import Subject
from remix_cli.tasks.base import Scorer, Settings
from remix_cli.tasks.registry import task_class


class Evaluation:
    """Measures on every rank its own share of the rows; all ranks get the whole result."""

    def __init__(self, subject: Subject, rows: list[EncodedRow], accelerator: Accelerator):
        self.subject, self.rows, self.accelerator = subject, rows, accelerator
        limit, self.scorers = subject.recipe.train.eval_tasks_limit, dict[str, Scorer]()
        if limit is not None:
            for label, task in tasks_while_training(subject.recipe.eval.tasks):
                settings = Settings(limit=min(limit, task.limit or limit))
                self.scorers[label] = task_class(task.task)(subject, task, settings)

    def measure(self, advance: Callable[[int], None]) -> dict[str, Any]:
        """`eval_loss`, `eval_tokens`, `eval_rows`, and `<task>/<score>` for each task. `advance` hears of rows done."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        size = self.subject.recipe.train.per_device_eval_batch_size
        rows = self.rows[rank::world]
        idle = len(self.rows[::world]) - len(rows) if self.subject.recipe.train.shard_base else 0  # see shard.py
        mine = row_losses(self.subject.model, self.subject.adapter, rows + self.rows[:idle], size, advance)[: len(rows)]
        sums = torch.tensor([[sum(r.nats for r in mine), sum(r.tokens for r in mine)]], dtype=torch.float64)
        nats, tokens = self.accelerator.reduce(sums.to(self.accelerator.device), "sum")[0].tolist()
        found: dict[str, Any] = {
            "eval_loss": nats / tokens,
            "eval_tokens": int(tokens),
            "eval_rows": len(self.rows),
        }
        self.subject.model.eval()
        for label, scorer in self.scorers.items():
            lines: list[tuple[int, dict[str, Any]]] = []
            with self.subject.adapter.unchanging():
                for answer in scorer.run(list(range(len(scorer.keys)))[rank::world]):
                    lines.append(answer)
                    advance(1)
            everything = dict(gather_object(lines)) if world > 1 else dict(lines)
            scores = scorer.scores([everything[i] for i in sorted(everything)])
            found |= {f"{label}/{name}": score.value for name, score in scores.items()}
        return found
