"""Train a routed pool of LoRAs in a loop of your own: plain torch on any transformers decoder.

    python examples/own_training_loop.py

The model here is tiny and random, so that it runs anywhere; put your own in `model` and your rows in `batches`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from remix_cli.core import AdapterConfig, BatchInputs, accumulate_gradients, apply_adapter, make_estimator, plan_passes

SEED = 0


def token_losses(model: nn.Module, ids: Tensor) -> Tensor:
    """(B, T), at the position of the logit; 0 at the last, which has no target. Divided by the number of targets."""
    logits = model(input_ids=ids).logits[:, :-1]
    losses = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
    return F.pad(losses.view(len(ids), -1), (0, 1)) / ids[:, 1:].numel()


def main(steps: int = 60) -> list[float]:
    torch.manual_seed(SEED)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **shape))
    batches = [(torch.arange(12) * (1 + torch.arange(8)[:, None] % 3) + i) % 32 for i in range(4)]  # (8, 12) each

    adapter = apply_adapter(model, AdapterConfig(pool_size=8, active=4, rank=4, router_init_std=1.0), seed=SEED)
    loras = torch.optim.AdamW(adapter.lora_parameters().values(), lr=2e-2, weight_decay=0.0)
    routers = torch.optim.AdamW(adapter.router_parameters().values(), lr=1e-2, weight_decay=0.0)
    passes = plan_passes("rtg", selections=2)  # M = 2 sampled selections for each batch
    estimator = make_estimator("rtg")

    losses = []
    for step in range(steps):
        ids = batches[step % len(batches)]
        # ids of the rows decide what is drawn for them, however the rows are split over batches and processes
        inputs = BatchInputs(rows=torch.arange(len(ids)), mask=torch.ones_like(ids, dtype=torch.bool))
        result = accumulate_gradients(
            adapter, lambda ids=ids: token_losses(model, ids), inputs, passes, estimator, seed=(SEED, step)
        )
        for optimizer in (loras, routers):
            optimizer.step()
            optimizer.zero_grad()
        losses.append(float(result.loss))
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()
