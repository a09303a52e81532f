"""Which estimator, and which method, trains the better model? A small multi-skill task through `remix sweep`, on a CPU.

    python scripts/study_synthetic.py --out DIR [--processes 2] [--only REGEX]

A two-layer Llama learns 8 skills (8 permutations of 32 symbols; the skill's name stands in front of each
question), is frozen, and is then finetuned on 8 NEW permutations with routed LoRAs (n = 8, k = 2, r = 2) or without.
Every arm gets the same steps, four rates of its own to choose from by held-out loss, and three seeds; the test loss
is on rows that no choice has seen. DIR/sweep.yaml is what is run: `remix sweep DIR/sweep.yaml` goes on with it.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SKILLS, SYMBOLS, TURNS = 8, 32, 5
CHAT = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<bot> {{ m.content }} <eos> {% else %}"
    "<user> {{ m.content }} {% endif %}{% endfor %}{% if add_generation_prompt %}<bot> {% endif %}"
)
ROUTER_RATES = {"router.learning_rate": [0.03, 0.1, 0.3, 1.0]}
RATES = {"train.learning_rate": [0.005, 0.01, 0.02, 0.04]}


def remix(estimator: str, selections: int, active: int = 2) -> dict[str, Any]:
    adapter = {"method": "remix", "pool_size": 8, "active": active, "rank": 2}
    router = {"router.estimator": estimator, "router.selections": selections}
    return {"adapter": adapter, "train.learning_rate": 0.01} | router | ROUTER_RATES


ARMS: dict[str, dict[str, Any]] = {
    **{f"rsLoRA-r{rank}": {"adapter": {"method": "rslora", "rank": rank}} | RATES for rank in (4, 2, 8, 16)},
    "rtg-M2": remix("rtg", 2),
    "rtg-M2-k1": remix("rtg", 2, active=1),
    "rtg-M2-k4": remix("rtg", 2, active=4),
    "MixLoRA": {"adapter": {"method": "mixlora", "pool_size": 8, "active": 2, "rank": 2}} | RATES,
    "HydraLoRA": {"adapter": {"method": "hydralora", "pool_size": 8, "rank": 2}} | RATES,
    "rtg-M4": remix("rtg", 4),
    "rtg-M8": remix("rtg", 8),
    "paper-M2": remix("paper", 2),
    "paper-M8": remix("paper", 8),
    "control_variate-M2": remix("control_variate", 2),
    "straight_through-M1": remix("straight_through", 1),
    "frozen-M2": remix("control_variate", 2) | {"router.learning_rate": 0} | RATES,  # the default: none is read
}
RECIPE: dict[str, Any] = {
    "model": {"dtype": "float32"},
    "data": {"max_length": 64, "validation_limit": 256},
    "train": {
        "max_steps": 400,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 128,
        "logging_steps": 50,
    },
}


def write_rows(path: Path, rows: int, seed: int, permutations: np.ndarray) -> None:
    """Conversations of TURNS questions, each of a skill and symbol of its own."""
    random = np.random.default_rng(seed)
    with path.open("w") as file:
        for _ in range(rows):
            messages = []
            for skill, symbol in zip(
                random.integers(0, SKILLS, TURNS), random.integers(0, SYMBOLS, TURNS), strict=True
            ):
                messages.append({"role": "user", "content": f"t{skill} s{symbol}"})
                messages.append({"role": "assistant", "content": f"s{permutations[skill, symbol]}"})
            file.write(json.dumps({"messages": messages}) + "\n")


def permutations(seed: int) -> np.ndarray:
    """(SKILLS, SYMBOLS)"""
    random = np.random.default_rng(seed)
    return np.stack([random.permutation(SYMBOLS) for _ in range(SKILLS)])


def write_base_model(folder: Path, steps: int = 1500) -> None:
    """A decoder that has learnt the first 8 skills from scratch, with a tokenizer of one token a word."""
    words = ["<eos>", "<user>", "<bot>", *[f"t{i}" for i in range(SKILLS)], *[f"s{i}" for i in range(SYMBOLS)]]
    index = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(index, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>", unk_token="<eos>")
    fast.chat_template = CHAT
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    known, random = torch.from_numpy(permutations(0)), torch.Generator().manual_seed(0)
    for step in range(steps):
        skill = torch.randint(0, SKILLS, (64, TURNS), generator=random)
        symbol = torch.randint(0, SYMBOLS, (64, TURNS), generator=random)
        user, bot, end = (torch.full_like(skill, index[w]) for w in ("<user>", "<bot>", "<eos>"))
        answer = known[skill, symbol] + index["s0"]
        turns = [user, skill + index["t0"], symbol + index["s0"], bot, answer, end]
        ids = torch.stack(turns, dim=-1).flatten(1)  # (64, 6 TURNS)
        logits = model(ids).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        learnt = torch.isin(torch.arange(1, ids.shape[1]) % 6, torch.tensor([4, 5])).expand(len(ids), -1)
        loss = loss[learnt.flatten()].mean()
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - step / steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"base model: loss {loss.item():.4f} on the skills it was trained on", flush=True)
    model.save_pretrained(folder)
    fast.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--only", help="regular expression on the arms")
    args = parser.parse_args()
    out: Path = args.out
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "model").exists():
        write_rows(out / "train.jsonl", 4000, 1, permutations(1))
        write_rows(out / "test.jsonl", 500, 2, permutations(1))
        write_base_model(out / "model")
    rows = {name: {"path": str(out / f"{name}.jsonl"), "format": "messages"} for name in ("train", "test")}
    recipe = RECIPE | {
        "model": RECIPE["model"] | {"name_or_path": str(out / "model")},
        "data": RECIPE["data"] | {"train": [rows["train"]]},
        "eval": {"batch_size": 128, "tasks": [{"task": "nll", "source": rows["test"]}]},
        "output_dir": str(out / "runs"),
        "sweep": {"seeds": [0, 1, 2], "arms": ARMS},
    }
    (out / "sweep.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    command = ["sweep", str(out / "sweep.yaml"), "--processes", str(args.processes)]
    more = ["--only", args.only] if args.only else []
    sys.exit(subprocess.run([sys.executable, "-m", "remix_cli", *command, *more], check=False).returncode)


if __name__ == "__main__":
    main()
