"""Train a routed pool of LoRAs in a loop of your own: plain torch on any transformers decoder.

    python examples/own_training_loop.py

The model here is tiny and random, so that it runs anywhere; put your own in `model` and your rows in `batches`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from remix_cli.core import Adapter, AdapterConfig, Trace, apply_adapter
from remix_cli.core.estimators.registry import make_estimator
from remix_cli.core.estimators.rollouts import Rollouts

SELECTIONS = 2  # M, forward passes for each batch
SEED = 0


def token_losses(model: nn.Module, ids: Tensor) -> Tensor:
    """(B, T), at the position of the logit; 0 at the last, which has no target. Divided by the number of targets."""
    logits = model(input_ids=ids).logits[:, :-1]
    losses = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
    return F.pad(losses.view(len(ids), -1), (0, 1)) / ids[:, 1:].numel()


def accumulate_gradients(model: nn.Module, adapter: Adapter, ids: Tensor, step: int) -> float:
    """The LoRAs' gradient by backward passes, the routers' by RLOO from the losses; returns the mean loss."""
    rows = torch.arange(len(ids))  # ids of the rows: they decide the draws, whatever the batch
    traces, losses = [], []
    for sample in range(SELECTIONS):
        noise = adapter.noise((SEED, step, sample), rows, ids.shape[1])
        with adapter.tracing(Trace(noise=noise)) as trace:
            loss = token_losses(model, ids)
        (loss.sum() / SELECTIONS).backward()
        traces.append([trace.decisions[name] for name in adapter.routers])
        losses.append(loss.detach())
    logits = torch.stack([torch.stack([d.logits for d in trace]) for trace in traces]).requires_grad_()
    chosen = torch.stack([torch.stack([d.chosen for d in trace]) for trace in traces])
    everywhere = torch.ones_like(ids, dtype=torch.bool)
    rollouts = Rollouts(logits, chosen, torch.stack(losses), adapter.local, everywhere)
    estimate = make_estimator("rtg").estimate(rollouts, {})
    (slopes,) = torch.autograd.grad(estimate.surrogate, logits)  # (M, routers, B, T, n)
    for i, router in enumerate(adapter.routers.values()):
        lengths = torch.stack([trace[i].length for trace in traces])
        router.add_gradient([trace[i].inputs for trace in traces], slopes[:, i] / lengths)
    return float(torch.stack(losses).sum()) / SELECTIONS


def main(steps: int = 60) -> list[float]:
    torch.manual_seed(SEED)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **shape))
    batches = [(torch.arange(12) * (1 + torch.arange(8)[:, None] % 3) + i) % 32 for i in range(4)]  # (8, 12) each
    adapter = apply_adapter(model, AdapterConfig(pool_size=8, active=4, rank=4, router_init_std=1.0), seed=SEED)
    loras = torch.optim.AdamW(adapter.lora_parameters().values(), lr=2e-2, weight_decay=0.0)
    routers = torch.optim.AdamW(adapter.router_parameters().values(), lr=1e-2, weight_decay=0.0)
    losses = []
    for step in range(steps):
        losses.append(accumulate_gradients(model, adapter, batches[step % len(batches)], step))
        for optimizer in (loras, routers):
            optimizer.step()
            optimizer.zero_grad()
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()
