"""Working in chunks, and answers that do not depend on them."""

import pytest
import torch
from helpers.tiny import recipe_text, write_recipe

from remix_cli.data.chunks import in_chunks
from remix_cli.errors import is_out_of_memory
from remix_cli.evaluation.generate import Decoding, generate
from remix_cli.runs import load_run


@pytest.fixture(scope="module")
def loaded(finished):
    return load_run(finished)


def test_chunks_halve_when_memory_runs_out_and_lose_nothing():
    sizes = []

    def work(chunk):
        sizes.append(len(chunk))
        if len(chunk) > 3:
            raise torch.OutOfMemoryError("no")
        return [i * 10 for i in chunk]

    lengths = [3, 9, 1, 7, 7, 2, 8, 5, 4, 6]
    found = {i: r for chunk, result in in_chunks(lengths, 8, work) for i, r in zip(chunk, result, strict=True)}
    assert found == {i: 10 * i for i in range(10)}
    assert sizes[:3] == [8, 4, 2]
    with pytest.raises(torch.OutOfMemoryError):
        list(in_chunks([1], 4, lambda chunk: (_ for _ in ()).throw(torch.OutOfMemoryError("no"))))
    with pytest.raises(RuntimeError, match="bug"):
        list(in_chunks([1, 1], 4, lambda chunk: (_ for _ in ()).throw(RuntimeError("bug"))))


@pytest.mark.parametrize(
    "decoding",
    [
        Decoding(6),
        Decoding(6, temperature=1.0, seed=3),
        Decoding(6, selection_seed=5),
        Decoding(6, temperature=0.7, selection_seed=5),
    ],
)
@pytest.mark.parametrize("level", ["token", "sequence", "clusters"])
def test_answers_do_not_depend_on_batches(stage, tmp_path, decoding, level):
    from rich.console import Console

    from remix_cli.recipe import load_recipe
    from remix_cli.train.trainer import train

    model, rows, _ = stage
    router = {"level": "sequence", "clusters": 3} if level == "clusters" else {"level": level}
    recipe = recipe_text(model, rows, tmp_path / level, router=router)
    train(load_recipe(write_recipe(tmp_path / "r.yaml", recipe)), Console(quiet=True))
    subject = load_run(tmp_path / level)
    for name, parameter in subject.adapter.parameters().items():  # so that the routing matters
        with torch.no_grad():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.5)
    prompts = [[4 + (7 * i + j) % 40 for j in range(3 + i)] for i in range(7)]
    keys = list(range(100, 107))
    one, three, all_ = (sorted(generate(subject, prompts, keys, decoding, size)) for size in (1, 3, 7))
    assert one == three == all_
    backwards = dict(generate(subject, prompts[::-1], keys[::-1], decoding, 2))
    assert [(6 - i, text) for i, text in sorted(backwards.items(), reverse=True)] == one
    if decoding != Decoding(6):
        assert sorted(generate(subject, prompts, [k + 1 for k in keys], decoding, 7)) != one
        assert sorted(generate(subject, prompts, keys, Decoding(6), 7)) != one


def test_sampled_tokens_follow_the_softmax(loaded):
    prompt = [4, 9, 12]
    with torch.no_grad():
        logits = loaded.model(torch.tensor([prompt])).logits[0, -1]
    wanted = (logits / 0.8).softmax(-1)
    draws = [t for _, t in generate(loaded, [prompt] * 3000, list(range(3000)), Decoding(1, 0.8, seed=1), 3000)]
    words = loaded.tokenizer.batch_decode([[i] for i in range(len(wanted))], skip_special_tokens=True)
    top = int(wanted.argmax())
    assert draws.count(words[top]) / 3000 == pytest.approx(float(wanted[top]), abs=0.03)


@pytest.mark.parametrize("error", [torch.AcceleratorError, RuntimeError])
def test_an_allocation_that_cuda_itself_refuses_is_want_of_memory(error):
    """Kernels recorded beside other processes ask the driver, not torch's allocator."""
    assert is_out_of_memory(error("CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation'"))
    assert not is_out_of_memory(error("CUDA error: an illegal memory access was encountered"))
