"""nll: nats per supervised token of any rows, and perplexity; the same for each task name."""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from remix_cli.errors import DataError
from remix_cli.tasks.base import Line, Measure, Scorer, key_of

if TYPE_CHECKING:
    from remix_cli.evaluation.statistics import Score


class HeldOutLoss(Scorer):
    name = "nll"
    measures = (
        Measure("loss", "nats", "tokens", lower_is_better=True, share=False, by_task=True),
        Measure("perplexity", lower_is_better=True, share=False),
    )
    headline = "mean_nats"
    takes_shots = False
    any_rows = True

    def load(self) -> None:
        examples = self.examples()
        self.rows = self.encoder.encode_rows(examples).rows
        if examples and not self.rows:
            raise DataError("eval task nll: no row has a supervised token within data.max_length")
        self.data = [list(example.messages) for example in examples]
        self.keys = [key_of(row.input_ids, row.supervised) for row in self.rows]

    def run(self, todo: list[int]) -> Iterator[tuple[int, Line]]:
        rows = [self.rows[i] for i in todo]
        for j, loss in self.row_losses(rows, todo):
            line = {"task": rows[j].task, "nats": loss.nats, "tokens": loss.tokens}
            yield todo[j], line | {"mean_nats": loss.nats / loss.tokens}

    def scores(self, lines: list[Line]) -> dict[str, "Score"]:
        from remix_cli.evaluation.statistics import Score

        found = super().scores(lines)
        loss = found.pop("loss")
        value, low, high = (math.exp(min(nats, 700)) for nats in (loss.value, loss.low, loss.high))
        perplexity = Score(value, low, high, loss.count, share=False)
        return {"loss": loss, "perplexity": perplexity} | found
