"""Train many variants of one recipe, several processes at once on one device, and tabulate what came out.

    python scripts/sweep.py RECIPE RUNS.json --out DIR [--processes 8] [--seconds 560] [key=value ...]

RUNS.json maps a run's name to its list of overrides. Each finished run appends one JSON line to
DIR/results.jsonl: best and last held-out loss, loss on `--test FILE`, routing statistics, seconds a step. A run
already listed is skipped, so the command can be repeated; runs still going at --seconds are stopped.
"""

import argparse
import gc
import json
import multiprocessing
import os
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def one_run(recipe: Path, name: str, overrides: list[str], out: Path, test: str | None) -> dict:
    from rich.console import Console

    from remix_cli.evaluate.nll import mean_loss, row_losses
    from remix_cli.evaluate.run import task_examples
    from remix_cli.recipe import Task, load_recipe
    from remix_cli.runs import load_run
    from remix_cli.stats.routing import collect
    from remix_cli.train.loop import train

    folder = out / name
    with (out / f"{name}.log").open("w") as log:
        loaded = load_recipe(recipe, [*overrides, f"output_dir={folder}"])
        summary = train(loaded, Console(file=log, width=120), overwrite=True)
    run = load_run(folder)
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    held = [m["eval_loss"] for m in metrics if "eval_loss" in m]
    logged = [m for m in metrics if "loss" in m]
    result = {
        "name": name,
        "overrides": overrides,
        "eval_loss": held[-1],
        "best_eval_loss": summary["best_eval_loss"],
        "train_loss": sum(m["loss"] for m in logged[-5:]) / len(logged[-5:]),
        "peak_memory_gib": logged[-1]["peak_memory_gib"],
        "step_seconds": sorted(m["step_seconds"] for m in logged)[len(logged) // 2],
        "trained": summary["parameters"]["trained"],
        "entropy": logged[-1]["router_entropy"],
    }
    if test:
        source = loaded.data.train[0].model_copy(update={"path": test})
        rows = run.encoder.encode_rows(task_examples(loaded, Task(task="nll", source=source))).rows
        result["test_loss"] = mean_loss(row_losses(run.model, rows, 64))
        blocks = collect(run, rows[:128], 32, lambda _: None)
        for key in ("entropy", "ess_q", "ess_weights", "token_information", "commonest_set"):
            result[f"routing_{key}"] = sum(getattr(b, key) for b in blocks) / len(blocks)
        result["routing_dead"] = sum(len(b.dead) for b in blocks)
    return result


def worker(queue, recipe: Path, out: Path, shared: list[str], test: str | None) -> None:
    import torch

    torch.set_num_threads(max(1, (os.cpu_count() or 2) // 8))
    while True:
        item = queue.get()
        if item is None:
            return
        name, overrides = item
        begun = time.monotonic()
        try:
            result = one_run(recipe, name, [*shared, *overrides], out, test)
        except Exception as error:  # a failed variant is a result, too
            result = {"name": name, "overrides": overrides, "error": f"{type(error).__name__}: {error}"}
        result["seconds"] = time.monotonic() - begun
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # the other processes need it
        with (out / "results.jsonl").open("a") as file:
            file.write(json.dumps(result) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("runs", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=560)
    parser.add_argument("--test")
    args = parser.parse_intermixed_args()
    args.out.mkdir(parents=True, exist_ok=True)
    results = args.out / "results.jsonl"
    done = {json.loads(line)["name"] for line in results.read_text().splitlines()} if results.exists() else set()
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    for name, overrides in json.loads(args.runs.read_text()).items():
        if name not in done:
            queue.put((name, overrides))
    for _ in range(args.processes):
        queue.put(None)
    jobs = (queue, args.recipe, args.out, args.overrides, args.test)
    workers = [context.Process(target=worker, args=jobs) for _ in range(args.processes)]
    for process in workers:
        process.start()
    end = time.monotonic() + args.seconds
    for process in workers:
        process.join(max(0, end - time.monotonic()))
        process.kill()
    rows = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    for row in sorted(rows, key=lambda r: r.get("eval_loss", 99)):
        if "error" in row:
            print(f"{row['name']:<32} {row['error'][:90]}")
            continue
        print(
            f"{row['name']:<32} eval {row['eval_loss']:.4f} test {row.get('test_loss', 0):.4f} "
            f"H {row.get('routing_entropy', 0):.2f} MI {row.get('routing_token_information', 0):.3f} "
            f"dead {row.get('routing_dead', 0):>3} {1000 * row['step_seconds']:.0f} ms {row['seconds']:.0f} s"
        )


if __name__ == "__main__":
    main()
