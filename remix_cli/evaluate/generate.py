"""Batched greedy generation with the KV cache and routed top-k inference."""

from collections.abc import Iterator
from typing import Any

import torch

from remix_cli.adapter.patch import Adapter
from remix_cli.adapter.trace import Trace


def generate(
    model: Any, adapter: Adapter, tokenizer: Any, prompts: list[list[int]], *, batch_size: int, max_new_tokens: int
) -> Iterator[tuple[int, str]]:
    """(index, text) for every prompt, longest prompts first, so that running out of memory shows at once.

    Prompts are padded on the left under an attention mask; the text has no special tokens.
    """
    device = next(model.parameters()).device
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    stops = _stop_tokens(model, tokenizer)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    for start in range(0, len(order), batch_size):
        chunk = order[start : start + batch_size]
        length = max(len(prompts[i]) for i in chunk)
        ids = torch.full((len(chunk), length), pad, dtype=torch.long)
        mask = torch.zeros(len(chunk), length, dtype=torch.long)
        for j, i in enumerate(chunk):
            ids[j, length - len(prompts[i]) :] = torch.tensor(prompts[i])
            mask[j, length - len(prompts[i]) :] = 1
        trace = Trace(prompt=mask.bool().to(device), record=False)
        with torch.no_grad(), adapter.tracing(trace), adapter.unchanging():
            out = model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                pad_token_id=pad,
                eos_token_id=stops,
            )
        texts = tokenizer.batch_decode(out[:, length:].cpu(), skip_special_tokens=True)
        yield from zip(chunk, texts, strict=True)


def _stop_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The tokenizer's end token and whatever else the model's own settings stop at."""
    more = model.generation_config.eos_token_id
    return sorted({tokenizer.eos_token_id, *([more] if isinstance(more, int) else more or [])})
