"""Which estimator trains the better model? A small multi-skill task, end to end through `remix train`, on a CPU.

    python scripts/study_synthetic.py --out DIR [--processes 2] [--seconds 1500]

A two-layer Llama learns 8 skills (8 permutations of 32 symbols; the skill's name stands in front of each
question), is frozen, and is then finetuned on 8 NEW permutations with routed LoRAs (n = 8, k = 2, r = 2).
Every arm gets the same steps and three seeds; the router's learning rate is chosen for each arm by its own
held-out loss, and the test loss is on rows that no choice has seen.
"""

import argparse
import itertools
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch
import yaml
from sweep import Sweep, run_all
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SKILLS, SYMBOLS, TURNS = 8, 32, 5
CHAT = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<bot> {{ m.content }} <eos> {% else %}"
    "<user> {{ m.content }} {% endif %}{% endfor %}{% if add_generation_prompt %}<bot> {% endif %}"
)
ARMS = {
    "paper, M = 2": ["router.estimator=paper", "router.selections=2"],
    "paper, M = 8": ["router.estimator=paper", "router.selections=8"],
    "rtg, M = 2": ["router.estimator=rtg", "router.selections=2"],
    "rtg, M = 8": ["router.estimator=rtg", "router.selections=8"],
    "control_variate, M = 2": ["router.estimator=control_variate", "router.selections=2"],
    "straight_through, M = 1": ["router.estimator=straight_through", "router.selections=1"],
}
FROZEN = {"frozen router, M = 2": ["router.selections=2", "router.learning_rate=0.0"]}
RATES = (0.03, 0.1, 0.3, 1.0)
SEEDS = (0, 1, 2)
RECIPE = {
    "model": {"dtype": "float32"},
    "adapter": {"pool_size": 8, "active": 2, "rank": 2},
    "data": {"max_length": 64, "validation_limit": 256},
    "train": {
        "learning_rate": 0.01,
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


def run_name(arm: str, rate: float, seed: int) -> str:
    return f"{arm}-rate{rate:g}-seed{seed}".replace(", M = ", "-m").replace(" ", "-")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=1500)
    args = parser.parse_args()
    out: Path = args.out
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "model").exists():
        write_base_model(out / "model")
        write_rows(out / "train.jsonl", 4000, 1, permutations(1))
        write_rows(out / "test.jsonl", 500, 2, permutations(1))
    recipe = RECIPE | {"output_dir": "unused"}
    recipe["model"] |= {"name_or_path": str(out / "model")}
    recipe["data"] |= {"train": [{"path": str(out / "train.jsonl"), "format": "messages"}]}
    (out / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    sweep = Sweep(out / "recipe.yaml", out / "runs", out / "results.jsonl", (), str(out / "test.jsonl"), args.processes)
    tuned = {
        run_name(arm, rate, seed): [*overrides, f"router.learning_rate={rate}", f"seed={seed}"]
        for seed, rate, (arm, overrides) in itertools.product(SEEDS, RATES, ARMS.items())
    }
    fixed = {
        run_name(arm, 0, seed): [*overrides, f"seed={seed}"] for seed in SEEDS for arm, overrides in FROZEN.items()
    }
    rows = run_all(sweep, fixed | tuned, time.monotonic() + args.seconds)
    print(f"{'arm':<26}{'rate':>6}{'held-out':>10}{'test (seeds)':>34}{'s/run':>8}")
    for arm, rates in [*((arm, (0.0,)) for arm in FROZEN), *((arm, RATES) for arm in ARMS)]:
        results = {rate: [rows.get(run_name(arm, rate, s), {}) for s in SEEDS] for rate in rates}
        whole = {rate: found for rate, found in results.items() if all("test_loss" in r for r in found)}
        for rate, found in sorted(whole.items(), key=lambda item: sum(r["eval_loss"] for r in item[1])):
            mean = {key: statistics.mean(r[key] for r in found) for key in ("eval_loss", "test_loss", "seconds")}
            seeds = " ".join(f"{r['test_loss']:.4f}" for r in found)
            print(
                f"{arm:<26}{rate:>6g}{mean['eval_loss']:>10.4f}{mean['test_loss']:>9.4f} ({seeds})"
                f"{mean['seconds']:>7.0f}"
            )


if __name__ == "__main__":
    main()
