"""lm-evaluation-harness: chatter, and what it looks up unasked."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any


@contextmanager
def quiet() -> Iterator[None]:
    """Context: lm-evaluation-harness shows no bars, logs errors only, and does not look into the machine.

    It advises against what is meant (a model that is loaded already: models/huggingface.py, `HFLM.__init__`), logs a
    line for every default that a task relies on (api/task.py), and draws bars on stderr even where that is no terminal
    (api/task.py, `build_all_requests`; models/huggingface.py, `loglikelihood`), where ours stand. `simple_evaluate` of
    evaluator.py ends by calling git in the current folder, which complains where it finds no repository, and by making
    a list of all packages and devices, which takes seconds. Nothing of this has an option. Seen with lm-eval 0.4.13.
    """
    import lm_eval.evaluator
    import lm_eval.models.huggingface  # noqa: F401  and with both whatever draws bars

    logger = logging.getLogger("lm_eval")
    before = logger.level
    replaced: list[tuple[ModuleType, str, Any]] = []
    for name, module in list(sys.modules.items()):
        if not name.startswith("lm_eval."):
            continue
        if "tqdm" in vars(module):
            replaced.append((module, "tqdm", _hidden(vars(module)["tqdm"])))
        if name == "lm_eval.evaluator":
            replaced.append((module, "get_git_commit_hash", lambda: None))
            replaced.append((module, "add_env_info", lambda results: None))
    originals = [(module, name, getattr(module, name)) for module, name, _ in replaced]
    logger.setLevel(logging.ERROR)
    for module, name, value in replaced:
        setattr(module, name, value)
    try:
        yield
    finally:
        logger.setLevel(before)
        for module, name, value in originals:
            setattr(module, name, value)


def _hidden(tqdm: Any) -> Any:
    """`tqdm`, whose bars are never drawn."""

    def bar(*args: Any, **options: Any) -> Any:
        return tqdm(*args, **options | {"disable": True})

    return bar
