"""How the routers choose over given rows. Every measure counts real tokens only, never padding."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from remix_cli.core import routing
from remix_cli.core.layer import RoutedLinear
from remix_cli.core.patch import Adapter
from remix_cli.core.step_routing import DEAD_SHARE, DOMINATING_SHARE
from remix_cli.core.trace import Decision, Trace
from remix_cli.data.batches import Batch, collate
from remix_cli.data.chunks import in_chunks
from remix_cli.data.rows import EncodedRow
from remix_cli.models import batch_losses
from remix_cli.runs import LoadedRun


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
    ess_weights_worst: float
    chosen_mass: float  # sum of q over the chosen LoRAs
    margin: float | None  # logit of the last chosen minus that of the first left out; None if all are chosen
    agreement: float  # share of the top k that a sampled selection holds, in expectation: sum of pi over the top k / k
    share: list[float]  # of tokens, for each LoRA
    share_by_task: list[list[float]]  # the same for each task, tasks in alphabetical order
    load_variation: float  # standard deviation of the shares / their mean: 0 is even
    dead: list[int]  # LoRAs with a share below DEAD_SHARE
    dominating: list[int]  # LoRAs with a share of DOMINATING_SHARE or more, while others could serve
    distinct_sets: int  # different selections that occurred
    commonest_set: float  # share of tokens served by the commonest one
    token_information: float  # mutual information of the token's id and the LoRA serving it, nats
    class_information: float  # the same for the token's class: number, word, punctuation
    part_information: float  # the same for prompt or completion
    task_information: float  # the same for the row's task name; 0 with a single task
    similarity: float  # mean cosine between the updates B_i A_i of different LoRAs, over the block's linears
    similarity_most: float  # the largest


SUMS = ("entropy", "ess_q", "ess_weights", "chosen_mass", "margin", "agreement")


class BlockCounter:
    """Adds up one router's decisions, batch by batch, where the model is."""

    def __init__(self, name: str, pool_size: int, vocabulary: int, tasks: int, device: torch.device):
        self.name, self.pool_size = name, pool_size
        self.by_token = torch.zeros(vocabulary, pool_size, device=device)
        self.by_task = torch.zeros(tasks, pool_size, device=device)
        self.by_part = torch.zeros(2, pool_size, device=device)
        self.tokens = 0
        self.sums = torch.zeros(len(SUMS), dtype=torch.float64, device=device)
        self.worst = torch.full((2,), float(pool_size), dtype=torch.float64, device=device)
        self.sets: Counter[tuple[int, ...]] = Counter()

    def add(self, decision: Decision, mask: Tensor, token_ids: Tensor, task_ids: Tensor, learnt: Tensor) -> None:
        """One batch; only positions where `mask` (B, T) is True count.

        `token_ids`, `task_ids` and `learnt` (1 at completion tokens) are (B, T). A decision for a whole sequence
        counts once for each of its tokens.
        """

        def counted(part: Tensor) -> Tensor:
            return part.expand(*mask.shape, part.shape[-1])[mask]

        logits = counted(decision.logits)  # (S, n)
        chosen = counted(decision.chosen)  # (S, k)
        weights = counted(decision.weights)  # (S, n)
        k = chosen.shape[-1]
        active = routing.selection_mask(chosen, self.pool_size)  # (S, n) bool
        use = active.float()
        self.by_token.index_add_(0, token_ids[mask], use)
        self.by_task.index_add_(0, task_ids[mask], use)
        self.by_part.index_add_(0, learnt[mask], use)
        self.tokens += logits.shape[0]
        q = logits.softmax(-1)
        ess_q = routing.effective_support_size(q)
        ess_weights = routing.effective_support_size(weights.float())
        margin = torch.zeros_like(ess_q)
        if k < self.pool_size:
            ordered = logits.sort(-1, descending=True).values
            margin = ordered[:, k - 1] - ordered[:, k]
        agreement = (routing.inclusion_probabilities(logits, k) * use).sum(-1) / k
        found = (routing.entropy(logits), ess_q, ess_weights, (q * use).sum(-1), margin, agreement)
        self.sums += torch.stack([x.double().sum() for x in found])
        self.worst = torch.minimum(self.worst, torch.stack([ess_q.amin(), ess_weights.amin()]).double())
        self.sets.update(_count_sets(active))

    def result(self, classes: Tensor, similarity: Tensor) -> BlockStatistics:
        """`classes` (vocabulary,) says which class each token id is of, `similarity` (linears, n, n) cosines."""
        t, n = self.tokens, self.pool_size
        means = dict(zip(SUMS, (self.sums / t).tolist(), strict=True))
        share = self.by_part.double().sum(0) / t
        most = math.log(n)
        by_class = torch.zeros(len(CLASSES), n, device=share.device).index_add_(0, classes, self.by_token)
        others = similarity[:, ~torch.eye(n, dtype=torch.bool, device=similarity.device)]
        k = int(share.sum().round())
        spare = n > k
        return BlockStatistics(
            name=self.name,
            tokens=t,
            entropy=means["entropy"],
            entropy_share=means["entropy"] / most if most else 0.0,
            ess_q=means["ess_q"],
            ess_q_worst=float(self.worst[0]),
            ess_weights=means["ess_weights"],
            ess_weights_worst=float(self.worst[1]),
            chosen_mass=means["chosen_mass"],
            margin=means["margin"] if spare else None,
            agreement=means["agreement"],
            share=share.tolist(),
            share_by_task=(self.by_task.double() / (self.by_task.double().sum(1, keepdim=True) / k)).tolist(),
            load_variation=float(share.std(correction=0) / share.mean()),
            dead=[i for i, s in enumerate(share.tolist()) if s < DEAD_SHARE],
            dominating=[i for i, s in enumerate(share.tolist()) if spare and s >= DOMINATING_SHARE],
            distinct_sets=len(self.sets),
            commonest_set=max(self.sets.values()) / t,
            token_information=mutual_information(self.by_token),
            class_information=mutual_information(by_class),
            part_information=mutual_information(self.by_part),
            task_information=mutual_information(self.by_task),
            similarity=float(others.mean()) if others.numel() else 0.0,
            similarity_most=float(others.max()) if others.numel() else 0.0,
        )


def _count_sets(active: Tensor) -> dict[tuple[int, ...], int]:
    """How often each set of LoRAs occurs among the rows of `active` (S, n) bool."""
    words = []
    for part in active.split(62, dim=-1):  # each packed into one integer
        bits = torch.arange(part.shape[-1], device=part.device)
        words.append((part.long() << bits).sum(-1))
    if len(words) == 1:  # much quicker than rows of one
        found, counts = words[0].unique(return_counts=True)
        keys = [(key,) for key in found.tolist()]
    else:
        found, counts = torch.stack(words, -1).unique(dim=0, return_counts=True)
        keys = [tuple(key) for key in found.tolist()]
    return dict(zip(keys, counts.tolist(), strict=True))


CLASSES = ("number", "word", "punctuation", "other")


def token_classes(tokenizer: Any, vocabulary: int) -> Tensor:
    """The class of each token id below `vocabulary`, as an index into CLASSES; special tokens are `other`."""
    special = set(tokenizer.all_special_ids)
    found = []
    for i, text in enumerate(_texts(tokenizer, range(vocabulary))):
        text = text.strip()
        if i in special or not text:
            kind = "other"
        elif any(c.isdigit() for c in text):
            kind = "number"
        elif any(c.isalpha() for c in text):
            kind = "word"
        else:
            kind = "punctuation"
        found.append(CLASSES.index(kind))
    return torch.tensor(found)


def _texts(tokenizer: Any, ids: Iterable[int]) -> list[str]:
    return tokenizer.batch_decode([[i] for i in ids], clean_up_tokenization_spaces=False)


def update_similarity(linear: RoutedLinear) -> Tensor:
    """Cosines between the updates B_i A_i, (n, n) float64, from n r x n r products; 0 where an update is 0."""
    a, b = linear.lora_A.detach().double(), linear.lora_B.detach().double()
    if linear.shares_a:
        a = a.repeat(linear.pool_size, 1)
    inner = (a @ a.T) * (b.T @ b)  # <B_i A_i, B_j A_j> = tr(A_i^T B_i^T B_j A_j), summed over ranks below
    n, r = linear.pool_size, linear.rank
    inner = inner.view(n, r, n, r).sum((1, 3))
    norms = inner.diagonal().clamp_min(0).sqrt()
    return inner / (norms[:, None] * norms[None]).clamp_min(torch.finfo(torch.float64).tiny)


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
    device, n = run.device, run.adapter.config.pool_size
    vocabulary = 1 + max(int(row.input_ids.max()) for row in rows)
    counters = {name: BlockCounter(name, n, vocabulary, len(tasks), device) for name in run.adapter.routers}

    def decide(chunk: list[int]) -> tuple[Batch, dict[str, Decision]]:
        batch = collate([rows[i] for i in chunk]).to(device)
        with run.adapter.tracing(Trace(prompt=batch.prompt)) as trace:
            batch_losses(run.model, batch)
        return batch, trace.decisions

    for chunk, (batch, decisions) in in_chunks([len(row.input_ids) for row in rows], batch_size, decide):
        of_rows = torch.tensor([tasks.index(rows[i].task) for i in chunk], device=device)
        task_ids = of_rows.unsqueeze(1).expand(batch.mask.shape)
        learnt = (batch.mask & ~batch.prompt).long()
        for name, decision in decisions.items():
            counters[name].add(decision, batch.mask, batch.input_ids, task_ids, learnt)
        advance(len(chunk))
    classes = token_classes(run.tokenizer, vocabulary).to(device)
    return [counter.result(classes, _similarities(run.adapter, name)) for name, counter in counters.items()]


def _similarities(adapter: Adapter, router: str) -> Tensor:
    """(linears, n, n): of all linears that the router serves. LoRAs on linears of their own have nothing in common."""
    if adapter.config.of_modules:
        return torch.eye(adapter.config.pool_size).unsqueeze(0)
    similarities = []
    for linear in adapter.linears.values():
        if linear.router is not None and linear.router.name == router:
            similarities.append(update_similarity(linear))
    return torch.stack(similarities)


@torch.no_grad()
def trace_lines(run: LoadedRun, rows: list[EncodedRow]) -> Iterator[dict[str, Any]]:
    """One record per token: row, position, text, prompt or completion, and the LoRAs each block chose, best first."""
    for i, row in enumerate(rows):
        batch = collate([row]).to(run.device)
        with run.adapter.tracing(Trace(prompt=batch.prompt)) as trace:
            batch_losses(run.model, batch)
        chosen: dict[str, list[list[int]]] = {}  # router -> of each position the LoRAs
        for name, decision in trace.decisions.items():
            chosen[name] = decision.chosen.expand(1, batch.mask.shape[1], -1)[0].tolist()
        texts = _texts(run.tokenizer, row.input_ids.tolist())
        for t in range(len(row.input_ids)):
            part = "prompt" if bool(batch.prompt[0, t]) else "completion"
            loras = {name: ids[t] for name, ids in chosen.items()}
            yield {"row": i, "task": row.task, "position": t, "token": texts[t], "part": part, "chosen": loras}


def report(run: LoadedRun, rows: list[EncodedRow], blocks: list[BlockStatistics]) -> dict[str, Any]:
    config = run.adapter.config
    return {
        "method": config.method,
        "pool_size": config.pool_size,
        "active": config.active,
        "rows": len(rows),
        "tasks": sorted({row.task for row in rows}),
        "tokens": blocks[0].tokens,
        "blocks": [asdict(block) for block in blocks],
    }
