"""PEFT's adapters behind the interface of ours. They have no router, so there is nothing to trace.

Parameters are named as in PEFT's own files, without the adapter's name in them.
"""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from remix_cli.core.config import AdapterConfig
from remix_cli.core.patch import Adapter, TargetError, find_targets
from remix_cli.errors import RecipeError
from remix_cli.packages import absent


class PeftAdapter(Adapter):
    """One of PEFT's methods on `model`, whose weights are frozen; its own parameters are float32."""

    def __init__(self, model: nn.Module, config: AdapterConfig, seed: int):
        super().__init__(model, config)
        try:
            with without_bitsandbytes():
                import peft
        except ImportError:
            raise RecipeError(
                f"adapter.method: {config.method} needs PEFT, which is not installed; pip install 'remix-cli[peft]'"
            ) from None
        if config.method == "dora" and getattr(model, "is_loaded_in_8bit", False) and model.device.type == "cpu":
            # PEFT reads such a weight by moving it, and a move to a CPU loses its scales
            raise RecipeError(
                "adapter.method: dora on an 8-bit base needs a GPU; set model.quantization to 4bit or none here"
            )
        described = _describe(peft, model, config)
        with torch.random.fork_rng(), warnings.catch_warnings():  # PEFT draws from the global generators
            warnings.simplefilter("ignore", FutureWarning)  # of what it asks transformers
            torch.manual_seed(seed)
            try:
                with without_bitsandbytes():
                    self.wrapped: Any = peft.get_peft_model(model, described)
            except ValueError as error:
                raise TargetError(f"{config.method}: {error}") from None
            if config.method == "prompt":
                _start_from_vocabulary(model, self.wrapped)
        # Those in front of a sequence are put there by PEFT's wrapper; the others sit inside the model itself.
        self.model = self.wrapped if described.is_prompt_learning else model
        self._named: dict[str, nn.Parameter] = {}
        for name, parameter in self.wrapped.named_parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
                self._named[name.replace("base_model.model.", "").replace(".default", "")] = parameter

    def lora_parameters(self) -> dict[str, nn.Parameter]:
        routers = self.router_parameters()
        return {name: parameter for name, parameter in self._named.items() if name not in routers}

    def router_parameters(self) -> dict[str, nn.Parameter]:
        """VB-LoRA's logits, which choose vectors of the bank, and learn at a rate of their own as published."""
        return {name: parameter for name, parameter in self._named.items() if "vblora_logits" in name}

    @contextmanager
    def disabled(self) -> Iterator[None]:
        with self.wrapped.disable_adapter():
            yield

    def remove(self) -> None:
        if self.model is not self.wrapped:
            self.wrapped.unload()


@contextmanager
def without_bitsandbytes() -> Iterator[None]:
    """PEFT imports it wherever it is installed. Loading a quantised model has imported it before."""
    with absent("bitsandbytes"):
        yield
    found = sys.modules.get("peft.import_utils")
    if found is not None:
        found.is_bnb_available.cache_clear()  # the next model in this process may be quantised
        found.is_bnb_4bit_available.cache_clear()


def _describe(peft: Any, model: nn.Module, config: AdapterConfig) -> Any:
    """The method in PEFT's words, on exactly the linears that `target_modules` names to us."""
    task: dict[str, Any] = {"task_type": "CAUSAL_LM"}
    virtual = task | {"num_virtual_tokens": config.virtual_tokens}
    hidden = model.config.get_text_config().hidden_size  # type: ignore[union-attr, operator]
    if config.method == "prefix":
        return peft.PrefixTuningConfig(**virtual)
    if config.method == "prompt":
        return peft.PromptTuningConfig(**virtual)
    if config.method == "p_tuning":
        return peft.PromptEncoderConfig(**virtual, encoder_hidden_size=hidden)
    targets = find_targets(model, config.target_modules)
    task["target_modules"] = targets
    if config.method == "ia3":
        inner = getattr(model.config.get_text_config(), "intermediate_size", None)  # type: ignore[union-attr, operator]
        if inner is None:
            raise TargetError("ia3: the model's config does not tell its feed-forward layers (no intermediate_size)")
        widths = {name: model.get_submodule(name).in_features for name in targets}
        return peft.IA3Config(**task, feedforward_modules=[name for name, width in widths.items() if width == inner])
    if config.method == "vblora":
        return peft.VBLoRAConfig(
            **task,
            r=config.rank,
            num_vectors=config.vectors,
            vector_length=config.vector_length,
            vblora_dropout=config.dropout,
        )
    return peft.LoraConfig(**task, r=config.rank, lora_alpha=2, lora_dropout=config.dropout, use_dora=True)


@torch.no_grad()
def _start_from_vocabulary(model: Any, wrapped: Any) -> None:
    """Begin at embeddings of random tokens: Lester et al. found that better than random vectors."""
    vocabulary: Tensor = model.get_input_embeddings().weight
    start: nn.Parameter = wrapped.prompt_encoder["default"].embedding.weight
    if start.device.type != "meta":
        rows = torch.randint(len(vocabulary), (len(start),)).to(vocabulary.device)
        start.copy_(vocabulary[rows])
