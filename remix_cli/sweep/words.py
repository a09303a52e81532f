"""What is said before people of scores and numbers: one name for a thing, wherever it stands."""

from collections.abc import Mapping, Sequence

HELD_OUT = "held out"  # as evaluations call the recipe's own held-out rows
UNIT = "nats per token"
HELD_OUT_LOSS = f"held-out loss, {UNIT}"


def metric_in_words(metric: str) -> str:
    """Of what is measured while training, without a unit: `eval_loss` is the held-out loss; others have own names."""
    return "held-out loss" if metric == "eval_loss" else metric


def score_in_words(name: str, rows: Mapping[str, str]) -> str:
    """Of `<task> <score>`; `rows`: what each task's rows are called.

    `held-out loss, nats per token`, `loss on test.jsonl, nats per token`, `arc accuracy (test.jsonl)`.
    """
    task, _, score = name.partition(" ")
    where = rows.get(task)
    if score == "loss" and task.partition("@")[0] == "nll" and where:
        return HELD_OUT_LOSS if where == HELD_OUT else f"loss on {where}, {UNIT}"
    return f"{name} ({where})" if where else name


def how_many(counts: Sequence[int], what: str) -> str:
    """`3 seeds`, `1 to 3 seeds`."""
    said = f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
    return f"{said} {what if said == '1' else f'{what}s'}"
