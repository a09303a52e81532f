"""How a training step grows: with M, n, k, r, sequence length and model size, one thing changed at a time.

    python scripts/bench_growth.py --shape 8b --dtype bfloat16 --batch 4 --length 512         (random weights, GPU)

Each row is a whole step (rtg, `lora_gradient: one`, n = 8, k = 4, r = 8, M = 2 unless the row says otherwise), the
median of the repeats, its measured peak, and the peak that `remix validate` would estimate.
"""

import json
import statistics

import torch
from bench_step import Arm, bench_model, bench_parser, random_batch, timed
from rich.console import Console
from rich.table import Table

from remix_cli.core.patch import apply_adapter
from remix_cli.diagnostics.parameters import count_parameters
from remix_cli.recipe import Recipe
from remix_cli.train.preview import estimate_memory


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


def main() -> None:
    parser = bench_parser(__doc__ or "")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
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
        estimate = sum(estimate_memory(recipe, model.config, count_parameters(counted), int(v["length"])).values())
        counted.remove()
        rows.append(v | {"ms": ms, "peak_gib": peak, "estimated_gib": estimate})
        figures = f"{ms:.0f}", f"{ms / rows[0]['ms']:.2f}", f"{peak:.1f}", f"{estimate:.1f}"
        tokens = f"{v['batch']} x {v['length']}"
        table.add_row(*(str(v[key]) for key in ("n", "k", "r", "m", "gradient")), tokens, *figures)
    Console(width=100).print(table)
    if args.json:
        args.json.write_text(json.dumps({"arguments": {k: str(x) for k, x in vars(args).items()}, "rows": rows}))


if __name__ == "__main__":
    main()
