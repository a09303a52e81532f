"""The tasks by name. Everything else about a task stands in its own file."""

import pkgutil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from remix_cli.tasks.base import Scorer

TASKS = {
    "nll": "remix_cli.tasks.held_out_loss:HeldOutLoss",
    "exact_match": "remix_cli.tasks.exact_match:ExactMatch",
    "choice": "remix_cli.tasks.choice:Choice",
    "gsm8k": "remix_cli.tasks.gsm8k:Gsm8k",
    "arc": "remix_cli.tasks.arc:Arc",
    "humaneval": "remix_cli.tasks.humaneval:HumanEval",
    "reasoning_gym": "remix_cli.tasks.reasoning_gym:ReasoningGym",
}


def task_class(name: str) -> "type[Scorer]":
    """Raises KeyError for a name that is not in `TASKS`."""
    return pkgutil.resolve_name(TASKS[name])


def task_classes() -> "dict[str, type[Scorer]]":
    return {name: task_class(name) for name in TASKS}
