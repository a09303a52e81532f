"""Can this base model be trained on, and how much does it read at once."""

from typing import Any

import torch
from torch import Tensor, nn

from remix_cli.errors import ArtefactError, RecipeError, is_out_of_memory, shortened


@torch.no_grad()
def check_base(model: nn.Module, vocabulary: int) -> None:
    """Refuse a base model that cannot be trained on. Raises RecipeError, or ArtefactError for damaged weights."""
    rows = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
    if vocabulary > rows:
        raise RecipeError(
            f"model.name_or_path: the tokenizer has {vocabulary} tokens, the model embeds {rows}; "
            "resize the model's embeddings or use its own tokenizer"
        )
    try:
        causal = is_causal(model, vocabulary)
        model.train()  # some code then wants rows of one length, or more than tokens
        model(input_ids=_plain_ids(model, vocabulary), use_cache=False)
    except Exception as error:  # of whatever code a model brings
        if is_out_of_memory(error):
            raise
        said = shortened(f"{type(error).__name__}: {error}", 200)
        raise RecipeError(f"model.name_or_path: the base model's own code fails on a plain batch: {said}") from error
    finally:
        model.eval()
    if causal:
        return
    for name, parameter in model.named_parameters():  # logits that are not finite are not equal either
        if not torch.isfinite(parameter).all():
            raise ArtefactError(f"model.name_or_path: the base model's {name} holds non-finite values")
    raise RecipeError("model.name_or_path: later tokens change earlier logits; remix trains causal models only")


@torch.no_grad()
def is_causal(model: nn.Module, vocabulary: int) -> bool:
    """Do earlier logits ignore later tokens? Reward-to-go credit and unmasked right padding rest on it."""
    ids = _plain_ids(model, vocabulary)
    changed = ids.clone()
    changed[0, -1] = (ids[0, -1] + 1) % vocabulary
    before = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
    after = model(input_ids=changed, use_cache=False).logits[0, :-1].float()
    return bool((before - after).norm() <= 1e-3 * before.norm())  # some kernels round by what else is in the batch


def _plain_ids(model: nn.Module, vocabulary: int) -> Tensor:
    """(1, 8) token ids of no meaning."""
    device = next(model.parameters()).device
    return torch.arange(8, device=device).remainder(vocabulary).unsqueeze(0)


def longest_input(model: Any) -> int | None:
    """How many tokens the model was made to read at once; None where its config does not say, or says -1."""
    length = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if length is None or length <= 0:
        return None
    return length
