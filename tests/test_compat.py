"""Each workaround twice: what the library does alone, and what it does with the workaround.

Where the first half of a test fails, the library has changed and the workaround may go; where the second half fails,
it works no more.
"""

import importlib.util
import logging
import sys
import warnings

import pytest
import torch
from helpers.tiny import tiny_model
from transformers import DynamicCache, MixtralConfig, MixtralForCausalLM, masking_utils

from remix_cli.compat import accelerate as for_accelerate
from remix_cli.compat import bitsandbytes as for_bitsandbytes
from remix_cli.compat import datasets as for_datasets
from remix_cli.compat import peft as for_peft
from remix_cli.compat import tokenizers as for_tokenizers
from remix_cli.compat import trackio as for_trackio
from remix_cli.compat import transformers as for_transformers
from remix_cli.compat.hub_kernels import fetch_no_code
from remix_cli.compat.reasoning_gym import seed_apart
from remix_cli.compat.torch import zero_for_numbers

IDS = torch.arange(8).unsqueeze(0)


def test_kernels_is_found_by_transformers_unless_hidden(tmp_path, monkeypatch):
    from transformers.utils.import_utils import _is_package_available

    (tmp_path / "kernels.py").write_text("__version__ = '0.18.2'\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "kernels", raising=False)
    importlib.invalidate_caches()
    assert _is_package_available("kernels")[0]
    monkeypatch.delitem(sys.modules, "kernels", raising=False)
    fetch_no_code()
    assert not _is_package_available("kernels")[0]
    with pytest.raises(ImportError):
        import kernels  # noqa: F401


# transformers


def test_activations_are_recomputed_by_whichever_name_transformers_has_for_it(recwarn):
    class Old:
        def gradient_checkpointing_enable(self, settings):
            self.settings = settings

    old = Old()
    for_transformers.recompute_activations(old, {"use_reentrant": False})
    assert old.settings == {"use_reentrant": False}
    model = tiny_model()
    for_transformers.recompute_activations(model, {"use_reentrant": False})
    assert model.is_gradient_checkpointing
    assert not [w for w in recwarn if "gradient_checkpointing_enable" in str(w.message)]


def test_transformers_shows_a_bar_and_advises_unless_quiet():
    from transformers.utils.logging import is_progress_bar_enabled

    logger = logging.getLogger("transformers.modeling_utils")
    assert is_progress_bar_enabled()
    assert logger.isEnabledFor(logging.WARNING)
    with for_transformers.quiet():
        assert not is_progress_bar_enabled()
        assert not logger.isEnabledFor(logging.WARNING)
    assert is_progress_bar_enabled()
    assert logger.isEnabledFor(logging.WARNING)


def test_a_mask_depends_on_the_numbers_of_positions_unless_a_row_is_one_sequence():
    model = tiny_model().to("meta")
    originals = vars(masking_utils).copy()
    with pytest.raises(RuntimeError, match="meta"):
        model(input_ids=IDS.to("meta"), use_cache=False)
    with for_transformers.one_sequence_a_row():
        model(input_ids=IDS.to("meta"), use_cache=False)
        assert not masking_utils.is_tracing()
    assert vars(masking_utils) == originals


def test_gguf_weights_stay_in_blocks_unless_asked_for():
    from transformers import GgufConfig

    assert not GgufConfig().dequantize
    assert for_transformers.dequantised()["quantization_config"].dequantize


def test_a_cast_model_has_other_rotary_frequencies_than_one_with_cast_parameters():
    whole = tiny_model().to(torch.bfloat16)
    assert whole.model.rotary_emb.inv_freq.dtype == torch.bfloat16
    weights = tiny_model()
    for_transformers.cast_parameters(weights, torch.bfloat16)
    assert weights.model.rotary_emb.inv_freq.dtype == torch.float32
    assert {parameter.dtype for parameter in weights.parameters()} == {torch.bfloat16}


def test_experts_need_numbers_unless_told_to_count_none():
    shape = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4}
    with torch.device("meta"):
        model = MixtralForCausalLM(MixtralConfig(**shape))
    with for_transformers.one_sequence_a_row(), zero_for_numbers():
        with pytest.raises(RuntimeError):
            model(input_ids=IDS.to("meta"), use_cache=False)
        for_transformers.count_no_experts(model)
        model(input_ids=IDS.to("meta"), use_cache=False)


def test_a_model_without_the_attention_asked_for_is_refused_with_one_known_advice():
    from transformers import LongformerConfig, LongformerModel

    with pytest.raises(ValueError, match="scaled_dot_product_attention") as refused:
        LongformerModel(LongformerConfig(attn_implementation="sdpa", attention_window=4))
    assert for_transformers.advises_eager(refused.value)
    assert not for_transformers.advises_eager(ValueError("something else"))


def test_a_class_says_whether_its_pass_is_one_graph():
    model = tiny_model()
    assert for_transformers.runs_as_one_graph(model)
    model._can_compile_fullgraph = False
    assert not for_transformers.runs_as_one_graph(model)
    assert not for_transformers.runs_as_one_graph(torch.nn.Linear(1, 1))


def test_generate_calls_the_forward_that_was_put_in_place():
    model = tiny_model()
    own, passes = model.forward, []

    def forward(**inputs):
        passes.append(inputs["input_ids"].shape[1])
        return own(**inputs)

    forward.__wrapped__ = own  # `generate` reads the signature
    with for_transformers.forward_replaced(model, forward):
        model.generate(IDS, max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0)
    assert passes == [8, 1, 1]
    assert "forward" not in vars(model)


def test_a_cache_has_another_name_in_models_of_before():
    class Before(torch.nn.Module):
        def forward(self, input_ids, past_key_values=None):
            pass

    assert for_transformers.name_of_cache(Before()) == "past_key_values"
    model = tiny_model()
    cache = DynamicCache(config=model.config)
    model(input_ids=IDS, use_cache=True, **{for_transformers.name_of_cache(model): cache})
    assert cache.get_seq_length() == 8


def test_transformers_needs_the_module_of_a_class_among_the_imported(tmp_path):
    file = tmp_path / "modeling_own.py"
    file.write_text("from transformers import PreTrainedModel\nclass Own(PreTrainedModel):\n    pass\n")
    spec = importlib.util.spec_from_file_location("modeling_own", file)
    alone = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(alone)
    assert not alone.Own._can_set_attn_implementation()
    before = set(sys.modules)
    with for_transformers.imported(file) as module:
        assert module.Own._can_set_attn_implementation()
    assert set(sys.modules) == before


# bitsandbytes


def test_an_evaluation_packs_4_bit_weights_on_a_cpu_unless_kept_from_it(monkeypatch):
    """bitsandbytes is told that this CPU has AVX-512 bf16."""
    import bitsandbytes

    packed = []

    def pack(weight, state):
        packed.append(weight)
        return weight, state

    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: True)
    monkeypatch.setattr(bitsandbytes.nn.modules, "_convert_weight_packed_for_cpu", pack)
    layer = bitsandbytes.nn.Linear4bit(64, 64, bias=False).to("cpu").eval()
    layer(torch.ones(1, 64))
    assert len(packed) == 1
    for_bitsandbytes.keep_differentiable(layer)
    layer(torch.ones(1, 64))
    assert len(packed) == 1


def test_an_8_bit_layer_says_that_it_rounds_unless_told_not_to(caplog):
    import bitsandbytes

    loggers = [logging.getLogger(f"bitsandbytes.{name}") for name in ("autograd._functions", "backends.cpu.ops")]
    for logger in loggers:
        logger.setLevel(logging.NOTSET)
    layer = bitsandbytes.nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False).to("cpu").eval()
    layer(torch.ones(1, 64))
    assert "inputs will be cast" in caplog.text
    caplog.clear()
    for_bitsandbytes.no_advice()
    layer(torch.ones(1, 64))
    assert not caplog.text
    assert not any(logger.isEnabledFor(logging.WARNING) for logger in loggers)


# PEFT


def test_peft_imports_bitsandbytes_unless_it_is_hidden(tmp_path, monkeypatch):
    """A stand-in for bitsandbytes tells whether it was imported."""
    from peft import import_utils

    (tmp_path / "bitsandbytes.py").write_text("class nn: Linear4bit = None\n")
    for name in [name for name in sys.modules if name.partition(".")[0] == "bitsandbytes"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    import_utils.is_bnb_available.cache_clear()
    import_utils.is_bnb_4bit_available.cache_clear()
    with for_peft.without_bitsandbytes():
        assert not import_utils.is_bnb_4bit_available()
    assert "bitsandbytes" not in sys.modules
    assert import_utils.is_bnb_4bit_available(), "the answer is not remembered"
    assert sys.modules.pop("bitsandbytes").__file__ == str(tmp_path / "bitsandbytes.py")
    import_utils.is_bnb_available.cache_clear()
    import_utils.is_bnb_4bit_available.cache_clear()


def lora(model):
    import peft

    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))


def test_peft_draws_from_the_global_generator_unless_given_its_own():
    model = tiny_model()
    before = torch.get_rng_state()
    lora(model)
    assert not torch.equal(torch.get_rng_state(), before)

    def drawn(outside):
        model = tiny_model()
        torch.manual_seed(outside)
        before = torch.get_rng_state()
        with for_peft.drawing_from(7):
            wrapped = lora(model)
        assert torch.equal(torch.get_rng_state(), before)
        return next(parameter for name, parameter in wrapped.named_parameters() if "lora_A" in name)

    assert torch.equal(drawn(outside=1), drawn(outside=2))


def test_peft_calls_what_transformers_deprecates_unless_that_is_ignored():
    with pytest.warns(FutureWarning, match="is_gradient_checkpointing"):
        lora(tiny_model())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with for_peft.no_deprecations():
            lora(tiny_model())


def test_prompt_tuning_warns_of_position_ids_unless_that_is_ignored():
    import peft

    model = peft.get_peft_model(tiny_model(), peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    with pytest.warns(UserWarning, match="Position ids are not supported"):
        model(input_ids=IDS, position_ids=IDS)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with for_peft.no_word_of_positions():
            model(input_ids=IDS, position_ids=IDS)
    assert told == []


def test_reading_an_8_bit_weight_on_a_cpu_loses_its_scales():
    import bitsandbytes
    from peft.utils.integrations import dequantize_module_weight

    layer = bitsandbytes.nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False).to("cpu")
    layer(torch.ones(1, 64))
    dequantize_module_weight(layer)
    assert layer.weight.SCB is None
    model = tiny_model()
    assert not for_peft.loses_scales(model)
    model.is_loaded_in_8bit = True
    assert for_peft.loses_scales(model)


# the others


def test_accelerate_refuses_a_second_precision_unless_its_state_is_forgotten():
    from accelerate import Accelerator

    for_accelerate.forget_state()
    Accelerator(mixed_precision="no")
    with pytest.raises(ValueError, match="AcceleratorState has already been initialized"):
        Accelerator(mixed_precision="bf16")
    for_accelerate.forget_state()
    assert Accelerator(mixed_precision="bf16").mixed_precision == "bf16"
    for_accelerate.forget_state()


def test_a_tensor_without_numbers_has_none_to_tell_unless_it_may_be_zero():
    nothing = torch.ones(1, device="meta")
    with pytest.raises(RuntimeError, match="meta"):
        nothing.item()
    with zero_for_numbers():
        assert nothing.item() == 0
        assert not nothing.isinf().any()
    with pytest.raises(RuntimeError, match="meta"):
        nothing.item()


def test_an_added_token_is_one_token_unless_it_is_left_in_pieces():
    from tokenizers import AddedToken, Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {letter: number for number, letter in enumerate("<end>?")}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="?"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?")
    token = AddedToken("<end>", special=False)
    tokenizer.add_tokens([token])
    assert len(tokenizer("<end>", split_special_tokens=True)["input_ids"]) == 1
    for_tokenizers.leave_in_pieces(tokenizer, [token])
    assert len(tokenizer("<end>", split_special_tokens=True)["input_ids"]) == 5


def test_a_tokenizer_without_its_merges_splits_its_own_words():
    """As transformers 5.17 reads the SentencePiece vocabulary of a GGUF file: the pieces are there, how to join not."""
    from tokenizers import Tokenizer, models, normalizers
    from transformers import PreTrainedTokenizerFast

    vocab = {piece: number for number, piece in enumerate(["<unk>", "\u2581", *"aehnrtu", "re", "\u2581return"])}
    merges = [("r", "e"), ("re", "t"), ("ret", "u"), ("retu", "r"), ("retur", "n"), ("\u2581", "return")]
    whole = vocab | {piece: len(vocab) + i for i, piece in enumerate(["ret", "retu", "retur", "return"])}

    def made(vocab, merges):
        backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>"))
        backend.normalizer = normalizers.Replace(" ", "\u2581")
        return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")

    splits_its_words = for_tokenizers.splits_its_words
    assert splits_its_words(made(whole, merges)) is None
    assert splits_its_words(made(vocab, [])) == "return"
    assert splits_its_words(made({"<unk>": 0, "a": 1}, [])) is None


def test_datasets_logs_what_it_raises_unless_told_to_say_nothing(tmp_path):
    import datasets

    file = tmp_path / "bad.parquet"
    file.write_bytes(b"no table")
    heard = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())
    logger = logging.getLogger("datasets")
    logger.addHandler(handler)

    def load():
        with pytest.raises(Exception, match="Parquet magic bytes"):
            datasets.load_dataset("parquet", data_files=[str(file)], split="train", cache_dir=str(tmp_path / "cache"))

    try:
        datasets.logging.set_verbosity(datasets.logging.WARNING)
        load()
        assert any("Parquet magic bytes" in line for line in heard)
        heard.clear()
        for_datasets.say_nothing()
        load()
        assert not heard
    finally:
        logger.removeHandler(handler)


def test_neighbouring_seeds_of_reasoning_gym_share_rows_unless_set_apart():
    import reasoning_gym

    def questions(seed):
        rows = reasoning_gym.create_dataset("basic_arithmetic", size=6, seed=seed)
        return [row["question"] for row in rows]

    assert questions(0)[1:] == questions(1)[:-1]
    assert not set(questions(seed_apart(0))) & set(questions(seed_apart(1)))


# trackio


def test_a_run_of_trackio_ends_twice_and_says_so_unless_trackio_ends_it(tmp_path_factory, monkeypatch, capsys):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path_factory.getbasetemp() / "trackio"))  # read once a process
    trackio = pytest.importorskip("trackio")
    quiet = {"auto_log_cpu": False, "auto_log_gpu": False, "embed": False}
    run = trackio.init("ends", name="run", **quiet)
    assert for_trackio.last_step(run) == -1
    run.log({"loss": 1.0}, step=7)
    assert for_trackio.last_step(run) == 7
    run.finish()
    capsys.readouterr()
    trackio._cleanup_current_run()
    assert "Run finished" in capsys.readouterr().out
    run = trackio.init("ends", name="run", resume="allow", **quiet)
    assert for_trackio.last_step(run) == 7
    for_trackio.end_run()
    capsys.readouterr()
    trackio._cleanup_current_run()
    assert not capsys.readouterr().out
