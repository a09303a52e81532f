"""How a training step grows: with M, n, k, r, sequence length and model size, one thing changed at a time.

    python scripts/bench_growth.py --shape 8b --dtype bfloat16 --batch 4 --length 512         (random weights, GPU)

Each row is a whole step (rtg, `lora_gradient: one`, n = 8, k = 4, r = 8, M = 2 unless the row says otherwise), the
median of the repeats, its measured peak, and the peak that `remix validate` would estimate.

    python scripts/bench_growth.py --recipes configs/cards/llama3.1-8b-80gb.yaml                  (random weights, GPU)

The micro-batch of each recipe at its longest, and half of it: estimated and measured peak, every position supervised.
Published shapes need no weights; the 8B ones take 16 GB on the card while they are made, in 4 bits, too.
"""

import argparse
import gc
import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from bench_step import Arm, bench_model, bench_parser, random_batch, timed
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import AutoModelForCausalLM

from remix_cli.compat.bitsandbytes import keep_differentiable
from remix_cli.core.estimators.registry import make_estimator
from remix_cli.core.patch import Adapter, apply_adapter, set_module
from remix_cli.diagnostics.parameters import count_parameters
from remix_cli.errors import is_out_of_memory
from remix_cli.models import DTYPES, known_base, skeleton
from remix_cli.models.loading import load_config
from remix_cli.recipe import Recipe, load_recipe
from remix_cli.recipe.schema import Model
from remix_cli.train.memory import estimate_memory
from remix_cli.train.micro_batch import EagerGradients
from remix_cli.train.optim import make_optimizer

GIB = 2**30


def variants(batch: int, length: int) -> list[dict[str, int | str]]:
    """The usual case first, then what differs from it."""
    usual: dict[str, int | str] = {"n": 8, "k": 4, "r": 8, "m": 2, "batch": batch, "length": length, "gradient": "one"}
    changes: list[dict[str, int | str]] = [{}]
    changes += [{"m": m, "gradient": gradient} for m in (2, 4, 8) for gradient in ("one", "mean")][1:]
    changes += [{"n": n} for n in (5, 16, 32)]
    changes += [{"k": k} for k in (1, 2, 6)]
    changes += [{"r": r} for r in (4, 16, 32)]
    changes += [{"length": length * f // 2} for f in (1, 4, 8)]
    return [usual | change for change in changes]


def recipe_of(v: dict, dtype: str) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"name_or_path": "random", "dtype": dtype},
            "adapter": {"pool_size": v["n"], "active": v["k"], "rank": v["r"]},
            "router": {"selections": v["m"], "estimator": "rtg", "lora_gradient": v["gradient"]},
            "data": {"train": [{"path": "random"}]},
            "train": {"per_device_train_batch_size": v["batch"]},
            "output_dir": "none",
        }
    )


def random_base(model: Model, device: torch.device) -> Any:
    """The recipe's base with random weights, frozen; in 4 bits where the recipe says so."""
    config = load_config(known_base(model) or model)
    torch.set_default_dtype(DTYPES[model.dtype])
    try:
        with torch.device(device):
            base = AutoModelForCausalLM.from_config(config, attn_implementation=model.attn_implementation)
    finally:
        torch.set_default_dtype(torch.float32)
    if model.quantization == "4bit":
        put_in_4_bits(base, DTYPES[model.dtype], device)
    elif model.quantization != "none":
        raise SystemExit(f"model.quantization: {model.quantization} is not measured here; use none or 4bit")
    return base.requires_grad_(False)


def put_in_4_bits(base: Any, dtype: torch.dtype, device: torch.device) -> None:
    """As `load_model` has it: every linear layer but the output's."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for name, module in list(base.named_modules()):
        if type(module) is not nn.Linear or module is base.get_output_embeddings():
            continue
        biased = module.bias is not None
        made = Linear4bit(module.in_features, module.out_features, biased, dtype, quant_type="nf4", device="meta")
        made.weight = Params4bit(module.weight.data, requires_grad=False, quant_type="nf4", module=made)
        made.bias = module.bias
        set_module(base, name, made.to(device))
    keep_differentiable(base)


def step_of(recipe: Recipe, adapter: Adapter, rows: int, device: torch.device) -> Callable[[], None]:
    """One step of the recipe on one micro-batch of so many rows."""
    batch = random_batch(rows, recipe.data.max_length, torch.device("cpu"))
    estimator = make_estimator(recipe.router.estimator)
    gradients = EagerGradients(adapter, recipe.router, estimator, device, lambda loss: loss.backward(), lambda: 1.0)
    optimizer = make_optimizer(adapter, recipe)
    numbers = iter(range(10**9))

    def step() -> None:
        gradients.accumulate(batch, len(batch.targets), (0, next(numbers)))
        optimizer.step()
        optimizer.zero_grad()

    return step


def measured(recipe: Recipe, base: Any, device: torch.device, repeats: int) -> Iterator[dict[str, Any]]:
    """At half the recipe's micro-batch and at the whole: GiB estimated, most allocated and reserved; milliseconds."""
    whole, length = recipe.train.per_device_train_batch_size, recipe.data.max_length
    shape = skeleton(known_base(recipe.model) or recipe.model)  # for weights in 4 bits are packed, two in one
    counts = count_parameters(apply_adapter(shape, recipe.adapter_config(), seed=0))
    for rows in sorted({max(1, whole // 2), whole}):
        sized = recipe.train.model_copy(update={"per_device_train_batch_size": rows})
        row: dict[str, Any] = {"rows": rows, "length": length}
        adapter = apply_adapter(base, recipe.adapter_config(), seed=0)
        adapter.find_local()
        estimate = estimate_memory(recipe.model_copy(update={"train": sized}), base, counts, length)
        row["estimated"] = sum(estimate.values())
        if recipe.train.gradient_checkpointing:
            base.gradient_checkpointing_enable(
                {"use_reentrant": False, "context_fn": adapter.state.checkpoint_contexts}
            )
        base.train()
        step = step_of(recipe, adapter, rows, device)
        try:
            for _ in range(2):  # the first makes AdamW's moments
                timed(step, device)
            if device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            row["ms"] = 1000 * statistics.median(timed(step, device) for _ in range(repeats))
            if device.type == "cuda":
                row["allocated"] = torch.cuda.max_memory_allocated() / GIB
                row["reserved"] = torch.cuda.max_memory_reserved() / GIB
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            row["failed"] = "out of memory"
        del step
        adapter.remove()
        if recipe.train.gradient_checkpointing:
            base.gradient_checkpointing_disable()
        free(device)
        yield row


def free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def check_recipes(paths: list[Path], device: torch.device, repeats: int) -> list[dict[str, Any]]:
    """Prints a table of all; recipes of one base, one after another, share its weights."""
    table = Table(title="a step at the longest micro-batch, GiB", box=None)
    for column in ("recipe", "rows", "ms", "tokens/s", "estimated", "peak", "of estimate", "reserved", "of estimate"):
        table.add_column(column, justify="left" if column == "recipe" else "right")
    found, base, at_hand = [], None, None
    for path in paths:
        recipe = load_recipe(path)
        if recipe.model != at_hand:
            base = None
            free(device)
            base, at_hand = random_base(recipe.model, device), recipe.model
            free(device)
        for row in measured(recipe, base, device, repeats):
            found.append({"recipe": path.stem} | row)
            table.add_row(path.stem, f"{row['rows']} x {row['length']}", *figures_of(row))
            print(f"{path.stem}: {row}", flush=True)  # what is known if a later one fails
    Console(width=120).print(table)
    return found


def figures_of(row: dict[str, Any]) -> list[str]:
    """Time, tokens a second, and what was measured of the estimate; dashes where there is no GPU."""
    estimate = row["estimated"]
    if "failed" in row:
        return [row["failed"], "-", f"{estimate:.1f}", "-", "-", "-", "-"]
    pace = [f"{row['ms']:.0f}", f"{1000 * row['rows'] * row['length'] / row['ms']:,.0f}", f"{estimate:.1f}"]
    for name in ("allocated", "reserved"):
        pace += [f"{row[name]:.1f}", f"{row[name] / estimate:.2f}"] if name in row else ["-", "-"]
    return pace


def main() -> None:
    parser = bench_parser(__doc__ or "")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--recipes", type=Path, nargs="+", help="instead: these, estimated and measured")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.recipes:
        write(args, check_recipes(args.recipes, device, args.repeats))
        return
    model = bench_model(args.shape, args.model, args.dtype, device)
    model.train()
    table = Table(title=f"{args.shape or args.model}, {args.dtype}: a step of rtg", box=None)
    for column in ("n", "k", "r", "M", "LoRA gradient", "tokens", "ms", "of the first", "peak GiB", "estimated"):
        table.add_column(column, justify="right")
    rows = []
    for v in variants(args.batch, args.length):
        recipe = recipe_of(v, args.dtype)
        batch = random_batch(int(v["batch"]), int(v["length"]), device)
        arm = Arm("", recipe.router, recipe.adapter_config())
        step, remove = arm.install(model, batch)
        timed(step, device)
        timed(step, device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        ms = 1000 * statistics.median(timed(step, device) for _ in range(args.repeats))
        peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else float("nan")
        remove()
        counted = apply_adapter(model, recipe.adapter_config(), seed=0)
        estimate = sum(estimate_memory(recipe, model, count_parameters(counted), int(v["length"])).values())
        counted.remove()
        rows.append(v | {"ms": ms, "peak_gib": peak, "estimated_gib": estimate})
        figures = f"{ms:.0f}", f"{ms / rows[0]['ms']:.2f}", f"{peak:.1f}", f"{estimate:.1f}"
        tokens = f"{v['batch']} x {v['length']}"
        table.add_row(*(str(v[key]) for key in ("n", "k", "r", "m", "gradient")), tokens, *figures)
    Console(width=100).print(table)
    write(args, rows)


def write(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    if args.json:
        args.json.write_text(json.dumps({"arguments": {k: str(x) for k, x in vars(args).items()}, "rows": rows}))


if __name__ == "__main__":
    main()
