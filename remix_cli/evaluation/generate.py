"""Batched generation with the KV cache and routed inference: the same text whatever the batch."""

from collections.abc import Iterator, Mapping, Sequence, Sized
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, TopPLogitsWarper

from remix_cli.compat.peft import no_word_of_positions
from remix_cli.compat.transformers import name_of_cache
from remix_cli.core.patch import Adapter
from remix_cli.core.routing import fold, gumbel_noise
from remix_cli.core.trace import Trace
from remix_cli.data.chunks import in_chunks
from remix_cli.errors import DataError
from remix_cli.evaluation.decoding_graphs import fixed_cache, graphed
from remix_cli.models import longest_input
from remix_cli.recipe import Task
from remix_cli.runs import Subject


@dataclass(frozen=True)
class Decoding:
    """Greedy at `temperature` 0, otherwise sampled; ends at the model's end tokens or just after a `stop` text."""

    max_new_tokens: int
    temperature: float = 0.0
    stop: tuple[str, ...] = ()
    seed: int = 0
    selection_seed: int | None = None  # sample the LoRAs, too, instead of taking the top k
    top_p: float = 1.0  # sampled from the likeliest tokens that have this probability together


def check_fits(subject: Subject, task: Task, texts: Sequence[Sized], new: int = 0) -> None:
    """Raises DataError for token ids of a task that, with `new` ones of an answer, the model cannot read at once."""
    limit = longest_input(subject.model)
    front = subject.recipe.virtual_tokens
    longest = max((len(text) for text in texts), default=0)
    if limit is None or front + longest + new <= limit:
        return
    also = f" and {front} virtual tokens" if front else ""
    if front + longest >= limit:
        fix = "ask for fewer shots" if task.shots else "take long rows out"
        raise DataError(
            f"eval task {task.task}: the longest row has {longest} tokens{also}, but the model reads at most {limit}; "
            f"{fix}"
        )
    raise DataError(
        f"eval task {task.task}: max_new_tokens: {new} after a prompt of {longest}{also}, but the model reads at most "
        f"{limit} tokens; lower it"
    )


def generate(
    subject: Subject, prompts: list[list[int]], keys: list[int], decoding: Decoding, batch_size: int
) -> Iterator[tuple[int, str]]:
    """(index, text) for every prompt, longest prompts first.

    Prompts are padded on the left under an attention mask; the text has no special tokens. Whatever is sampled is a
    function of the seed, the prompt's entry in `keys` and the position, not of the batch.
    """

    def work(chunk: list[int]) -> list[str]:
        return _generate([prompts[i] for i in chunk], [keys[i] for i in chunk], subject, decoding)

    for chunk, texts in in_chunks([len(p) for p in prompts], batch_size, work):
        yield from zip(chunk, texts, strict=True)


def _generate(prompts: list[list[int]], keys: list[int], subject: Subject, decoding: Decoding) -> list[str]:
    answers = continue_ids(prompts, keys, subject, decoding)
    return [text_after(subject.tokenizer, prompt, new) for prompt, new in zip(prompts, answers, strict=True)]


def continue_ids(
    prompts: list[list[int]], keys: list[int], subject: Subject, decoding: Decoding, streamer: Any = None
) -> list[list[int]]:
    """New tokens of each prompt, padded to one length; a `streamer` of transformers sees those of a single one."""
    model, tokenizer = subject.model, subject.tokenizer
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    ids, mask = _pad_left(prompts, pad, subject.device)  # (B, T)
    length = ids.shape[1]
    rows = torch.tensor(keys, device=subject.device)
    options: dict[str, Any] = {}
    if decoding.temperature > 0:
        options["logits_processor"] = [_Sampling(decoding, rows, length)]
    if decoding.stop:
        options |= {"stop_strings": list(decoding.stop), "tokenizer": tokenizer}
    cache = None
    if decoding.selection_seed is None:  # selections that are drawn anew for every token cannot be replayed
        cache = fixed_cache(model, len(prompts), length + decoding.max_new_tokens)
    if cache is not None:
        options[name_of_cache(model)] = cache
    with ExitStack() as scope:
        scope.enter_context(torch.compiler.set_stance("force_eager"))  # the cache grows with every token
        scope.enter_context(torch.no_grad())
        scope.enter_context(subject.adapter.unchanging())
        scope.enter_context(_routing(subject, mask, rows, decoding.selection_seed))
        if cache is not None:
            scope.enter_context(graphed(model, cache))
        scope.enter_context(no_word_of_positions())
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=decoding.max_new_tokens,
            do_sample=False,  # sampling is greedy decoding of perturbed scores
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=pad,
            disable_compile=True,
            eos_token_id=_stop_tokens(model, tokenizer),
            streamer=streamer,
            **options,
        )
    return out[:, length:].tolist()


def _pad_left(prompts: list[list[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids (B, T), and a mask (B, T) that is 1 where a prompt stands."""
    length = max(len(prompt) for prompt in prompts)
    ids, mask = [], []
    for prompt in prompts:
        missing = length - len(prompt)
        ids.append([pad] * missing + prompt)
        mask.append([0] * missing + [1] * len(prompt))
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def text_after(tokenizer: Any, prompt: list[int], new: list[int]) -> str:
    """The new tokens' text as it follows the prompt: alone, some tokenizers would drop its leading space."""

    def text(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    end = prompt[-8:]
    before, together = text(end), text(end + new)
    if together.startswith(before):
        return together[len(before) :]
    return text(new)


TOKENS = 1 << 40  # keeps the draws of tokens apart from those of selections, which fold in positions


class _Sampling(LogitsProcessor):
    """Gumbel noise on the scores: their argmax is a draw from the softmax (the Gumbel-max trick)."""

    def __init__(self, decoding: Decoding, rows: Tensor, prompt_length: int):
        self.keys = fold(fold(torch.full_like(rows, decoding.seed), rows), TOKENS)
        self.prompt_length, self.temperature = prompt_length, decoding.temperature
        self.nucleus = TopPLogitsWarper(decoding.top_p) if decoding.top_p < 1 else None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = fold(self.keys, input_ids.shape[1] - self.prompt_length)
        scores = scores.float() / self.temperature
        if self.nucleus is not None:
            scores = self.nucleus(input_ids, scores)
        return scores + gumbel_noise(step, 1, scores.shape[-1])[0]


@contextmanager
def _routing(subject: Subject, mask: Tensor, rows: Tensor, selection_seed: int | None) -> Iterator[None]:
    """Top-k routing, or selections drawn by row and position, which a hook on the model knows at each step."""
    adapter = subject.adapter
    trace = Trace(prompt=mask.bool(), record=False)
    hook = None
    if selection_seed is not None:
        if adapter.config.level == "sequence":
            trace.noise = adapter.noise((selection_seed,), rows, 1)
        else:
            hook = subject.model.register_forward_pre_hook(
                _draw(adapter, trace, mask, rows, selection_seed), with_kwargs=True
            )
    try:
        with adapter.tracing(trace):
            yield
    finally:
        if hook is not None:
            hook.remove()


def _draw(adapter: Adapter, trace: Trace, mask: Tensor, rows: Tensor, seed: int) -> Any:
    """A hook that draws each forward pass's noise by row and position, padding on the left not counted."""
    keys = fold(torch.full_like(rows, seed), rows).unsqueeze(-1)
    positions = mask.cumsum(-1) - 1

    def before(_: Any, args: tuple, kwargs: Mapping[str, Tensor]) -> None:
        nonlocal positions
        length = kwargs["input_ids"].shape[1]  # the prompt, then one token at a time
        trace.noise = gumbel_noise(fold(keys, positions[:, :length]), len(adapter.routers), adapter.config.pool_size)
        positions = positions[:, -1:] + 1

    return before


def _stop_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The tokenizer's end token and whatever else the model's own settings stop at."""
    stops = {tokenizer.eos_token_id}
    more = model.generation_config.eos_token_id
    if isinstance(more, int):
        stops.add(more)
    elif more:
        stops.update(more)
    return sorted(stops)
