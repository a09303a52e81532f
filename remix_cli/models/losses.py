"""Losses of a causal model, at supervised positions only."""

from typing import Any

from torch import Tensor, nn

from remix_cli.compat.transformers import one_sequence_a_row
from remix_cli.cross_entropy import token_losses
from remix_cli.data.batches import Batch


def batch_losses(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy in nats at each logit's position, (B, T) float32, 0 where nothing is supervised; weighted, if the
    batch is."""
    losses = token_losses(supervised_logits(model, batch), batch.targets)  # (S,)
    if batch.weights is not None:
        losses = losses * batch.weights
    return at_positions(losses, batch.positions, batch.input_ids)


def at_positions(losses: Tensor, positions: Tensor, like: Tensor) -> Tensor:
    """Losses (S,) in their places among those of `like` (B, T), which `positions` (S,) counts by rows; 0 elsewhere."""
    flat = losses.new_zeros(like.numel()).index_put((positions,), losses)  # (B * T,)
    return flat.view(like.shape)


def supervised_logits(model: nn.Module, batch: Batch) -> Tensor:
    """Logits at the batch's S supervised positions, (S, V)."""
    with one_sequence_a_row():
        return logits_at(model, batch.positions, input_ids=batch.input_ids, use_cache=False)


def logits_at(model: nn.Module, positions: Tensor, *, input_ids: Tensor, **inputs: Any) -> Tensor:
    """Logits at `positions` (S,) of input_ids (B, T), counted row by row, (S, V).

    The output layer sees these positions only: its input is gathered on the way in, so that the (B, T, V) logits
    never exist, while the model's own code before and after it stays in charge.
    """
    head: Any = model.get_output_embeddings()  # type: ignore[operator]

    def gather(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        hidden = args[0]  # (B, front + T, D)
        width = input_ids.shape[1]
        front = hidden.shape[1] - width  # virtual tokens that the method has put in front
        places = positions
        if front:
            places = places + (places // width + 1) * front
        return (hidden.flatten(0, 1).index_select(0, places).unsqueeze(0),)  # (1, S, D)

    hook = head.register_forward_pre_hook(gather)
    try:
        return model(input_ids=input_ids, **inputs).logits[0]
    finally:
        hook.remove()
