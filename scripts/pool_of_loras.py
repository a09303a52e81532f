"""A pool made of LoRAs that were trained apart: routed, against the best single one, their sum and their mean.

    python scripts/pool_of_loras.py DIR --seeds 0 1        writes DIR/results.jsonl, prints the table of docs/results
    python scripts/pool_of_loras.py DIR --seeds 1 2 3 --loras 0 --arms alone    routers alone, over the LoRAs of seed 0

The base model is a small one that has only learnt to copy five digits. Eight skills ask for something else (reversed,
sorted, rotated ...); the prompt's first word names the skill. One LoRA of rank 4 is trained for each skill and exported
as a PEFT folder; then pools of all eight (`adapter.init_from`), one LoRA for a prompt, are trained on the rows of all
skills: routers alone (of each block or one for the model, reading the prompt or its cluster), and LoRAs and router.
What is already in DIR is not trained again.
"""

import argparse
import json
import random
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from remix_cli.core.config import AdapterConfig
from remix_cli.core.lora_folder import load_pool, read_lora
from remix_cli.core.patch import Adapter
from remix_cli.data.encode import Encoder, load_examples
from remix_cli.data.rows import EncodedRow
from remix_cli.evaluation.nll import row_losses
from remix_cli.export.peft_folder import export_peft
from remix_cli.methods.apply import apply_method, unadapted
from remix_cli.models import load_model, load_tokenizer
from remix_cli.recipe import Recipe, Source, load_recipe
from remix_cli.runs import load_run
from remix_cli.train.trainer import train

Digits = list[int]
SKILLS: dict[str, Callable[[Digits], Digits]] = {
    "reversed": lambda digits: digits[::-1],
    "sorted": sorted,
    "falling": lambda digits: sorted(digits, reverse=True),
    "rotated": lambda digits: digits[1:] + digits[:1],
    "successor": lambda digits: [(digit + 1) % 10 for digit in digits],
    "complement": lambda digits: [9 - digit for digit in digits],
    "sums": lambda digits: [total % 10 for total in accumulate(digits)],
    "first": lambda digits: digits[:1] * len(digits),
}
RANK, LENGTH = 4, 5
CLUSTERS = 256  # so many that a prompt's cluster says its skill
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA = {"method": "rslora", "rank": RANK, "target_modules": TARGETS}
RATE, BATCH = {"learning_rate": 1e-2}, {"per_device_train_batch_size": 32}
Losses = dict[str, float]  # nats per supervised token, by skill


def write_rows(path: Path, skills: list[str], count: int, seed: int) -> None:
    """`count` rows of each skill."""
    draw = random.Random(seed)
    with path.open("w") as file:
        for skill in skills:
            for _ in range(count):
                digits = [draw.randrange(10) for _ in range(LENGTH)]
                said = {"prompt": f"{skill} {_text(digits)} :", "completion": _text(SKILLS[skill](digits))}
                file.write(json.dumps(said) + "\n")


def _text(digits: Digits) -> str:
    return " ".join(map(str, digits))


def write_base(folder: Path) -> None:
    """A Llama of two layers that copies, whatever the skill's name."""
    words = ["<pad>", "<eos>", ".", ":", *map(str, range(10)), *SKILLS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="."))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>", unk_token=".")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        eos_token_id=1,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    first_digit, first_skill = words.index("0"), words.index(next(iter(SKILLS)))
    for _ in range(800):
        digits = torch.randint(10, (32, LENGTH)) + first_digit
        names = torch.randint(len(SKILLS), (32, 1)) + first_skill
        rows = torch.cat([names, digits, torch.full((32, 1), words.index(":")), digits, torch.ones(32, 1).long()], 1)
        labels = rows.clone()
        labels[:, : LENGTH + 2] = -100
        loss = model(input_ids=rows, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    print(f"base model: copies with a loss of {float(loss.detach()):.3f}", flush=True)
    model.save_pretrained(folder)
    fast.save_pretrained(folder)


def recipe_of(folder: Path, output: Path, skills: list[str], seed: int, steps: int, **groups: Any) -> Recipe:
    rows = [{"path": str(folder / f"{skill}.jsonl"), "task": skill} for skill in skills]
    values = {
        "model": {"name_or_path": str(folder / "base"), "dtype": "float32"},
        "data": {"train": rows, "validation_fraction": 0.0, "max_length": 32},
        "output_dir": str(output),
        "seed": seed,
    } | groups
    usual = {"max_steps": steps, "num_train_epochs": 99, "lr_scheduler_type": "linear", "warmup_ratio": 0.1}
    values["train"] = usual | groups.get("train", {})
    path = output.with_suffix(".yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(values))
    return load_recipe(path)


def trained(recipe: Recipe) -> Path:
    output = Path(recipe.output_dir)
    train(recipe, Console(quiet=True), resume=(output / "recipe.yaml").is_file())
    return output


def measured(adapter: Adapter, rows: list[EncodedRow]) -> Losses:
    found = row_losses(adapter.model, adapter, rows, 256)
    losses = {}
    for skill in SKILLS:
        own = [loss for loss, row in zip(found, rows, strict=True) if row.task == skill]
        losses[skill] = sum(loss.nats for loss in own) / sum(loss.tokens for loss in own)
    return losses


def measured_run(run: Path, rows: list[EncodedRow]) -> Losses:
    return measured(load_run(run).adapter, rows)


def measured_together(recipe: Recipe, folders: list[Path], rows: list[EncodedRow], share: float) -> Losses:
    """All LoRAs at once, each at `share` of its own scale."""
    model = load_model(recipe.model, torch.device("cpu"))
    config = AdapterConfig(pool_size=len(folders), active=len(folders), rank=RANK, target_modules=tuple(TARGETS))
    adapter = apply_method(model, config, seed=0)
    tensors, _ = load_pool([read_lora(folder) for folder in folders], config.scale)
    scaled = {name: x * share if name.endswith("lora_B") else x for name, x in tensors.items()}
    adapter.load(adapter.tensors() | scaled)
    return measured(adapter, rows)


def arms_over(folders: list[Path]) -> dict[str, tuple[Any, Any, Any]]:
    """What is trained on the rows of all skills, by name: its `adapter`, `router` (None without) and `train` keys."""
    pool = {"pool_size": len(folders), "active": 1, "rank": RANK, "target_modules": TARGETS}
    pool["init_from"] = [str(one) for one in folders]
    frozen = pool | {"train_loras": False}
    return {
        "pool, the router alone": (frozen, {}, {}),
        "pool, the router alone, clusters": (frozen, {"clusters": CLUSTERS}, {}),
        "pool, one router alone for all blocks": (frozen, {"scope": "model"}, {}),
        "pool, one router alone for all blocks, clusters": (frozen, {"scope": "model", "clusters": CLUSTERS}, {}),
        "pool, router and LoRAs trained": (pool, {}, RATE),
        "pool, the LoRAs trained, a random router": (pool, {"fixed": True}, RATE),
        "one new LoRA": (LORA, None, RATE),
        "one new LoRA of rank 32": (LORA | {"rank": RANK * len(folders)}, None, RATE),
    }


def one_seed(folder: Path, seed: int, steps: int, loras: int, named: str) -> dict[str, Losses]:
    """`loras`: the seed of the LoRAs that the pool is made of; `named`: the arms whose names hold it."""
    theirs = folder / f"seed{loras}"
    here = theirs if loras == seed else folder / f"seed{seed}-loras{loras}"
    runs, folders = {}, []
    for skill in SKILLS:
        recipe = recipe_of(folder, theirs / skill, [skill], loras, steps, adapter=LORA, train=RATE | BATCH)
        runs[skill] = load_run(trained(recipe))
        folders.append(theirs / f"{skill}-peft")
        if not folders[-1].exists():
            export_peft(runs[skill], folders[-1])
    encoder = Encoder.of(load_tokenizer(recipe.model), recipe.data)
    rows: list[EncodedRow] = []
    for skill in SKILLS:
        tested, _ = load_examples([Source(path=str(folder / f"test-{skill}.jsonl"), task=skill)])
        rows += encoder.encode_rows(tested).rows
    found = {"base model": measured(unadapted(load_model(recipe.model, torch.device("cpu"))), rows)}
    for skill, run in runs.items():
        found[f"alone: {skill}"] = measured(run.adapter, rows)
    found["sum of the eight"] = measured_together(recipe, folders, rows, 1.0)
    found["mean of the eight"] = measured_together(recipe, folders, rows, 1 / len(folders))
    for name, (adapter, router, rate) in arms_over(folders).items():
        if named not in name:
            continue
        groups = {"adapter": adapter, "train": rate | BATCH}
        if router is not None:
            groups["router"] = {"level": "sequence"} | router
        output = here / name.replace(",", "").replace(" ", "-")
        found[name] = measured_run(trained(recipe_of(folder, output, [*SKILLS], seed, steps, **groups)), rows)
    return found


def mean(losses: Losses) -> float:
    return sum(losses.values()) / len(losses)


def table(found: dict[int, dict[str, Losses]]) -> str:
    """Mean loss over the skills, a column for each seed."""
    by_seed = list(found.values())
    lines = {name: [mean(seed[name]) for seed in by_seed] for name in by_seed[0] if not name.startswith("alone")}
    single = [min(mean(losses) for name, losses in seed.items() if name.startswith("alone")) for seed in by_seed]
    own = [mean({skill: seed[f"alone: {skill}"][skill] for skill in SKILLS}) for seed in by_seed]
    lines |= {"the best single LoRA": single, "each row by its own LoRA": own}
    shown = [f"| {name} | {' | '.join(f'{value:.3f}' for value in values)} |" for name, values in lines.items()]
    head = "| | " + " | ".join(f"seed {seed}" for seed in found) + " |"
    return "\n".join([head, "|---" * (len(found) + 1) + "|", *shown])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=200, help="of each LoRA, and of what is trained on all rows")
    parser.add_argument("--loras", type=int, help="the seed of the LoRAs, for pools of every seed; default: its own")
    parser.add_argument("--arms", default="", help="only those of what is trained on all rows whose names hold this")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    if not (args.folder / "base").exists():
        write_base(args.folder / "base")
    for number, skill in enumerate(SKILLS):
        write_rows(args.folder / f"{skill}.jsonl", [skill], 2000, number)
        write_rows(args.folder / f"test-{skill}.jsonl", [skill], 100, 100 + number)
    found: dict[int, dict[str, Losses]] = {}
    for seed in args.seeds:
        loras = seed if args.loras is None else args.loras
        found[seed] = one_seed(args.folder, seed, args.steps, loras, args.arms)
        with (args.folder / "results.jsonl").open("a") as file:
            file.write(json.dumps({"seed": seed, "loras": loras, "losses": found[seed]}) + "\n")
        print(table(found), flush=True)


if __name__ == "__main__":
    main()
