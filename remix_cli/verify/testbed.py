"""A tiny decoder with a routed adapter, and rollouts on it whose selections are prescribed or drawn."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from remix_cli.core.config import AdapterConfig, Level
from remix_cli.core.estimators.registry import make_estimator
from remix_cli.core.estimators.rollouts import Rollouts, TopPass
from remix_cli.core.patch import apply_adapter
from remix_cli.core.trace import Trace
from remix_cli.data.batches import collate
from remix_cli.data.rows import EncodedRow
from remix_cli.models import batch_losses


@dataclass
class Rollout:
    """One pass, or a stack of S of them along a leading dimension. T is 1 when routing by sequence."""

    losses: Tensor  # (S, B, T)
    logits: Tensor  # (S, L, B, T, n)
    chosen: Tensor  # (S, L, B, T, k)
    h: Tensor  # dL/dz, (S, L, B, T, n)
    directions: Tensor  # x / ||x||, (S, L, B, T, D)

    def __getitem__(self, index: Tensor) -> "Rollout":
        return Rollout(
            self.losses[index], self.logits[index], self.chosen[index], self.h[index], self.directions[index]
        )


class Testbed:
    """A random two-layer Llama with LoRAs on gate, up and down; `strength` is about |omega B A x| / |W x|.

    `routed` narrows the adapter to layers by a regular expression. `lengths` are the rows' lengths, padded on
    the right to the longest; the first third of each row is a prompt without targets.
    """

    def __init__(
        self,
        *,
        n: int,
        k: int,
        hidden: int,
        lengths: list[int],
        strength: float,
        dtype: torch.dtype,
        rank: int = 1,
        routed: str = r"\d",
        level: Level = "token",
        seed: int = 0,
    ):
        torch.manual_seed(seed)
        config = LlamaConfig(  # type: ignore[call-arg]  # it hands what it does not name on to its base class
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=2,
            vocab_size=32,
            num_attention_heads=2,
            num_key_value_heads=1,
            initializer_range=hidden**-0.5,
            attn_implementation="eager",
        )
        model: Any = LlamaForCausalLM(config)
        self.model = model.to(dtype)
        targets = rf".*layers\.{routed}\.mlp\..*_proj"
        pool = AdapterConfig(pool_size=n, active=k, rank=rank, target_modules=(targets,), level=level)
        self.adapter = apply_adapter(self.model, pool, seed=seed)
        self.routers = list(self.adapter.routers.values())
        for part in [*self.adapter.linears.values(), *self.routers]:
            part.to(dtype)
        for name, parameter in self.adapter.parameters().items():
            if not name.endswith("lora_A"):
                torch.nn.init.normal_(parameter, std=1.0 if name.endswith("router") else strength)
        random = np.random.default_rng(seed)
        rows = []
        for length in lengths:
            ids = random.integers(0, 32, length).astype(np.int32)
            rows.append(EncodedRow(ids, np.arange(length) >= max(1, length // 3), "t"))
        self.batch = collate(rows)
        self.local = self.adapter.local

    @property
    def mask(self) -> Tensor:
        """Where decisions stand: (B, T), or (B, 1) when routing by sequence."""
        if self.adapter.config.level == "sequence":
            return self.batch.mask.any(-1, keepdim=True)
        return self.batch.mask

    def rollout(self, noise: Tensor) -> Rollout:
        """One pass whose routers take the top k of logits + noise, (L, B, T, n), with its backward pass."""
        trace = Trace(noise=noise, selection_grad=True, prompt=self.batch.prompt)
        with self.adapter.tracing(trace):
            losses = batch_losses(self.model, self.batch) / len(self.batch.targets)
        losses.sum().backward()
        if self.adapter.config.level == "sequence":
            losses = losses.sum(-1, keepdim=True)
        decisions = [trace.decisions[r.name] for r in self.routers]
        gradients = [d.weights.grad for d in decisions]
        return Rollout(
            losses.detach(),
            torch.stack([d.logits for d in decisions]),
            torch.stack([d.chosen for d in decisions]),
            torch.stack([g for g in gradients if g is not None]) * self.adapter.config.scale,
            torch.stack([d.inputs / d.length for d in decisions]),
        )

    def top_rollout(self) -> Rollout:
        """The pass under the top k."""
        return self.rollout(torch.zeros(len(self.routers), *self.mask.shape, self.adapter.config.pool_size))

    def surrogate(
        self, logits: Tensor, r: Rollout, estimator: str, beta: float, one_backward: bool, top: Rollout | None = None
    ) -> Tensor:
        """What training differentiates, for M stacked rollouts, and with `top` a pass under the top k beside them."""
        selection_gradients = r.h[:1] if one_backward else r.h
        top_pass = None
        if top is not None:
            selection_gradients = top.h[None]
            top_pass = TopPass(top.logits, top.chosen, top.losses)
        rollouts = Rollouts(
            logits=logits,
            chosen=r.chosen,
            losses=r.losses,
            local=self.local,
            mask=self.mask,
            selection_gradients=selection_gradients,
            top=top_pass,
        )
        return make_estimator(estimator).estimate(rollouts, {"beta": beta}).surrogate


def stack(rollouts: list[Rollout]) -> Rollout:
    return Rollout(
        torch.stack([r.losses for r in rollouts]),
        torch.stack([r.logits for r in rollouts]),
        torch.stack([r.chosen for r in rollouts]),
        torch.stack([r.h for r in rollouts]),
        torch.stack([r.directions for r in rollouts]),
    )
