"""What many rows cost: time and memory of the first start, which encodes them, and of a second, which finds them kept.

    .venv/bin/python scripts/bench_data.py --rows 1000000

Writes rows of about 100 tokens and a model of a few numbers, whose memory does not count, with the demo model's
tokenizer (`make model`). A start is `remix train` to the end of its only step, in a process of its own. Memory is the
process's peak (VmHWM) less what it has once torch and the trainer are imported.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MODEL = "models/SmolLM2-135M-Instruct"
TEXT = (
    "the a of and to in is it that for on with as at by from this be are was or an have not they which one had "
    "word all there when up use how said each she their if will way about many then them write would like so these "
    "long make thing see him two has look more day could go come did number sound no most people over know water"
)
START = """
import sys, time
began = time.perf_counter()
from pathlib import Path
from rich.console import Console
from remix_cli.recipe import load_recipe
from remix_cli.train.trainer import train

def mib(name):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024

imported = mib("VmRSS")
train(load_recipe(Path(sys.argv[1])), Console(quiet=True), overwrite=True)
print(time.perf_counter() - began, imported, mib("VmHWM"))
"""


def write_rows(path: Path, count: int) -> None:
    """Questions and answers of some 50 tokens each, no two the same."""
    draw = random.Random(0)
    common = TEXT.split()
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            words = draw.choices(common, k=82)
            row = {"prompt": " ".join([*words[:40], f"{number}?"]), "completion": " ".join(words[40:])}
            file.write(json.dumps(row) + "\n")


def write_model(folder: Path) -> None:
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=512, tie_word_embeddings=True, **shape)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_recipe(folder: Path) -> Path:
    recipe = {
        "model": {"name_or_path": str(folder / "model"), "dtype": "float32"},
        "adapter": {"pool_size": 2, "active": 1, "rank": 1},
        "data": {"train": [{"path": str(folder / "rows.jsonl")}], "max_length": 256, "validation_limit": 64},
        "train": {"max_steps": 1, "per_device_eval_batch_size": 8},
        "output_dir": str(folder / "run"),
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe))  # which is YAML, too
    return path


def start(recipe: Path, cache: Path) -> tuple[float, float, float]:
    """Seconds, MiB once everything is imported, MiB at the most."""
    environment = os.environ | {"REMIX_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", START, str(recipe)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    seconds, imported, peak = map(float, done.stdout.split())
    return seconds, imported, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--starts", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_rows(folder / "rows.jsonl", arguments.rows)
        write_model(folder / "model")
        recipe = write_recipe(folder)
        print(f"{arguments.rows:,} rows, {(folder / 'rows.jsonl').stat().st_size / 2**20:.0f} MiB")
        for number in range(1, arguments.starts + 1):
            began = time.perf_counter()
            seconds, imported, peak = start(recipe, folder / "cache")
            print(
                f"start {number}: {seconds:.0f} s ({time.perf_counter() - began:.0f} s with the interpreter); "
                f"imported {imported:.0f} MiB, peak {peak:.0f} MiB, between them {peak - imported:.0f} MiB"
            )
        kept = sum(path.stat().st_size for path in (folder / "cache").rglob("*") if path.is_file())
        print(f"kept {kept / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
