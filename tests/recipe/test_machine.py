"""The type of a model for which the recipe names none, by what the machine computes fast."""

from pathlib import Path

import pytest
import yaml
from helpers.recipes import MINIMAL, with_key, write

from remix_cli.recipe import load_recipe, machine
from remix_cli.recipe.loader import dump

AVX2, AVX512, AMX = {"avx2", "fma"}, {"avx2", "avx512f", "avx512_bf16"}, {"avx2", "amx_bf16"}


def on(monkeypatch, flags, gpu=False):
    monkeypatch.setattr(machine, "cpu_flags", lambda: frozenset(flags))
    monkeypatch.setattr(machine, "has_gpu", lambda: gpu)


@pytest.mark.parametrize(
    ("flags", "gpu", "dtype"),
    [
        (AVX2, False, "float32"),
        (AVX512, False, "bfloat16"),
        (AMX, False, "bfloat16"),
        ({"neon", "bf16"}, False, "bfloat16"),
        (AVX2, True, "bfloat16"),
        (set(), False, "bfloat16"),  # of which nothing is known
    ],
)
def test_a_cpu_without_fast_bfloat16_computes_in_float32(monkeypatch, tmp_path, flags, gpu, dtype):
    on(monkeypatch, flags, gpu)
    recipe = load_recipe(write(tmp_path, yaml.safe_dump(MINIMAL)))
    assert recipe.model.dtype == dtype
    assert (recipe.model.about_dtype is not None) == (dtype == "float32")
    stored = write(tmp_path, dump(recipe))
    on(monkeypatch, AVX512 if dtype == "float32" else AVX2)
    assert load_recipe(stored, stored=True).model.dtype == dtype, "the run says what it was"


def test_what_the_recipe_says_is_obeyed_and_no_remark(monkeypatch, tmp_path):
    on(monkeypatch, AVX2)
    recipe = load_recipe(write(tmp_path, yaml.safe_dump(with_key("model.dtype", "bfloat16"))))
    assert (recipe.model.dtype, recipe.model.about_dtype) == ("bfloat16", None)


def test_a_resumed_run_keeps_its_type_unless_the_recipe_names_another(monkeypatch, tmp_path):
    silent, loud = MINIMAL, with_key("model.dtype", "float16")
    on(monkeypatch, AVX512)
    begun = load_recipe(write(tmp_path, yaml.safe_dump(silent)))
    on(monkeypatch, AVX2)
    assert load_recipe(write(tmp_path, yaml.safe_dump(silent))).with_dtype_of(begun) == begun
    assert load_recipe(write(tmp_path, yaml.safe_dump(loud))).with_dtype_of(begun).model.dtype == "float16"


def test_the_flags_are_those_of_this_machine():
    said = Path("/proc/cpuinfo")
    if said.exists():
        assert all(flag in said.read_text() for flag in machine.cpu_flags())


def test_a_gpu_that_is_not_to_be_used_does_not_count(monkeypatch):
    monkeypatch.setattr(machine, "GPUS", ("/dev/null",))
    assert machine.has_gpu()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert not machine.has_gpu()
