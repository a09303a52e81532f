"""`remix generate`: one prompt, answered as it is written, and what the routers did for it."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import TextStreamer

from remix_cli.core.trace import Trace
from remix_cli.errors import DataError
from remix_cli.evaluation.generate import Decoding, continue_ids
from remix_cli.models import longest_input
from remix_cli.runs import LoadedRun


class _Stream(TextStreamer):
    """Hands on every piece of text as soon as its words are whole."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write = write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.write(text)


def answer(
    run: LoadedRun, prompt: str, decoding: Decoding, write: Callable[[str], None]
) -> tuple[list[int], list[int]]:
    """Token ids of prompt and answer; the text goes to `write` as it comes.

    The prompt is a user's turn in the run's chat template, or plain text where training used none. Raises DataError.
    """
    ids = run.encoder.question_ids(prompt)
    limit = longest_input(run.model)
    length = len(ids) + run.recipe.virtual_tokens
    if limit is not None and length >= limit:
        raise DataError(f"prompt: has {length} tokens, but the model reads at most {limit}; shorten it")
    if limit is not None and length + decoding.max_new_tokens > limit:
        raise DataError(
            f"--max-new-tokens: {decoding.max_new_tokens} after a prompt of {length}, but the model reads at most "
            f"{limit} tokens; give {limit - length} or fewer"
        )
    with run.adapter.unchanging():
        (new,) = continue_ids([ids], [0], run, decoding, _Stream(run.tokenizer, write))
    return ids, new


@torch.no_grad()
def routed_tokens(run: LoadedRun, prompt: list[int], new: list[int]) -> Iterator[tuple[str, dict[str, list[int]]]]:
    """(text, the LoRAs of each block) of every answered token: those in force when it was the input."""
    ids = torch.tensor([prompt + new], device=run.device)
    given = torch.arange(ids.shape[1], device=run.device).unsqueeze(0) < len(prompt)
    with run.adapter.tracing(Trace(prompt=given)) as trace:
        run.model(input_ids=ids, use_cache=False)
    length = ids.shape[1]
    chosen = {name: d.chosen.expand(1, length, -1)[0].tolist() for name, d in trace.decisions.items()}
    for t in range(len(prompt), length):
        yield run.tokenizer.decode([int(ids[0, t])]), {name: sorted(loras[t]) for name, loras in chosen.items()}
