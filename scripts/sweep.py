"""Train many variants of one recipe, several processes at once, and tabulate what came out.

    python scripts/sweep.py RECIPE --runs RUNS.json --out DIR [--processes 8] [--seconds 560] [key=value ...]

RUNS.json maps a run's name to its list of overrides. Each finished run appends one JSON line to
DIR/results.jsonl: held-out loss, loss on `--test FILE`, routing statistics, seconds a step. Processes are dealt
to the GPUs in turn. A run already listed is skipped, so the command can be repeated; runs still going at
--seconds are stopped. scripts/study_estimators.py chains several sweeps.
"""

import argparse
import gc
import json
import multiprocessing
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@dataclass(frozen=True)
class Sweep:
    """What every run of a sweep shares. `results` is appended to; run folders lie under `out`."""

    recipe: Path
    out: Path
    results: Path
    overrides: tuple[str, ...] = ()
    test: str | None = None
    processes: int = 8

    def finished(self) -> dict[str, dict[str, Any]]:
        if not self.results.exists():
            return {}
        return {row["name"]: row for row in map(json.loads, self.results.read_text().splitlines())}


def one_run(sweep: Sweep, name: str, overrides: list[str]) -> dict[str, Any]:
    """Train, then measure the final adapter on the test rows."""
    from rich.console import Console

    from remix_cli.evaluate.nll import mean_loss, row_losses
    from remix_cli.evaluate.tasks import task_examples
    from remix_cli.recipe import Task, load_recipe
    from remix_cli.runs import load_run
    from remix_cli.stats.routing import collect
    from remix_cli.train.loop import train

    folder = sweep.out / name
    with (sweep.out / f"{name}.log").open("w") as log:
        loaded = load_recipe(sweep.recipe, [*overrides, f"output_dir={folder}"])
        summary = train(loaded, Console(file=log, width=120), overwrite=True)
    run = load_run(folder)
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    held = [m["eval_loss"] for m in metrics if "eval_loss" in m]
    logged = [m for m in metrics if "loss" in m]
    result: dict[str, Any] = {
        "eval_loss": held[-1],
        "best_eval_loss": summary["best_eval_loss"],
        "train_loss": sum(m["loss"] for m in logged[-5:]) / len(logged[-5:]),
        "peak_memory_gib": logged[-1]["peak_memory_gib"],
        "step_seconds": sorted(m["step_seconds"] for m in logged)[len(logged) // 2],
        "trained": summary["parameters"]["trained"],
        "entropy": logged[-1]["router_entropy"],
        "beta": logged[-1]["control_variate_beta"],
    }
    if sweep.test:
        source = loaded.data.train[0].model_copy(update={"path": sweep.test})
        rows = run.encoder.encode_rows(task_examples(loaded, Task(task="nll", source=source))).rows
        result["test_loss"] = mean_loss(row_losses(run.model, run.adapter, rows, 64))
        blocks = collect(run, rows[:128], 32, lambda _: None)
        for key in ("entropy", "ess_q", "ess_weights", "token_information", "commonest_set"):
            result[f"routing_{key}"] = sum(getattr(b, key) for b in blocks) / len(blocks)
        result["routing_dead"] = sum(len(b.dead) for b in blocks)
    return result


def accuracy(sweep: Sweep, name: str, overrides: list[str]) -> dict[str, Any]:
    """Greedy GSM8K accuracy on the test rows of a run that lies in `out`."""
    from remix_cli.evaluate.run import evaluate
    from remix_cli.evaluate.tasks import Settings
    from remix_cli.recipe import Source, Task
    from remix_cli.runs import load_run

    run = load_run(sweep.out / name.removesuffix(":accuracy"))
    task = Task(task="gsm8k", source=Source(path=sweep.test, format="gsm8k"))
    (result,) = evaluate(run, [task], Settings(), lambda *_: _Silent())["results"]
    return result["scores"] | {"count": result["count"], "intervals": result["intervals"]}


class _Silent:
    def advance(self, *_: float) -> None:
        pass


def _worker(queue: Any, sweep: Sweep, job: Any, index: int) -> None:
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if len(gpus) > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[index % len(gpus)]  # before torch looks
    import torch

    torch.set_num_threads(max(1, (os.cpu_count() or 2) // sweep.processes))
    while (item := queue.get()) is not None:
        name, overrides = item
        begun = time.monotonic()
        try:
            result = job(sweep, name, [*sweep.overrides, *overrides])
        except Exception as error:  # a failed variant is a result, too
            result = {"error": f"{type(error).__name__}: {error}"}
        line = {"name": name, "overrides": overrides} | result | {"seconds": time.monotonic() - begun}
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # the other processes need it
        with sweep.results.open("a") as file:
            file.write(json.dumps(line) + "\n")


def run_all(sweep: Sweep, runs: dict[str, list[str]], end: float, job: Any = one_run) -> dict[str, dict[str, Any]]:
    """Do what is not yet in the results, until `end` (time.monotonic), and return every finished row by name."""
    sweep.out.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    todo = [(name, overrides) for name, overrides in runs.items() if name not in sweep.finished()]
    for item in [*todo, *[None] * sweep.processes]:
        queue.put(item)
    count = min(sweep.processes, len(todo))
    workers = [context.Process(target=_worker, args=(queue, sweep, job, i)) for i in range(count)]
    for process in workers:
        process.start()
    for process in workers:
        process.join(max(0, end - time.monotonic()))
        process.kill()
    return sweep.finished()


def print_table(rows: dict[str, dict[str, Any]]) -> None:
    for name, row in sorted(rows.items(), key=lambda item: item[1].get("test_loss", 99)):
        if "strict" in row:
            figures = [
                f"{k} {100 * row[k]:.2f} ({' to '.join(f'{100 * x:.2f}' for x in row['intervals'][k])})"
                for k in ("strict", "flexible")
            ]
            print(f"{name:<40} {', '.join(figures)}, {row['seconds']:.0f} s")
            continue
        if "step_seconds" not in row or "test_loss" not in row:
            print(f"{name:<40} {row.get('error', row)!s:.110}")
            continue
        print(
            f"{name:<40} held {row['eval_loss']:.4f} test {row['test_loss']:.4f} H {row['routing_entropy']:.2f} "
            f"MI {row['routing_token_information']:.2f} dead {row['routing_dead']:>3} "
            f"{1000 * row['step_seconds']:.0f} ms {row['peak_memory_gib']:.0f} GiB {row['seconds']:.0f} s"
        )


def parser(doc: str) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("recipe", type=Path)
    made.add_argument("overrides", nargs="*")
    made.add_argument("--out", type=Path, required=True, help="run folders and logs")
    made.add_argument("--results", type=Path, help="default: OUT/results.jsonl")
    made.add_argument("--processes", type=int, default=8)
    made.add_argument("--seconds", type=float, default=560)
    made.add_argument("--test", help="rows for the test loss")
    return made


def sweep_of(args: argparse.Namespace) -> Sweep:
    results = args.results or args.out / "results.jsonl"
    return Sweep(args.recipe, args.out, results, tuple(args.overrides), args.test, args.processes)


def main() -> None:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--runs", type=Path, required=True, help="JSON: run name -> list of overrides")
    args = arguments.parse_intermixed_args()
    print_table(run_all(sweep_of(args), json.loads(args.runs.read_text()), time.monotonic() + args.seconds))


if __name__ == "__main__":
    main()
