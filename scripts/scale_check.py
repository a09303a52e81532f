"""What several cards give: tokens/s, memory, waiting times, and whether a killed run goes on. See scale_check.sh.

Every run is `remix train` itself, launched by accelerate, so that what is measured is what users get. Weights are
random, which changes neither speed nor memory. One line a run goes to OUT/results.jsonl as it ends; what is there
already is not run again; the table is OUT/table.md.
"""

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from bench_step import SHAPES
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

LAYOUTS: dict[str, dict[str, Any]] = {
    "whole": {},
    "sharded": {"train": {"shard_base": True}},
    "4-bit sharded": {"train": {"shard_base": True}, "model": {"quantization": "4bit"}},
}
ADAPTER = "adapter/adapter.safetensors"
WARM_UP = 3  # steps that wait for memory and kernels; they do not count
LENGTH = 512
JOINED = 8  # GSM8K rows in one: more than LENGTH tokens, so that every step has as many tokens as any other


@dataclass(frozen=True)
class Case:
    shape: str
    layout: str
    cards: int

    @property
    def name(self) -> str:
        return f"{self.shape}-{self.layout}-{self.cards}".replace(" ", "-")


def make_base(folder: Path, shape: dict[str, int], tokenizer: Any) -> None:
    """A Llama of random bfloat16 weights, written layer by layer, so that no memory need hold it whole."""
    vocabulary = len(tokenizer) if shape["hidden_size"] < 128 else 128_256
    heads = min(8, shape["num_attention_heads"])
    config = LlamaConfig(**shape, vocab_size=vocabulary, num_key_value_heads=heads, dtype=torch.bfloat16)
    config.architectures = ["LlamaForCausalLM"]
    with torch.device("meta"):
        skeleton = LlamaForCausalLM(config)
    files: dict[str, dict[str, torch.Size]] = {}
    for name, weight in skeleton.named_parameters():
        layer = name.split(".")[2] if ".layers." in name else "ends"
        files.setdefault(f"{layer}.safetensors", {})[name] = weight.shape
    folder.mkdir(parents=True)
    tokenizer.save_pretrained(folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for file, shapes in files.items():
        tensors = {}
        for name, size in shapes.items():
            tensors[name] = (torch.randn(size, device=device) * 0.02).to("cpu", torch.bfloat16)
        save_file(tensors, folder / file, metadata={"format": "pt"})
    index = {name: file for file, shapes in files.items() for name in shapes}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    config.save_pretrained(folder)  # last: whoever finds it finds the weights, too


def join_rows(path: Path, out: Path) -> None:
    """GSM8K's rows, several in one, all but the first question to be learnt."""
    with path.open() as lines:
        rows = [json.loads(line) for line in lines]
    with out.open("w") as file:
        for i in range(0, len(rows) - JOINED + 1, JOINED):
            texts = [f"{row['question']}\n{row['answer']}" for row in rows[i : i + JOINED]]
            prompt, completion = rows[i]["question"], "\n\n".join(texts)[len(rows[i]["question"]) :]
            file.write(json.dumps({"prompt": prompt, "completion": completion}) + "\n")


def recipe_of(case: Case, base: Path, rows: Path, out: Path, asked: argparse.Namespace) -> dict[str, Any]:
    """Joined GSM8K rows, the default adapter and a router that learns, a checkpoint in the middle and at the end."""
    recipe: dict[str, Any] = {
        "router": {"selections": 2},
        "model": {"name_or_path": str(base), "dtype": "float32" if asked.cpu else "bfloat16"},
        "data": {
            "train": [{"path": str(rows)}],
            "validation_fraction": 0.01,
            "validation_limit": 8,
            "max_length": LENGTH,
            "use_chat_template": False,
        },
        "train": {
            "max_steps": asked.steps,
            "per_device_train_batch_size": asked.batch,
            "per_device_eval_batch_size": 4,
            "save_steps": max(1, asked.steps // 2),
            "logging_steps": 1,
            "gradient_checkpointing": case.shape == "70b",
        },
        "output_dir": str(out),
    }
    for group, values in LAYOUTS[case.layout].items():
        recipe[group] |= values
    return recipe


def launched(recipe: Path, cards: int, cpu: bool, *more: str) -> subprocess.Popen:
    several = ["--multi_gpu"] if cards > 1 else []
    command = [sys.executable, "-m", "accelerate.commands.launch", *several, "--num_machines", "1", "--num_processes"]
    command += [str(cards), "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command += ["-m", "remix_cli", "train", str(recipe), *more]
    environment = os.environ | ({"ACCELERATE_USE_CPU": "true"} if cpu else {})
    environment["OMP_NUM_THREADS"] = environment.get("OMP_NUM_THREADS", "4")
    log = recipe.with_suffix(".log").open("a")
    return subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)


def steps_in(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    return [record for record in map(json.loads, lines) if "tokens_per_second" in record]


def family(launcher: int) -> list[int]:
    """A process and all that it has started: each rank leads a group of its own."""
    parents = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(process.name)] = int((process / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue
    found = [launcher]
    for process in found:  # grows while it is read
        found += [child for child, parent in parents.items() if parent == process]
    return found


def host_gib(launcher: int) -> float:
    """Memory of `family`; pages that several share count once (Pss)."""
    total = 0
    for process in family(launcher):
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / 2**20


def watch(process: subprocess.Popen, folder: Path) -> dict[str, float]:
    """Seconds to the first step and of the last checkpoint, and the most host memory, while it runs."""
    begun, first, last, saved, most = time.monotonic(), None, 0.0, None, 0.0
    while process.poll() is None:
        now = time.monotonic()
        done = len(steps_in(folder))
        if done and first is None:
            first = now - begun
        if done != last:
            last, saved = done, None
            at = now
        if saved is None and last and (folder / "checkpoints" / f"step-{int(last):06d}" / "manifest.json").is_file():
            saved = now - at
        most = max(most, host_gib(process.pid))
        time.sleep(0.2)
    return {"first_step_s": first or 0.0, "checkpoint_s": saved or 0.0, "host_gib": most}


def estimating(recipe: Path, cards: int) -> subprocess.Popen:
    """`remix validate` beside the run, so that the cards do not wait for it."""
    command = [sys.executable, "-m", "remix_cli", "validate", str(recipe), "--processes", str(cards), "--json"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def estimate_gib(estimate: subprocess.Popen) -> float:
    out, _ = estimate.communicate()
    return sum(json.loads(out)["memory_gib"].values()) if estimate.returncode == 0 else 0.0


def measure(case: Case, recipe: Path, folder: Path, cpu: bool) -> dict[str, Any]:
    estimate = estimating(recipe, case.cards)
    process = launched(recipe, case.cards, cpu, "--overwrite")
    seen = watch(process, folder)
    expected = estimate_gib(estimate)
    steps = steps_in(folder)
    if process.returncode or not steps:
        last = recipe.with_suffix(".log").read_text().strip().splitlines()
        errors = [line for line in last if "error:" in line] or last[-1:]
        return {"failed": errors[0][:200] if errors else f"exit {process.returncode}"}
    saving = yaml.safe_load(recipe.read_text())["train"]["save_steps"]
    # the step behind a checkpoint has waited for it, as has the last
    counted = [step for step in steps[WARM_UP:-1] if (step["step"] - 1) % saving]
    speed = statistics.median(step["tokens_per_second"] for step in counted or steps)
    peak = max(step.get("peak_memory_gib") or 0.0 for step in steps)
    measured = {"tokens_per_second": speed, "peak_gib": peak, "estimate_gib": expected}
    return measured | seen | {"steps": len(steps)}


def kill_and_go_on(case: Case, recipe: Path, folder: Path, on: list[int], cpu: bool) -> list[dict[str, Any]]:
    """Killed behind the checkpoint in the middle; copies of it go on at once on each of `on` cards: how far from the
    unbroken run do they end?"""
    wanted = load_file(folder / ADAPTER)
    shutil.rmtree(folder)  # the unbroken run's checkpoints would be taken for the new run's
    process = launched(recipe, case.cards, cpu)
    while process.poll() is None and not list((folder / "checkpoints").glob("step-*/manifest.json")):
        time.sleep(0.05)
    for one in family(process.pid):
        with suppress(ProcessLookupError):
            os.kill(one, signal.SIGKILL)
    process.wait()
    if (folder / ADAPTER).exists():
        return [
            {"killed_on": case.cards, "resumed_on": cards, "failed": "it had ended before the kill"} for cards in on
        ]
    started = []
    for cards in on:
        copy = folder.with_name(f"{folder.name}-on-{cards}")
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy)
        more = ["train.shard_base=false"] if cards == 1 and "sharded" in case.layout else []
        started.append((cards, copy, launched(recipe, cards, cpu, f"output_dir={copy}", *more, "--resume")))
    results = []
    for cards, copy, again in started:
        result: dict[str, Any] = {"killed_on": case.cards, "resumed_on": cards}
        if again.wait():
            results.append(result | {"failed": f"exit {again.returncode}"})
            continue
        found = load_file(copy / ADAPTER)
        same = all(found[name].equal(tensor) for name, tensor in wanted.items())
        far = max(float((found[n] - t).norm() / t.norm().clamp_min(1e-12)) for n, t in wanted.items())
        results.append(result | {"same_bits": same, "distance": far})
    return results


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: a line a run; speed as a ratio to one card's whole base of the same shape, where that was measured."""
    one = {
        r["shape"]: r["tokens_per_second"]
        for r in results
        if (r["layout"], r["cards"]) == ("whole", 1) and "tokens_per_second" in r
    }
    lines = [
        "| shape | base | cards | tokens/s | ratio | peak GiB | estimate | host GiB | first step s | checkpoint s |"
    ]
    lines.append("|---|---|---|---|---|---|---|---|---|---|")
    for r in results:
        if "killed_on" in r:
            continue
        start = f"| {r['shape']} | {r['layout']} | {r['cards']} |"
        if "failed" in r:
            lines.append(f"{start} {r['failed']} | | | | | | |")
            continue
        ratio = f"{r['tokens_per_second'] / one[r['shape']]:.2f}" if r["shape"] in one else ""
        lines.append(
            f"{start} {r['tokens_per_second']:,.0f} | {ratio} | {r['peak_gib']:.1f} | {r['estimate_gib']:.1f} "
            f"| {r['host_gib']:.1f} | {r['first_step_s']:.0f} | {r['checkpoint_s']:.1f} |"
        )
    for r in results:
        if "killed_on" in r:
            what = r["failed"] if "failed" in r else "same bits" if r["same_bits"] else f"distance {r['distance']:.1e}"
            where = f"{r['shape']} {r['layout']}: killed on {r['killed_on']}, resumed on {r['resumed_on']}"
            lines.append(f"\n{where}: {what}")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rows", type=Path, required=True, help="GSM8K's train.jsonl")
    parser.add_argument("--tokenizer", required=True, help="a model folder")
    parser.add_argument("--shapes", nargs="+", default=["8b", "70b"], choices=SHAPES)
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS), choices=LAYOUTS)
    parser.add_argument("--depth", type=int, help="so many layers instead of the shape's")
    parser.add_argument("--cards", nargs="+", type=int, help="by default 1, 2, 4 ... as many as there are")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch", type=int, default=8, help="rows of 512 tokens a card and step")
    parser.add_argument("--cpu", action="store_true")
    asked = parser.parse_args()
    there = torch.cuda.device_count()
    cards = asked.cards or [n for n in (1, 2, 4, 8) if n <= there] or [1, 2]
    asked.out.mkdir(parents=True, exist_ok=True)
    file = asked.out / "results.jsonl"
    results = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []

    def keep(result: dict[str, Any]) -> None:
        results.append(result)
        with file.open("a") as lines:
            lines.write(json.dumps(result) + "\n")
        (asked.out / "table.md").write_text(table(results))
        print(json.dumps(result), flush=True)

    tokenizer = AutoTokenizer.from_pretrained(asked.tokenizer)
    rows = asked.out / "rows.jsonl"
    join_rows(asked.rows, rows)
    for shape in asked.shapes:
        numbers = SHAPES[shape] | ({"num_hidden_layers": asked.depth} if asked.depth else {})
        base = asked.out / f"base-{shape}"
        if not (base / "config.json").is_file():
            make_base(base, numbers, tokenizer)
        for case in [Case(shape, layout, n) for layout in asked.layouts for n in cards]:
            if case.layout == "sharded" and case.cards == 1:
                continue
            known = {"shape": shape, "layout": case.layout, "cards": case.cards, "layers": numbers["num_hidden_layers"]}
            if any(known.items() <= result.items() and "killed_on" not in result for result in results):
                continue
            folder = asked.out / case.name
            values = recipe_of(case, base, rows, folder, asked)
            if case.cards == 1:
                values["train"].pop("shard_base", None)
            recipe = asked.out / f"{case.name}.yaml"
            recipe.write_text(yaml.safe_dump(values, sort_keys=False))
            measured = measure(case, recipe, folder, asked.cpu)
            keep(known | measured)
            if case.cards == max(cards) > 1 and case.layout == "sharded" and "failed" not in measured:
                for result in kill_and_go_on(case, recipe, folder, [case.cards, case.cards // 2], asked.cpu):
                    keep(known | result)


if __name__ == "__main__":
    main()
