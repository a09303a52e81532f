"""Screen router settings: several routed adapters trained side by side on one frozen base, on the same rows.

    python scripts/screen_routers.py RECIPE ARMS.json TEST.jsonl OUT.jsonl --seeds 0,1 [key.path=value ...]

A small model's step waits for kernel launches, not for arithmetic, so R adapters cost little more than one: their
matrices are stacked along a leading dimension, the batch is repeated R times, and the base runs once. On one H200 six
adapters on SmolLM2-135M take 0.24 s a step of 64 rows each, where three runs at once take 0.18 s each.

Rows, losses and estimators are the product's own; the loop is a plain one (AdamW's update without decay, clipping at
1 of LoRAs and routers apart, cosine). It is a screen: what looks good here is then trained with `remix sweep`.
Decoders with gated FFNs (Llama, Qwen, SmolLM, Gemma) whose rows name their task in the recipe's sources.

ARMS.json: {"name": {setting: value, ...}}, settings as in `Arm`. OUT gets one line for each arm and seed.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from remix_cli.core import routing
from remix_cli.core.clusters import spherical_k_means
from remix_cli.core.estimators.base import Estimator
from remix_cli.core.estimators.registry import ESTIMATORS, make_estimator
from remix_cli.core.estimators.rollouts import Rollouts, TopPass
from remix_cli.cross_entropy import token_losses
from remix_cli.data.batches import Batch, collate
from remix_cli.data.encode import Encoder
from remix_cli.data.formats import Example
from remix_cli.data.rows import EncodedRow
from remix_cli.data.splits import TrainingData, load_data
from remix_cli.models import batch_losses, load_model, load_tokenizer, supervised_logits
from remix_cli.recipe import Recipe, load_recipe

LINEARS = ("gate_proj", "up_proj", "down_proj")
EVALUATED = 128  # rows at once


@dataclass
class Arm:
    """One adapter. The LoRAs learn from a pass under the top k; samples, if any, serve the router."""

    name: str
    pool_size: int = 8  # n
    active: int = 4  # k
    rank: int = 8  # r
    estimator: str = "fixed"  # fixed, straight_through (from the top k alone), rtg, control_variate, paper
    selections: int = 2  # M, beside the pass under the top k
    init_std: float = 0.02
    learning_rate: float | None = None  # of the LoRAs; by default the recipe's
    router_learning_rate: float = 0.01
    start: float = 0.0  # share of the steps before the router learns
    token: str = "raw"  # what the router reads of the token: raw, centred (the mean input taken away) or none
    prompt: str = "none"  # and of the prompt's mean input: none, raw or centred
    prompt_weight: float = 1.0  # of the prompt's part, when both are read; each part has unit length
    clusters: int = 0  # read, instead of the prompt itself, the nearest of so many clusters' centres
    oracle: bool = False  # read the task itself (one-hot): what knowing it is worth
    first: bool = False  # every block's router reads what the first block's reads
    shared: bool = False  # one decision for all blocks, taken in the first

    @property
    def scale(self) -> float:
        return 2 / math.sqrt(self.active * self.rank)

    @property
    def by_sequence(self) -> bool:
        return self.token == "none" or self.oracle

    @property
    def prepared(self) -> bool:
        """Does the router read anything but the token's own input?"""
        return self.token != "raw" or self.prompt != "none" or self.oracle

    def router_of(self, index: int) -> int:
        return 0 if self.shared else index

    @property
    def samples(self) -> bool:
        return self.estimator != "fixed" and ESTIMATORS[self.estimator].samples_beside_top

    @property
    def linear(self) -> bool:
        """Does the estimator read the loss's gradient by selection?"""
        return self.estimator != "fixed" and ESTIMATORS[self.estimator].linear


@dataclass
class Pass:
    """What one forward pass left behind, by block: tensors (R, B, T, ...) of the R arms that took part."""

    logits: list[Tensor]
    chosen: list[Tensor]  # the pool's ids, best first
    weights: list[Tensor]
    features: list[Tensor]  # what the routers read, unit length

    def of(self, arm: Arm, place: int) -> "ArmPass":
        def cut(x: Tensor) -> Tensor:
            return x[:, :1] if arm.by_sequence else x

        return ArmPass(
            torch.stack([cut(x[place])[..., : arm.pool_size] for x in self.logits]),
            torch.stack([cut(x[place])[..., : arm.active] for x in self.chosen]),
            [cut(x[place]) for x in self.features],
        )


@dataclass
class ArmPass:
    logits: Tensor  # (L, B, T or 1, n)
    chosen: Tensor  # (L, B, T or 1, k)
    features: list[Tensor]  # L times (B, T or 1, D)


class Stack:
    """R adapters on one model. `sub` are the places of the arms that take part in the current pass."""

    def __init__(self, model: Any, arms: list[Arm], seed: int, device: torch.device):
        self.model, self.arms, self.device = model, arms, device
        self.dtype = next(model.parameters()).dtype
        self.pool_size = max(a.pool_size for a in arms)
        self.columns = max(a.pool_size * a.rank for a in arms)
        owner = torch.full((len(arms), self.columns), self.pool_size)  # of a column; the last place is nobody's
        for place, arm in enumerate(arms):
            width = arm.pool_size * arm.rank
            owner[place, :width] = torch.arange(width) // arm.rank
        self.owner = owner.to(device)
        self.alike = len({(a.pool_size, a.rank) for a in arms}) == 1
        self.active = torch.tensor([a.active for a in arms], device=device)
        self.scales = torch.tensor([a.scale for a in arms], device=device)
        sizes = torch.tensor([a.pool_size for a in arms])
        self.absent = (torch.arange(self.pool_size) >= sizes[:, None]).to(device)  # (R, n)
        self.blocks = [m for name, m in model.named_modules() if name.endswith("mlp")]
        self.draw(seed)
        self.sub = list(range(len(arms)))
        self.noise: Tensor | None = None
        self.differentiated = False
        self.choose: Callable[[int, Tensor], Tensor] | None = None  # another choice than the top k, for evaluation
        self.record: Pass | None = None
        self.seen: list[list[tuple[Tensor, Tensor]]] | None = None  # by block: mean input and prompts' means of a batch
        self._hook()

    def draw(self, seed: int) -> None:
        """Every arm starts from the same LoRAs and, up to its spread, the same routers."""
        generator = torch.Generator().manual_seed(seed)
        self.lora_a: list[nn.Parameter] = []
        self.lora_b: list[nn.Parameter] = []
        self.routers: list[Tensor] = []
        copies = len(self.arms)
        for block in self.blocks:
            for linear in (getattr(block, name) for name in LINEARS):
                uniform = torch.rand(self.columns, linear.in_features, generator=generator) * 2 - 1
                one = (uniform / math.sqrt(linear.in_features)).to(self.device)
                self.lora_a.append(nn.Parameter(one.expand(copies, -1, -1).clone()))
                self.lora_b.append(nn.Parameter(torch.zeros(copies, self.columns, linear.out_features).to(self.device)))
        width = self.model.config.hidden_size
        for _ in self.blocks:
            one = torch.randn(self.pool_size, width, generator=generator)
            self.routers.append(torch.stack([one * a.init_std for a in self.arms]).to(self.device))  # (R, n, D)
        self.start = [p.clone() for p in self.routers]
        self.mean = torch.zeros(len(self.blocks), width, device=self.device)
        self.prompt_mean = torch.zeros(len(self.blocks), width, device=self.device)
        self.centres: dict[int, Tensor] = {}  # number of clusters to (L, clusters, D)

    def _hook(self) -> None:
        for index, block in enumerate(self.blocks):
            block.register_forward_pre_hook(lambda _, args, index=index: self.route(index, args[0]))
            for j, name in enumerate(LINEARS):
                linear = getattr(block, name)
                linear.forward = lambda x, place=3 * index + j, linear=linear: self.linear(place, linear, x)

    def enter(self, batch: Batch, tasks: Tensor, sub: list[int]) -> None:
        """What the next pass is over."""
        self.sub, self.mask, self.prompt, self.tasks = sub, batch.mask, batch.prompt, tasks
        pick = (lambda x: x) if len(sub) == len(self.arms) else (lambda x: x[sub])
        self.cast = [
            (pick(a).to(self.dtype), pick(b).to(self.dtype)) for a, b in zip(self.lora_a, self.lora_b, strict=True)
        ]

    def features(self, index: int, x: Tensor) -> Tensor:
        """(R, B, T, D) float32 of unit length, from the block's inputs of the same shape."""
        unit = F.normalize(x.float(), dim=-1)
        if self.seen is not None:
            mean = (unit[0] * self.mask[..., None]).sum((0, 1)) / self.mask.sum()
            self.seen[index].append((mean, self._prompt_mean(unit[:1])[0, :, 0]))
        arms = [self.arms[place] for place in self.sub]
        if not any(a.prepared or a.shared for a in arms):
            return unit

        def of_arms(values: list[float]) -> Tensor:
            return torch.tensor(values, device=self.device)[:, None, None, None]

        token = F.normalize(unit - of_arms([a.token == "centred" for a in arms]) * self.mean[index], dim=-1)
        prompt = self._prompt_mean(unit) - of_arms([a.prompt == "centred" for a in arms]) * self.prompt_mean[index]
        token_weights = of_arms([float(a.token != "none") for a in arms])
        prompt_weights = of_arms([a.prompt_weight * (a.prompt != "none") for a in arms])
        found = F.normalize(token_weights * token + prompt_weights * F.normalize(prompt, dim=-1), dim=-1)
        for i, arm in enumerate(arms):
            if arm.oracle:
                found[i] = F.one_hot(self.tasks, found.shape[-1]).float()[:, None]
            elif arm.clusters:
                centres = self.centres[arm.clusters][index]
                found[i] = centres[(found[i, :, 0] @ centres.T).argmax(-1)][:, None]
        if index == 0:
            self.first = found
        for i, arm in enumerate(arms):
            if arm.shared or arm.first:
                found[i] = self.first[i]
        return found

    def _prompt_mean(self, unit: Tensor) -> Tensor:
        """(..., B, 1, D)"""
        return torch.einsum("...btd,bt->...bd", unit, self.prompt / self.prompt.sum(1, keepdim=True))[..., None, :]

    @torch.no_grad()
    def route(self, index: int, x: Tensor) -> None:
        count = len(self.sub)
        features = self.features(index, x.view(count, -1, *x.shape[1:]))
        matrices = torch.stack([self.routers[self.arms[place].router_of(index)][place] for place in self.sub])
        logits = torch.einsum("rbtd,rnd->rbtn", features, matrices)
        absent = self.absent[self.sub][:, None, None]
        logits = logits.masked_fill(absent, -1e9)
        scores = logits
        if self.noise is not None:
            shares = [self.noise[self.arms[p].router_of(index), i] for i, p in enumerate(self.sub)]
            scores = logits + torch.stack(shares)
        order = scores.argsort(dim=-1, descending=True, stable=True)
        mask = order.argsort(-1) < self.active[self.sub][:, None, None, None]
        if self.choose is not None:
            mask = self.choose(index, mask)
        weights = mask.float() * self.scales[self.sub][:, None, None, None]
        with torch.enable_grad():
            weights.requires_grad_(self.differentiated)
            self.gates = self._gates(weights)
        if self.record is not None:
            self.record.logits.append(logits)
            self.record.chosen.append(order)
            self.record.weights.append(weights)
            self.record.features.append(features.to(self.dtype))

    def _gates(self, weights: Tensor) -> Tensor:
        """(R, B T, columns): each column's LoRA's weight."""
        if self.alike:  # adding up an expanded gradient is much faster than scattering one
            return weights.to(self.dtype).flatten(1, 2).repeat_interleave(self.arms[0].rank, dim=-1)
        flat = F.pad(weights.to(self.dtype).flatten(1, 2), (0, 1))
        return flat.gather(2, self.owner[self.sub][:, None].expand(-1, flat.shape[1], -1))

    def linear(self, place: int, linear: Any, x: Tensor) -> Tensor:
        y = F.linear(x, linear.weight, linear.bias)
        a, b = self.cast[place]
        mixed = torch.bmm(x.reshape(len(self.sub), -1, x.shape[-1]), a.mT) * self.gates
        return torch.baddbmm(y.view(len(self.sub), -1, y.shape[-1]), mixed, b).view_as(y)


def repeated(batch: Batch, times: int) -> Batch:
    """The batch several times over, one below the other."""
    size = batch.input_ids.numel()
    return Batch(
        batch.input_ids.repeat(times, 1),
        batch.mask.repeat(times, 1),
        batch.prompt.repeat(times, 1),
        torch.cat([batch.positions + i * size for i in range(times)]),
        batch.targets.repeat(times),
        batch.rows.repeat(times),
    )


def forward(
    stack: Stack, batch: Batch, tasks: Tensor, sub: list[int], noise: Tensor | None = None, differentiated: bool = False
) -> tuple[Tensor, Pass]:
    """Token losses (R, B, T) of the arms `sub`, divided by the batch's targets, and what their routers did."""
    stack.noise, stack.differentiated, stack.record = noise, differentiated, Pass([], [], [], [])
    stack.enter(batch, tasks, sub)
    losses = batch_losses(stack.model, repeated(batch, len(sub))) / len(batch.targets)
    record, stack.record, stack.noise = stack.record, None, None
    return losses.view(len(sub), *batch.input_ids.shape), record


def gumbel(stack: Stack, sub: list[int], shape: torch.Size, generator: torch.Generator) -> Tensor:
    """(L, R, B, T, n); one draw a sequence for arms that route by sequence."""
    uniform = torch.rand(len(stack.blocks), len(sub), *shape, stack.pool_size, generator=generator, device=stack.device)
    noise = -torch.log(-torch.log(uniform.clamp(1e-12, 1 - 1e-7)))
    for i, place in enumerate(sub):
        if stack.arms[place].by_sequence:
            noise[:, i] = noise[:, i, :, :1]
    return noise


class Adam:
    """Adam with a rate for each arm, over tensors (R, ., .)."""

    def __init__(self, parameters: list[Any]):
        self.parameters = parameters
        self.first = [torch.zeros_like(p) for p in parameters]
        self.second = [torch.zeros_like(p) for p in parameters]

    @torch.no_grad()
    def step(self, gradients: list[Tensor], number: int, rates: Tensor) -> None:
        """`gradients` are clipped to norm 1 for each arm; `number` counts from 1; `rates` (R,)."""
        norms = torch.stack([g.square().sum((1, 2)) for g in gradients]).sum(0).sqrt()
        clip = (1 / (norms + 1e-6)).clamp(max=1)[:, None, None]
        for parameter, gradient, first, second in zip(self.parameters, gradients, self.first, self.second, strict=True):
            gradient = gradient * clip
            first.lerp_(gradient, 0.1)
            second.lerp_(gradient.square(), 0.001)
            size = (second / (1 - 0.999**number)).sqrt_().add_(1e-8)
            parameter.sub_(first / (1 - 0.9**number) / size * rates[:, None, None])


def router_gradient(
    arm: Arm, top: tuple[Tensor, ArmPass], h: Tensor | None, samples: list[tuple[Tensor, ArmPass]], batch: Batch,
    local: Tensor, estimator: Estimator,
) -> Iterator[Tensor]:  # fmt: skip
    """For each block the gradient of P, (n, D). `top` and `samples` hold (token losses, choices)."""
    by_sequence = arm.by_sequence

    def credited(losses: Tensor) -> Tensor:
        return losses.sum(-1, keepdim=True) if by_sequence else losses

    passes = samples if arm.samples else [top]
    logits = torch.stack([p.logits for _, p in passes]).requires_grad_()
    rollouts = Rollouts(
        logits,
        torch.stack([p.chosen for _, p in passes]),
        torch.stack([credited(losses) for losses, _ in passes]),
        local,
        batch.mask.any(-1, keepdim=True) if by_sequence else batch.mask,
        h,
        TopPass(top[1].logits, top[1].chosen, credited(top[0])) if arm.samples else None,
    )
    estimate = estimator.estimate(rollouts, estimator.numbers())
    estimator.update(estimate.sums.tolist())
    (slopes,) = torch.autograd.grad(estimate.surrogate, logits)  # (M, L, B, T, n)
    for index in range(slopes.shape[1]):
        features = torch.stack([p.features[index] for _, p in passes]).float()
        yield torch.einsum("mbtn,mbtd->nd", slopes[:, index], features)


def train(stack: Stack, data: TrainingData, recipe: Recipe, seed: int, tasks_of: Callable[..., Tensor]) -> None:
    arms, device = stack.arms, stack.device
    total = data.total_steps(recipe)
    warmup = math.ceil(recipe.train.warmup_ratio * total)
    rates = torch.tensor([a.learning_rate or recipe.train.learning_rate for a in arms], device=device)
    router_rates = torch.tensor([a.router_learning_rate for a in arms], device=device)
    loras, routers = Adam([*stack.lora_a, *stack.lora_b]), Adam(stack.routers)
    estimators = {i: make_estimator(arm.estimator) for i, arm in enumerate(arms) if arm.estimator != "fixed"}
    local = torch.arange(len(stack.blocks), device=device) == len(stack.blocks) - 1
    generator = torch.Generator(device=device).manual_seed(1000 + seed)
    plan = replace(data.plan, seed=seed)
    everyone, step, begun = list(range(len(arms))), 0, time.time()
    window = torch.zeros(len(arms), device=device)
    differentiated = any(a.linear for a in arms)
    while step < total:
        for rows in plan.epoch(step // plan.steps_per_epoch)[: total - step]:
            part = [data.train.rows[i] for i in rows]
            batch, tasks = collate(part).to(device), tasks_of(part)
            progress = (step - warmup) / max(1, total - warmup)
            factor = (step + 1) / warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * progress))
            losses, record = forward(stack, batch, tasks, everyone, differentiated=differentiated)
            losses.sum().backward()
            losses = losses.detach()
            window += losses.sum((1, 2))
            learning = [i for i in everyone if arms[i].estimator != "fixed" and arms[i].start <= step / total]
            samples: dict[int, list[tuple[Tensor, ArmPass]]] = {i: [] for i in learning}
            for m in range(max((arms[i].selections for i in learning if arms[i].samples), default=0)):
                sub = [i for i in learning if arms[i].samples and arms[i].selections > m]
                with torch.no_grad():
                    noise = gumbel(stack, sub, batch.input_ids.shape, generator)
                    drawn, choices = forward(stack, batch, tasks, sub, noise)
                for place, i in enumerate(sub):
                    samples[i].append((drawn[place], choices.of(arms[i], place)))
            gradients = [torch.zeros_like(p) for p in stack.routers]
            for i in learning:
                top = (losses[i], record.of(arms[i], i))
                h = None
                if arms[i].linear:
                    h = torch.stack([w.grad[i, ..., : arms[i].pool_size] for w in record.weights])[None]
                    h = h * arms[i].scale  # type: ignore[operator]  # from d loss / d weight to d loss / d z
                    h = h.sum(-2, keepdim=True) if arms[i].by_sequence else h
                found = router_gradient(arms[i], top, h, samples[i], batch, local, estimators[i])
                for index, one in enumerate(found):
                    gradients[arms[i].router_of(index)][i, : arms[i].pool_size] += one
            loras.step([p.grad for p in loras.parameters], step + 1, rates * factor)
            moving = torch.tensor([float(i in learning) for i in everyone], device=device)
            routers.step(gradients, step + 1, router_rates * factor * moving)
            for parameter in loras.parameters:
                parameter.grad = None
            step += 1
            if step % 50 == 0 or step == total:
                shown = " ".join(f"{x / 50:.3f}" for x in window.tolist())
                print(f"step {step}/{total}  {time.time() - begun:.0f} s  loss {shown}", flush=True)
                window.zero_()


@torch.no_grad()
def evaluate(
    stack: Stack,
    rows: list[EncodedRow],
    tasks_of: Callable[..., Tensor],
    choose: Callable[[int, Tensor], Tensor] | None = None,
) -> list[dict[str, Any]]:
    """For each arm the loss per token, by task too, and the share of rows whose greedy answer is the reference."""
    copies, everyone = len(stack.arms), list(range(len(stack.arms)))
    names = sorted({row.task for row in rows})
    nats, right = torch.zeros(copies, len(names)).double(), torch.zeros(copies, len(names))
    tokens, count = torch.zeros(len(names)).double(), torch.zeros(len(names))
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].input_ids))
    stack.choose, stack.differentiated = choose, False
    for start in range(0, len(order), EVALUATED):
        part = [rows[i] for i in order[start : start + EVALUATED]]
        batch = collate(part).to(stack.device)
        stack.enter(batch, tasks_of(part), everyone)
        big = repeated(batch, copies)
        logits = supervised_logits(stack.model, big)
        row = big.positions // batch.input_ids.shape[1]  # (copies * B) rows, counted through
        empty = torch.zeros(copies * len(part), device=stack.device)
        wrong = empty.index_add(0, row, (logits.argmax(-1) != big.targets).float()).view(copies, -1).cpu()
        sums = empty.index_add(0, row, token_losses(logits, big.targets)).view(copies, -1).cpu()
        for j, one in enumerate(part):
            task = names.index(one.task)
            nats[:, task] += sums[:, j]
            right[:, task] += (wrong[:, j] == 0).float()
            tokens[task] += int(one.supervised[1:].sum())
            count[task] += 1
    stack.choose = None
    by_task, accuracy = nats / tokens, right / count
    found = []
    for i in everyone:
        parts = zip(names, by_task[i].tolist(), accuracy[i].tolist(), strict=True)
        listed = {name: [round(loss, 4), round(share, 4)] for name, loss, share in parts}
        loss = float(nats[i].sum() / tokens.sum())
        found.append({"loss": loss, "task_loss": float(by_task[i].mean()), "by_task": listed})
    return found


def shuffled(stack: Stack) -> Callable[[int, Tensor], Tensor]:
    """Each token the set of another token of the batch."""

    def choose(_: int, mask: Tensor) -> Tensor:
        flat, real = mask.flatten(1, 2).clone(), stack.mask.flatten().nonzero()[:, 0]
        flat[:, real] = flat[:, real[torch.randperm(len(real), device=mask.device)]]
        return flat.view_as(mask)

    return choose


@torch.no_grad()
def kept(stack: Stack, rows: list[EncodedRow], tasks_of: Callable[..., Tensor]) -> list[float]:
    """The share of each arm's chosen LoRAs that its routers would have chosen at the start."""
    totals = torch.zeros(len(stack.arms), device=stack.device)
    part = rows[:: max(1, len(rows) // EVALUATED)]
    batch = collate(part).to(stack.device)
    _, record = forward(stack, batch, tasks_of(part), stack.sub)
    for index, chosen in enumerate(record.chosen):
        start = torch.stack([stack.start[arm.router_of(index)][i] for i, arm in enumerate(stack.arms)])
        logits = torch.einsum("rbtd,rnd->rbtn", record.features[index].float(), start)
        logits = logits.masked_fill(stack.absent[:, None, None], -1e9)
        for i, arm in enumerate(stack.arms):
            before = routing.selection_mask(routing.top_k(logits[i], arm.active), stack.pool_size)
            now = routing.selection_mask(chosen[i, ..., : arm.active], stack.pool_size)
            totals[i] += ((before & now).sum(-1) * batch.mask).sum() / (batch.mask.sum() * arm.active)
    return (totals / len(stack.blocks)).tolist()


@torch.no_grad()
def prepare_features(stack: Stack, data: TrainingData, tasks_of: Callable[..., Tensor], batches: int = 32) -> None:
    """From the base model's first batches, by block: the mean input, the mean of the prompts' means, their clusters."""
    stack.seen, centred = [[] for _ in stack.blocks], []
    for rows in data.plan.epoch(0)[:batches]:
        part = [data.train.rows[i] for i in rows]
        forward(stack, collate(part).to(stack.device), tasks_of(part), [0])
    for index, seen in enumerate(stack.seen):
        stack.mean[index] = torch.stack([mean for mean, _ in seen]).mean(0)
        prompts = torch.cat([means for _, means in seen])
        stack.prompt_mean[index] = prompts.mean(0)
        centred.append(F.normalize(prompts - stack.prompt_mean[index], dim=-1))
    stack.seen = None
    for count in {a.clusters for a in stack.arms if a.clusters}:
        stack.centres[count] = torch.stack([spherical_k_means(x, count) for x in centred])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("recipe", "arms", "test", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--at-once", type=int, default=6, help="arms on one base")
    parser.add_argument("--limit", type=float, default=math.inf, help="seconds after which no group is begun")
    args = parser.parse_args()
    begun, longest = time.time(), 0.0
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    recipe = load_recipe(args.recipe, args.overrides)
    tokenizer = load_tokenizer(recipe.model)
    data = load_data(recipe, tokenizer)
    lines = [json.loads(line) for line in args.test.read_text(encoding="utf-8").splitlines()]
    turns = [
        ({"role": "user", "content": x["prompt"]}, {"role": "assistant", "content": x["completion"]}) for x in lines
    ]
    examples = [Example(two, x["task"]) for two, x in zip(turns, lines, strict=True)]
    test = list(Encoder.of(tokenizer, recipe.data).encode_rows(examples).rows)
    names = sorted({row.task for row in data.train.rows})
    arms = [Arm(name, **settings) for name, settings in json.loads(args.arms.read_text(encoding="utf-8")).items()]

    def tasks_of(rows: list[EncodedRow]) -> Tensor:
        return torch.tensor([names.index(row.task) for row in rows], device=device)

    for seed in map(int, args.seeds.split(",")):
        for group in (arms[i : i + args.at_once] for i in range(0, len(arms), args.at_once)):
            group_begun = time.time()
            if group_begun - begun + longest > args.limit:
                print("no time for another group")
                return
            model = load_model(recipe.model, device)
            stack = Stack(model, group, seed, device)
            if any(arm.prepared for arm in group):
                prepare_features(stack, data, tasks_of)
            train(stack, data, recipe, seed, tasks_of)
            held, tested = (evaluate(stack, rows, tasks_of) for rows in (list(data.validation.rows), test))
            random = evaluate(stack, test, tasks_of, shuffled(stack))
            same = kept(stack, test, tasks_of)
            with args.out.open("a", encoding="utf-8") as file:
                for i, arm in enumerate(group):
                    found = {"arm": arm.name, "seed": seed, "held_out": held[i]["loss"], "test": tested[i]}
                    file.write(json.dumps(found | {"shuffled": random[i]["loss"], "kept": same[i]}) + "\n")
                    rate = np.mean([accuracy for _, accuracy in tested[i]["by_task"].values()])
                    print(
                        f"{arm.name:24} seed {seed}  held out {held[i]['loss']:.4f}  test {tested[i]['loss']:.4f}  "
                        f"exact {100 * rate:.1f} %  kept {same[i]:.2f}  shuffled {random[i]['loss']:.4f}",
                        flush=True,
                    )
            longest = max(longest, time.time() - group_begun)
            del stack, model


if __name__ == "__main__":
    main()
