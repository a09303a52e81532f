"""Decoding by replay: on the CPU with a stand-in for the recorder, on a GPU with CUDA graphs."""

import pytest
import torch
from helpers.tiny import fill_adapter, tiny_model
from transformers import StaticCache

from remix_cli.core.config import AdapterConfig
from remix_cli.core.patch import apply_adapter
from remix_cli.core.trace import Trace
from remix_cli.evaluation.decoding_graphs import fixed_cache, graphed

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MASK = torch.tensor([[0] * 3 + [1] * 4, [1] * 7])
IDS = torch.arange(14).view(2, 7) + 5


def by_hand(run):
    """What a graph does: the same run on the same tensors, its result left where the first one was."""
    output = run()
    first, calls = output.logits, []

    def replay():
        calls.append(1)
        if len(calls) > 1:  # recording a graph computes nothing, this stand-in has computed the first
            first.copy_(run().logits)

    return output, replay


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_replayed_decoding_gives_the_same_tokens(level):
    model = tiny_model().to(DEVICE)
    adapter = apply_adapter(model, AdapterConfig(pool_size=4, active=2, rank=3, level=level), seed=0)
    fill_adapter(adapter)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "attention_mask": MASK.to(DEVICE)}
    forward, passes = model.model.forward, []

    def generate(**more):
        with torch.no_grad(), adapter.tracing(Trace(prompt=MASK.bool().to(DEVICE), record=False)):
            return model.generate(IDS.to(DEVICE), disable_compile=True, **options, **more)

    expected = generate()
    cache = StaticCache(config=model.config, max_cache_len=19)
    model.model.forward = lambda *args, **kwargs: passes.append(1) or forward(*args, **kwargs)
    with graphed(model, cache, None if DEVICE.type == "cuda" else by_hand):
        assert torch.equal(generate(past_key_values=cache), expected)
    assert "forward" not in vars(model)
    if DEVICE.type == "cuda":
        assert len(passes) == 3  # the prompt, a rehearsal, the recording


def test_a_cpu_and_models_with_other_caches_are_left_alone():
    model = tiny_model()
    assert fixed_cache(model, 2, 20) is None
    if DEVICE.type == "cuda":
        assert fixed_cache(tiny_model().to(DEVICE), 2, 20) is not None
        model = tiny_model().to(DEVICE)
        model._can_compile_fullgraph = False
        assert fixed_cache(model, 2, 20) is None
