"""How the routers choose over given rows. Every measure counts real tokens only, never padding."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from remix_cli.adapter import routing
from remix_cli.adapter.trace import Decision, Trace
from remix_cli.data.batches import collate
from remix_cli.data.encode import EncodedRow
from remix_cli.models import batch_losses
from remix_cli.runs import LoadedRun
from remix_cli.stats.live import DEAD_SHARE


@dataclass
class BlockStatistics:
    """One router. Means are over tokens; shares are of tokens, so they sum to k."""

    name: str
    tokens: int
    entropy: float  # of q, nats
    entropy_share: float  # entropy / ln n: 1 is uniform, 0 one-hot
    ess_q: float  # effective support size of q: 1 .. n
    ess_q_worst: float  # the smallest over tokens
    ess_weights: float  # effective support size of the weights in use: k for ReMix
    share: list[float]  # of tokens, for each LoRA
    dead: list[int]  # LoRAs with a share below DEAD_SHARE
    distinct_sets: int  # different selections that occurred
    commonest_set: float  # share of tokens served by the commonest one
    token_information: float  # mutual information of the token's id and the LoRA serving it, nats
    task_information: float  # the same for the row's task name; 0 with a single task


class BlockCounter:
    """Adds up one router's decisions, batch by batch."""

    def __init__(self, name: str, pool_size: int, vocabulary: int, tasks: int):
        self.name, self.pool_size = name, pool_size
        self.by_token = torch.zeros(vocabulary, pool_size)
        self.by_task = torch.zeros(tasks, pool_size)
        self.tokens = 0
        self.entropy = self.ess_q = self.ess_weights = 0.0
        self.ess_q_worst = float(pool_size)
        self.sets: dict[tuple[int, ...], int] = {}

    def add(self, decision: Decision, mask: Tensor, token_ids: Tensor, task_ids: Tensor) -> None:
        """One batch; only positions where `mask` (B, T) is True count. `token_ids`, `task_ids` are (B, T).

        A decision for a whole sequence counts once for each of its tokens.
        """
        parts = (decision.logits, decision.chosen, decision.weights)
        logits, chosen, weights = (x.cpu().expand(*mask.shape, x.shape[-1])[mask] for x in parts)
        use = routing.selection_mask(chosen, self.pool_size).float()  # (S, n)
        self.by_token.index_add_(0, token_ids[mask], use)
        self.by_task.index_add_(0, task_ids[mask], use)
        ess_q = routing.effective_support_size(logits.softmax(-1))
        self.tokens += logits.shape[0]
        self.entropy += float(routing.entropy(logits).double().sum())
        self.ess_q += float(ess_q.double().sum())
        self.ess_q_worst = min(self.ess_q_worst, float(ess_q.min()))
        self.ess_weights += float(routing.effective_support_size(weights.float()).double().sum())
        found, counts = chosen.sort(-1).values.unique(dim=0, return_counts=True)
        for ids, count in zip(found.tolist(), counts.tolist(), strict=True):
            self.sets[tuple(ids)] = self.sets.get(tuple(ids), 0) + count

    def result(self) -> BlockStatistics:
        t = self.tokens
        share = (self.by_task.double().sum(0) / t).tolist()
        entropy = self.entropy / t
        most = float(torch.tensor(float(self.pool_size)).log())
        return BlockStatistics(
            name=self.name,
            tokens=t,
            entropy=entropy,
            entropy_share=entropy / most if most else 0.0,
            ess_q=self.ess_q / t,
            ess_q_worst=self.ess_q_worst,
            ess_weights=self.ess_weights / t,
            share=share,
            dead=[i for i, s in enumerate(share) if s < DEAD_SHARE],
            distinct_sets=len(self.sets),
            commonest_set=max(self.sets.values()) / t,
            token_information=mutual_information(self.by_token),
            task_information=mutual_information(self.by_task),
        )


def mutual_information(counts: Tensor) -> float:
    """Mutual information in nats of the row and column of a table of counts; 0 if one tells nothing of the other."""
    joint = counts.double() / counts.sum()
    apart = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    return float(torch.where(joint > 0, joint * (joint / apart).log(), torch.zeros(())).sum())


@torch.no_grad()
def collect(
    run: LoadedRun, rows: list[EncodedRow], batch_size: int, advance: Callable[[int], None]
) -> list[BlockStatistics]:
    """Statistics of every router under top-k inference over all tokens of `rows`, prompts included."""
    tasks = sorted({row.task for row in rows})
    n, vocabulary = run.adapter.config.pool_size, 1 + max(int(row.input_ids.max()) for row in rows)
    counters = {name: BlockCounter(name, n, vocabulary, len(tasks)) for name in run.adapter.routers}
    order = sorted(rows, key=lambda row: len(row.input_ids))
    for start in range(0, len(order), batch_size):
        chunk = order[start : start + batch_size]
        batch = collate(chunk).to(run.device)
        with run.adapter.tracing(Trace(prompt=batch.prompt)) as trace:
            batch_losses(run.model, batch)
        task_ids = torch.tensor([tasks.index(row.task) for row in chunk]).unsqueeze(1).expand(batch.mask.shape)
        for name, decision in trace.decisions.items():
            counters[name].add(decision, batch.mask.cpu(), batch.input_ids.cpu(), task_ids)
        advance(len(chunk))
    return [counter.result() for counter in counters.values()]


def report(run: LoadedRun, rows: int, blocks: list[BlockStatistics]) -> dict[str, Any]:
    config = run.adapter.config
    return {
        "method": config.method,
        "pool_size": config.pool_size,
        "active": config.active,
        "rows": rows,
        "tokens": blocks[0].tokens,
        "blocks": [asdict(block) for block in blocks],
    }
