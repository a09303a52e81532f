"""Time a training step side by side with PEFT LoRA, in one process on the same tokens.

    python scripts/bench_step.py [--model models/SmolLM2-135M-Instruct] [--dtype float32] [--batch 4] [--length 256]
    python scripts/bench_step.py --shape 8b --dtype bfloat16 --batch 4 --length 512       (random weights, GPU)

Every row is forward + backward + AdamW on the adapters of gate/up/down, every position supervised; the arms are
run in turn, several rounds, and the median over rounds is printed with its ratio to PEFT LoRA of rank k r.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from remix_cli.adapter.config import AdapterConfig
from remix_cli.adapter.patch import apply_adapter
from remix_cli.data.batches import Batch, collate
from remix_cli.data.encode import EncodedRow
from remix_cli.models import DTYPES, batch_losses, load_model
from remix_cli.recipe.schema import Model, Router
from remix_cli.train.step import accumulate_gradients

TARGETS = ["gate_proj", "up_proj", "down_proj"]
SHAPES = {
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
}


class Arm:
    """One way to adapt the model; `install` patches it, `step` runs one training step, `remove` undoes."""

    def __init__(
        self, name: str, router: Router | None = None, config: AdapterConfig | None = None, peft_rank: int = 0
    ):
        self.name, self.router, self.config, self.peft_rank = name, router, config, peft_rank

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
        optimizer = torch.optim.AdamW(adapter.parameters().values(), lr=1e-4, fused=True)
        router, config, steps = self.router, self.config, iter(range(10**9))

        def step() -> None:
            if router is None:  # the pool without routing: every LoRA on, M = 1
                (batch_losses(model, batch).sum() / len(batch.targets)).backward()
            else:
                accumulate_gradients(
                    model,
                    adapter,
                    batch,
                    router,
                    targets_in_step=len(batch.targets),
                    seed=(0, next(steps)),
                    beta=0.5,
                    backward=lambda loss: loss.backward(),
                )
            optimizer.step()
            optimizer.zero_grad()

        if config.active == config.pool_size:
            weights = torch.full((*batch.input_ids.shape, config.pool_size), config.scale, device=batch.mask.device)
            for r in adapter.routers.values():
                r.forward = lambda x: weights  # type: ignore[method-assign]
        return step, adapter.remove

    def _install_peft(self, model: torch.nn.Module, batch: Batch) -> tuple[Callable[[], None], Callable[[], None]]:
        import peft

        wrapped = peft.get_peft_model(
            model, peft.LoraConfig(r=self.peft_rank, lora_alpha=self.peft_rank, target_modules=TARGETS)
        )
        trained = [p for p in wrapped.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)

        def step() -> None:
            (batch_losses(model, batch).sum() / len(batch.targets)).backward()
            optimizer.step()
            optimizer.zero_grad()

        return step, lambda: wrapped.unload()


def arms(n: int, k: int, r: int) -> list[Arm]:
    pool = AdapterConfig(pool_size=n, active=k, rank=r)
    made = [
        Arm("frozen forward"),
        Arm(f"PEFT LoRA r = {k * r}", peft_rank=k * r),
        Arm(f"PEFT LoRA r = {n * r}", peft_rank=n * r),
        Arm(f"pool n = {n}, no router, M = 1", config=AdapterConfig(pool_size=n, active=n, rank=r)),
        Arm("ReMix, straight-through, M = 1", Router(selections=1, estimator="straight_through"), pool),
    ]
    for m in (2, 4):
        for gradient in ("mean", "one"):
            router = Router(selections=m, lora_gradient=gradient)
            made.append(Arm(f"ReMix, rtg, M = {m}, {gradient}", router, pool))
    made.append(Arm("ReMix, paper, M = 2, mean", Router(estimator="paper"), pool))
    made.append(Arm("ReMix, control_variate, M = 2, mean", Router(estimator="control_variate"), pool))
    return made


def timed(step: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    begun = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.shape:
        config = LlamaConfig(vocab_size=128256, num_key_value_heads=8, rope_theta=5e5, **SHAPES[args.shape])
        with torch.device(device):
            torch.set_default_dtype(DTYPES[args.dtype])
            model = LlamaForCausalLM(config).requires_grad_(False)
            torch.set_default_dtype(torch.float32)
    else:
        model = load_model(Model(name_or_path=args.model, dtype=args.dtype), device)
    random = np.random.default_rng(0)
    rows = [
        EncodedRow(random.integers(10, 40000, args.length).astype(np.int32), np.ones(args.length, bool), "bench")
        for _ in range(args.batch)
    ]
    batch = collate(rows).to(device)
    model.train()
    samples: dict[str, list[float]] = {}
    memory: dict[str, float] = {}
    everything = arms(8, 4, 8)
    for round_number in range(args.rounds):
        for arm in everything:
            step, remove = arm.install(model, batch)
            timed(step, device)  # warm-up
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            times = [timed(step, device) for _ in range(args.repeats)]
            samples.setdefault(arm.name, []).extend(times)
            if device.type == "cuda":
                memory[arm.name] = torch.cuda.max_memory_allocated() / 2**30
            remove()
        if round_number == 0 and device.type == "cuda":
            torch.cuda.empty_cache()
    reference = statistics.median(samples["PEFT LoRA r = 32"])
    table = Table(title=f"{args.shape or args.model}, {args.dtype}, {args.batch} x {args.length} tokens", box=None)
    for column in ("step", "median s", "min", "max", "/ PEFT r = 32", "peak GiB"):
        table.add_column(column, justify="left" if column == "step" else "right")
    for name, times in samples.items():
        median = statistics.median(times)
        peak = f"{memory[name]:.1f}" if memory else "-"
        table.add_row(
            name, f"{median:.3f}", f"{min(times):.3f}", f"{max(times):.3f}", f"{median / reference:.2f}", peak
        )
    Console().print(table)
    if args.json:
        args.json.write_text(
            json.dumps({"arguments": vars(args) | {"json": None}, "samples": samples, "memory": memory})
        )


if __name__ == "__main__":
    main()
