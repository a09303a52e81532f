"""Time a training step side by side with PEFT LoRA, in one process on the same tokens.

    python scripts/bench_step.py [--model models/SmolLM2-135M-Instruct] [--dtype float32] [--batch 4] [--length 256]
    python scripts/bench_step.py --shape 8b --dtype bfloat16 --batch 4 --length 512       (random weights, GPU)

Every row is forward + backward + AdamW on the adapters of gate/up/down, every position supervised; the arms are
run in turn, several rounds, and the median over rounds is printed with its ratio to PEFT LoRA of rank k r.
"""

import argparse
import json
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from remix_cli.core.config import AdapterConfig
from remix_cli.core.estimators.registry import make_estimator
from remix_cli.core.layer import RoutedLinear
from remix_cli.core.patch import apply_adapter, compile_unadapted
from remix_cli.core.trace import Weighting
from remix_cli.data.batches import Batch, collate
from remix_cli.data.rows import EncodedRow
from remix_cli.models import DTYPES, batch_losses, load_model
from remix_cli.recipe.schema import Model, Router
from remix_cli.train.micro_batch import accumulate_batch
from remix_cli.train.step_graphs import StepGraphs

REFERENCE = "PEFT LoRA r = 32"
TARGETS = ["gate_proj", "up_proj", "down_proj"]
SHAPES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 8},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
}


class Arm:
    """One way to adapt the model; `install` patches it, `step` runs one training step, `remove` undoes."""

    def __init__(
        self,
        name: str,
        router: Router | None = None,
        config: AdapterConfig | None = None,
        peft_rank: int = 0,
        dora: bool = False,
        loop: bool = False,
        compiled: bool = False,
        graphs: bool = False,
    ):
        self.name, self.router, self.config = name, router, config
        self.peft_rank, self.dora, self.loop, self.compiled = peft_rank, dora, loop, compiled
        self.graphs = graphs

    def install(self, model: torch.nn.Module, batch: Batch) -> tuple[Callable[[], None], Callable[[], None]]:
        """(step, remove)"""
        if self.peft_rank:
            return self._install_peft(model, batch)
        if self.config is None:

            def forward() -> None:
                with torch.no_grad():
                    batch_losses(model, batch)

            return forward, lambda: None
        adapter = apply_adapter(model, self.config, seed=0)
        if self.loop:
            for linear in adapter.linears.values():
                linear.forward = loop_over_loras.__get__(linear)  # type: ignore[method-assign]
        if self.compiled:
            compile_unadapted(model)
        optimizer = torch.optim.AdamW(adapter.parameters().values(), lr=1e-4, fused=True)
        router, config, steps = self.router, self.config, iter(range(10**9))
        estimator = make_estimator(router.estimator if router else "rtg")
        estimator.load_state_dict({"products": 0.5, "squares": 1.0})
        recorded = None
        if self.graphs and router:
            recorded = StepGraphs(model, adapter, router, estimator, lambda loss: loss.backward())
        on_host = batch.to(torch.device("cpu"))

        def step() -> None:
            if recorded is not None:
                recorded.accumulate(on_host, len(batch.targets), (0, next(steps)))
            elif router is None:  # the pool without routing: every LoRA on, M = 1
                (batch_losses(model, batch).sum() / len(batch.targets)).backward()
            else:
                accumulate_batch(
                    model,
                    adapter,
                    batch,
                    router,
                    estimator,
                    targets_in_step=len(batch.targets),
                    seed=(0, next(steps)),
                    numbers=estimator.numbers(),
                    backward=lambda loss: loss.backward(),
                )
            optimizer.step()
            optimizer.zero_grad(set_to_none=recorded is None)

        if config.active == config.pool_size:
            shape = (*batch.input_ids.shape, config.pool_size * config.rank)
            gates = torch.full(shape, config.scale, device=batch.mask.device, dtype=next(model.parameters()).dtype)
            for r in adapter.routers.values():
                r.forward = lambda x: Weighting(gates, None)  # type: ignore[method-assign]

        def remove() -> None:
            adapter.remove()
            for module in model.modules():
                module._compiled_call_impl = None

        return step, remove

    def _install_peft(self, model: torch.nn.Module, batch: Batch) -> tuple[Callable[[], None], Callable[[], None]]:
        import peft

        wrapped = peft.get_peft_model(
            model,
            peft.LoraConfig(r=self.peft_rank, lora_alpha=self.peft_rank, target_modules=TARGETS, use_dora=self.dora),
        )
        trained = [p for p in wrapped.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
        if self.compiled:
            for layer in model.model.layers:  # type: ignore[union-attr]
                layer.compile(dynamic=False)

        def step() -> None:
            (batch_losses(model, batch).sum() / len(batch.targets)).backward()
            optimizer.step()
            optimizer.zero_grad()

        def remove() -> None:
            wrapped.unload()
            for module in model.modules():
                module._compiled_call_impl = None

        return step, remove


def arms(n: int, k: int, r: int, only: str, compiled: bool) -> list[Arm]:
    pool = AdapterConfig(pool_size=n, active=k, rank=r)
    soft = AdapterConfig(pool_size=n, active=k, rank=r, method="mixlora")
    once = Router(selections=1, estimator="straight_through")
    made = [
        Arm("frozen forward"),
        Arm(f"PEFT LoRA r = {k * r}", peft_rank=k * r),
        Arm(f"PEFT LoRA r = {n * r}", peft_rank=n * r),
        Arm(f"PEFT DoRA r = {k * r}", peft_rank=k * r, dora=True),
        Arm(f"pool n = {n}, no router, M = 1", config=AdapterConfig(pool_size=n, active=n, rank=r)),
        Arm("soft mixture, a loop over LoRAs", once, soft, loop=True),
        Arm("soft mixture, masked stack", once, soft),
        Arm("ReMix, router frozen, M = 1", Router(selections=1, learning_rate=0.0), pool),
        Arm("ReMix, straight-through, M = 1", once, pool),
    ]
    for m in (2, 4, 8):
        for gradient in ("one", "mean"):
            made.append(
                Arm(
                    f"ReMix, rtg, M = {m}, {gradient}",
                    Router(estimator="rtg", selections=m, lora_gradient=gradient),
                    pool,
                )
            )
    for estimator in ("paper", "control_variate"):
        for gradient in ("one", "mean"):
            router = Router(estimator=estimator, lora_gradient=gradient)
            made.append(Arm(f"ReMix, {estimator}, M = 2, {gradient}", router, pool))
    if compiled:
        again = [arm for arm in made if arm.name.startswith("ReMix") and "mean" not in arm.name]
        made += [Arm(f"{arm.name}, compiled", arm.router, arm.config, compiled=True) for arm in again]
        made.append(Arm(f"PEFT LoRA r = {k * r}, compiled", peft_rank=k * r, compiled=True))
    if torch.cuda.is_available():
        again = [arm for arm in made if arm.name.startswith("ReMix") and "mean" not in arm.name]
        made += [Arm(f"{a.name}, graphs", a.router, a.config, compiled=a.compiled, graphs=True) for a in again]
    return [arm for arm in made if re.search(only, arm.name) or arm.name == REFERENCE]


def loop_over_loras(self: RoutedLinear, x: torch.Tensor) -> torch.Tensor:
    """The usual dispatch of a mixture of LoRAs: one turn for each, over the tokens that chose it."""
    assert self.router.block.weighting is not None
    weights = self.router.block.weighting.weights
    flat, weights = x.flatten(0, -2), weights.flatten(0, -2)
    y = self.base_layer(x)
    added = torch.zeros_like(y).flatten(0, -2)
    a, b = self.lora_A.unflatten(0, (self.pool_size, -1)), self.lora_B.unflatten(1, (self.pool_size, -1))
    for i in range(self.pool_size):
        (tokens,) = weights[:, i].nonzero(as_tuple=True)
        update = flat[tokens] @ a[i].T.to(x.dtype) @ b[:, i].T.to(x.dtype)
        added = added.index_add(0, tokens, update * weights[tokens, i, None].to(x.dtype))
    return y + added.view_as(y)


def timed(step: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    begun = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def kernels(step: Callable[[], None], profile_to: Path | None, name: str) -> tuple[float, int]:
    """Seconds of kernels and their number in one step on the GPU; their table goes to the file, too."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        step()
        torch.cuda.synchronize()
    averages = trace.key_averages()
    if profile_to:
        table = averages.table(sort_by="self_device_time_total", row_limit=40, max_name_column_width=90)
        with profile_to.open("a") as file:
            file.write(f"== {name}\n{table}\n")
    found = [e for e in averages if e.device_type == torch.autograd.DeviceType.CUDA]
    return sum(e.self_device_time_total for e in found) / 1e6, sum(e.count for e in found)


def bench_model(shape: str | None, name: str, dtype: str, device: torch.device) -> torch.nn.Module:
    """A pretrained model, or a random one of a Llama 3 shape."""
    if shape is None:
        return load_model(Model(name_or_path=name, dtype=dtype), device)
    config = LlamaConfig(vocab_size=128256, num_key_value_heads=8, rope_theta=5e5, **SHAPES[shape])
    with torch.device(device):
        torch.set_default_dtype(DTYPES[dtype])
        model = LlamaForCausalLM(config).requires_grad_(False)
        torch.set_default_dtype(torch.float32)
    return model


def random_batch(size: int, length: int, device: torch.device) -> Batch:
    """Rows of random tokens, every position supervised."""
    random = np.random.default_rng(0)
    rows = [random.integers(10, 40000, length).astype(np.int32) for _ in range(size)]
    return collate([EncodedRow(row, np.ones(length, bool), "bench") for row in rows]).to(device)


def bench_parser(doc: str) -> argparse.ArgumentParser:
    """What every benchmark asks: on which model."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--json", type=Path)
    return parser


def main() -> None:
    parser = bench_parser(__doc__ or "")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--only", default="", help="regular expression on the names of the rows")
    parser.add_argument("--compile", action="store_true", help="our rows once more with train.torch_compile")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no further row after so long")
    parser.add_argument("--profile", type=Path, help="append a table of each row's GPU kernels to this file")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = bench_model(args.shape, args.model, args.dtype, device)
    batch = random_batch(args.batch, args.length, device)
    model.train()
    samples: dict[str, list[float]] = {}
    memory: dict[str, float] = {}
    busy: dict[str, tuple[float, int]] = {}
    everything = arms(8, 4, 8, args.only, args.compile)
    end = time.monotonic() + args.seconds
    for round_number in range(args.rounds):
        for arm in everything:
            if time.monotonic() > end:
                continue
            step, remove = arm.install(model, batch)
            for _ in range(3 if arm.graphs else 2):  # warm-up; a shape is recorded when it comes again
                timed(step, device)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            times = [timed(step, device) for _ in range(args.repeats)]
            samples.setdefault(arm.name, []).extend(times)
            if device.type == "cuda":
                memory[arm.name] = torch.cuda.max_memory_allocated() / 2**30
                if round_number == 0:
                    busy[arm.name] = kernels(step, args.profile, arm.name)
            remove()
        if round_number == 0 and device.type == "cuda":
            torch.cuda.empty_cache()
    reference = statistics.median(samples[REFERENCE])
    table = Table(title=f"{args.shape or args.model}, {args.dtype}, {args.batch} x {args.length} tokens", box=None)
    for column in ("step", "median s", "min", "max", "/ PEFT r = 32", "kernels s", "number", "peak GiB"):
        table.add_column(column, justify="left" if column == "step" else "right")
    for name, times in samples.items():
        median = statistics.median(times)
        on_gpu = [f"{busy[name][0]:.3f}", str(busy[name][1]), f"{memory[name]:.1f}"] if memory else ["-"] * 3
        figures = [f"{x:.3f}" for x in (median, min(times), max(times))]
        table.add_row(name, *figures, f"{median / reference:.2f}", *on_gpu)
    Console(width=100).print(table)
    if args.json:
        args.json.write_text(
            json.dumps(
                {
                    "arguments": {name: str(value) for name, value in vars(args).items()},
                    "samples": samples,
                    "memory": memory,
                    "kernels": busy,
                }
            )
        )


if __name__ == "__main__":
    main()
