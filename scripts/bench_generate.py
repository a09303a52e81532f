"""Time greedy generation side by side: the base model, PEFT LoRA unmerged, and a routed adapter.

    python scripts/bench_generate.py [--model models/SmolLM2-135M-Instruct] [--batches 1,8] [--new 32]
    python scripts/bench_generate.py --shape 8b --dtype bfloat16 --batches 1,32 --new 64        (random weights, GPU)

Every row generates the same number of tokens after the same random prompts with the KV cache; medians of the
repeats, the rows taken in turn.
"""

import json
import statistics
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from bench_step import TARGETS, bench_model, bench_parser, timed
from rich.console import Console
from rich.table import Table

from remix_cli.core.config import AdapterConfig
from remix_cli.core.patch import apply_adapter
from remix_cli.core.trace import Trace
from remix_cli.evaluation.decoding_graphs import fixed_cache, graphed

REFERENCE = "PEFT LoRA r = 32, unmerged"
LIBRARY = "ReMix, model.generate"  # top 4 of 8, r = 8
OURS = "ReMix, as remix eval does"  # with CUDA graphs where there is a GPU


def generator(model: torch.nn.Module, prompts: torch.Tensor, new: int, cache: Any = None) -> Callable[[], None]:
    @torch.no_grad()
    def run() -> None:
        out = model.generate(
            input_ids=prompts,
            attention_mask=torch.ones_like(prompts),
            min_new_tokens=new,
            max_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
            past_key_values=cache,
            disable_compile=True,
        )
        assert out.shape[1] == prompts.shape[1] + new

    return run


def install(name: str, model: torch.nn.Module, prompts: torch.Tensor, new: int) -> tuple[Callable, Callable]:
    """(run, remove)"""
    if name == "base":
        return generator(model, prompts, new), lambda: None
    if name == REFERENCE:
        import peft

        wrapped = peft.get_peft_model(model, peft.LoraConfig(r=32, lora_alpha=32, target_modules=TARGETS))
        return generator(wrapped, prompts, new), wrapped.unload
    adapter = apply_adapter(model, AdapterConfig(), seed=0)

    def routed() -> None:
        cache = fixed_cache(model, len(prompts), prompts.shape[1] + new) if name == OURS else None
        replayed = graphed(model, cache) if cache is not None else nullcontext()
        with adapter.tracing(Trace(record=False)), adapter.unchanging(), replayed:
            generator(model, prompts, new, cache)()

    return routed, adapter.remove


def main() -> None:
    parser = bench_parser(__doc__ or "")
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=32, help="tokens to generate")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = bench_model(args.shape, args.model, args.dtype, device).eval()
    model.generation_config.eos_token_id = None
    samples: dict[str, list[float]] = {}
    table = Table(title=f"{args.shape or args.model}, {args.dtype}, {args.prompt} + {args.new} tokens", box=None)
    for column in ("batch", "model", "tokens/s", "range", "of PEFT"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for batch in map(int, args.batches.split(",")):
        prompts = torch.randint(10, 40000, (batch, args.prompt), generator=torch.Generator().manual_seed(0)).to(device)
        names = ("base", REFERENCE, LIBRARY, OURS)
        found: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(args.repeats):
            for name in names:
                run, remove = install(name, model, prompts, args.new)
                timed(run, device)  # warm-up
                found[name].append(batch * args.new / timed(run, device))
                remove()
        reference = statistics.median(found[REFERENCE])
        for name, speeds in found.items():
            middle = statistics.median(speeds)
            spread = f"{min(speeds):.0f} to {max(speeds):.0f}"
            table.add_row(str(batch), name, f"{middle:.1f}", spread, f"{middle / reference:.2f}")
            samples[f"{batch} {name}"] = speeds
    Console(width=100).print(table)
    if args.json:
        args.json.write_text(json.dumps({"arguments": {k: str(v) for k, v in vars(args).items()}, "samples": samples}))


if __name__ == "__main__":
    main()
