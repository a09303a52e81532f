"""`--format peft`: an adapter that PEFT knows, as PEFT's own folder: one LoRA of ours, or one of PEFT's methods."""

from pathlib import Path
from typing import Any

import torch

from remix_cli.compat.peft import without_bitsandbytes
from remix_cli.export.card import card
from remix_cli.export.holds import check_holds
from remix_cli.export.peft_experts import write_peft_lora
from remix_cli.export.readback import check_logits, logits_differ, probe
from remix_cli.methods.peft_adapter import PeftAdapter
from remix_cli.models import load_model
from remix_cli.runs import LoadedRun
from remix_cli.storage import publish_folder


def export_peft(run: LoadedRun, target: Path) -> float:
    """Write the folder, whole or not at all; how far logits of the folder read back are from ours, relative, in norm.

    Raises RecipeError for a method that PEFT does not know, ArtefactError if they differ, StorageError.
    """
    c = run.stored.config
    check_holds("peft", c.method)
    with publish_folder(target) as scratch:
        if isinstance(run.adapter, PeftAdapter):
            run.adapter.wrapped.save_pretrained(scratch)
        else:
            parts = {n: (linear.lora_A.detach(), linear.lora_B.detach()) for n, linear in run.adapter.linears.items()}
            write_peft_lora(scratch, parts, run.stored.identity.base_model, c.rank, c.scale * c.rank, c.dropout)
        run.tokenizer.save_pretrained(scratch)
        (scratch / "README.md").write_text(card(run, "peft", {}), encoding="utf-8")
        return _check(run, scratch)


@torch.no_grad()
def _check(run: LoadedRun, folder: Path) -> float:
    base = load_model(run.recipe.model, run.device)
    with without_bitsandbytes():
        import peft

        loaded: Any = peft.PeftModel.from_pretrained(base, str(folder)).eval()
    ids = probe(run)
    ours, theirs = (m(input_ids=ids, use_cache=False).logits for m in (run.model, loaded))
    return check_logits(logits_differ(ours, theirs), base.dtype, "the PEFT folder does not agree with the run")
