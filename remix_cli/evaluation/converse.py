"""`remix generate` and `remix chat`: answers as they are written, and what the routers did for them.

A conversation is answered through the run's chat template, as it stands at that moment; there is no state of the model
between turns, so an answer can be thrown away, asked for again, or asked of the base model.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from transformers import TextStreamer

from remix_cli.core.trace import Trace
from remix_cli.data.chunks import start_size
from remix_cli.data.formats import ANSWER, Example, Message, RowError
from remix_cli.errors import DataError
from remix_cli.evaluation.generate import Decoding, continue_ids, generate, text_after
from remix_cli.models import longest_input
from remix_cli.runs import LoadedRun

NO_TEMPLATE = (
    "no chat template: a message is its text and a line break, an answer goes on from there up to the end token"
)


class Answer(NamedTuple):
    """Token ids; the new ones with the end token, where there is one."""

    prompt: list[int]
    new: list[int]
    text: str


class _Stream(TextStreamer):
    """Hands on every piece of text as soon as its words are whole."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write = write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.write(text)


@torch.no_grad()
def answer(
    run: LoadedRun, prompt: list[int], decoding: Decoding, write: Callable[[str], None], *, base: bool = False
) -> Answer:
    """Go on from the token ids `prompt`; the text goes to `write` as it comes. `base`: without the adapter.

    Raises DataError if the model cannot read so many tokens.
    """
    check_length(run, prompt, decoding)
    with run.adapter.disabled() if base else nullcontext(), run.adapter.unchanging():
        (new,) = continue_ids([prompt], [0], run, decoding, _Stream(run.tokenizer, write))
    return Answer(prompt, new, text_after(run.tokenizer, prompt, new))


def answers_to(
    run: LoadedRun, examples: list[Example], decoding: Decoding, advance: Callable[[], None], *, base: bool = False
) -> list[str]:
    """To each conversation's last turn, several at once, the same text as one by one. Raises DataError."""
    prompts = []
    for number, example in enumerate(examples, start=1):
        try:
            prompts.append(_ids_of(run, example))
            check_length(run, prompts[-1], decoding)
        except (RowError, DataError) as error:
            raise DataError(f"prompt {number}: {str(error).removeprefix('prompt: ')}") from None
    found = {}
    size = start_size(run.recipe.eval.batch_size, run.device)
    with run.adapter.disabled() if base else nullcontext():
        for index, text in generate(run, prompts, [0] * len(prompts), decoding, size):
            found[index] = text
            advance()
    return [found[index] for index in range(len(examples))]


def _ids_of(run: LoadedRun, example: Example) -> list[int]:
    """What stands in front of the answer; of plain text, all of it. Raises RowError."""
    first = example.messages[0]
    return run.encoder.text_ids(first["content"]) if first["role"] == "text" else run.encoder.prompt_ids(example)


def check_length(run: LoadedRun, prompt: list[int], decoding: Decoding) -> None:
    """Raises DataError if the model cannot read the prompt and `max_new_tokens` more."""
    left = room_after(run, prompt)
    if left is not None and left < decoding.max_new_tokens:
        limit = longest_input(run.model)
        if left <= 0:
            raise DataError(f"prompt: has {len(prompt)} tokens, but the model reads at most {limit}; shorten it")
        raise DataError(
            f"--max-new-tokens: {decoding.max_new_tokens} after a prompt of {len(prompt)}, but the model reads at most "
            f"{limit} tokens; give {left} or fewer"
        )


def room_after(run: LoadedRun, prompt: list[int]) -> int | None:
    """Tokens that the model can add to the prompt; None if there is no limit."""
    limit = longest_input(run.model)
    return None if limit is None else limit - len(prompt) - run.recipe.virtual_tokens


@dataclass
class Conversation:
    """What was said so far, and how it goes on. `seed` grows with every answer, so that another one is another draw."""

    run: LoadedRun
    decoding: Decoding
    system: str | None = None
    turns: list[Message] = field(default_factory=list)
    seed: int = 0

    def begin(self, system: str | None) -> None:
        """Anew."""
        self.system, self.turns = system, []

    def check(self) -> None:
        """Raises DataError if the chat template does not take the system prompt."""
        self._ids([{"role": "user", "content": "."}])

    def ask(self, text: str) -> None:
        """The user's next turn. Raises DataError if the chat template or the model's length does not allow it."""
        turns = [*self.turns, {"role": "user", "content": text}]
        self._room(self._ids(turns))
        self.turns = turns

    def reopen(self) -> bool:
        """Take back the last answer; False if there is none."""
        if not self.turns:
            return False
        if self.turns[-1]["role"] == "assistant":
            self.turns.pop()
        return True

    def reply(self, write: Callable[[str], None], *, base: bool = False) -> Answer:
        """To the last turn, which stays open until `keep`."""
        prompt = self._ids(self.turns)
        new = min(self.decoding.max_new_tokens, self._room(prompt))
        return answer(self.run, prompt, replace(self.decoding, max_new_tokens=new, seed=self.seed), write, base=base)

    def keep(self, found: Answer) -> None:
        """The answer as the conversation's next turn; thinking is kept apart, as chat templates want it."""
        thinking, end, said = found.text.rpartition("</think>")
        turn: Message = {"role": "assistant", "content": said.strip() if end else found.text}
        if end:
            turn["reasoning_content"] = thinking.replace("<think>", "").strip()
        self.turns.append(turn)
        self.seed += 1

    def _ids(self, turns: list[Message]) -> list[int]:
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        try:
            answered = (*system, *turns, {"role": "assistant", "content": ANSWER})
            return self.run.encoder.prompt_ids(Example(answered, "conversation"))
        except RowError as error:
            raise DataError(f"conversation: {error}") from None

    def _room(self, prompt: list[int]) -> int:
        left = room_after(self.run, prompt)
        if left is None:
            return self.decoding.max_new_tokens
        if left <= 0:
            limit = longest_input(self.run.model)
            raise DataError(f"conversation: has {len(prompt)} tokens, and the model reads at most {limit}; begin anew")
        return left


@torch.no_grad()
def routed_tokens(run: LoadedRun, found: Answer) -> Iterator[tuple[str, dict[str, list[int]]]]:
    """(text, the LoRAs of each block) of every answered token: those in force when it was the input."""
    ids = torch.tensor([found.prompt + found.new], device=run.device)
    given = torch.arange(ids.shape[1], device=run.device).unsqueeze(0) < len(found.prompt)
    with run.adapter.tracing(Trace(prompt=given)) as trace:
        run.model(input_ids=ids, use_cache=False)
    length = ids.shape[1]
    chosen = {name: d.chosen.expand(1, length, -1)[0].tolist() for name, d in trace.decisions.items()}
    for t in range(len(found.prompt), length):
        yield run.tokenizer.decode([int(ids[0, t])]), {name: sorted(loras[t]) for name, loras in chosen.items()}
