"""The frozen base model: from a hub id, a folder or a GGUF file.

loading.py      weights, tokenizer and config, from where the recipe says
identity.py     what an adapter that was trained on it belongs to
known_shapes.py published configs of bases that are not here
suitability.py  can it be trained on, and how much does it read at once
skeleton.py     its modules without weights, and a rehearsal of a pass
losses.py       its losses, at supervised positions only
"""

from remix_cli.models.identity import forward_settings, identify
from remix_cli.models.known_shapes import KnownBase, known_base
from remix_cli.models.loading import DTYPES, load_model, load_tokenizer, out_of_reach
from remix_cli.models.losses import batch_losses, supervised_logits
from remix_cli.models.skeleton import input_ranks, meta_ids, rehearsing, skeleton
from remix_cli.models.suitability import check_base, is_causal, longest_input

__all__ = [
    "DTYPES",
    "KnownBase",
    "batch_losses",
    "check_base",
    "forward_settings",
    "identify",
    "input_ranks",
    "is_causal",
    "known_base",
    "load_model",
    "load_tokenizer",
    "longest_input",
    "meta_ids",
    "out_of_reach",
    "rehearsing",
    "skeleton",
    "supervised_logits",
]
