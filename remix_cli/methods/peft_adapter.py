"""PEFT's adapters behind the interface of ours. They have no router, so there is nothing to trace.

Parameters are named as in PEFT's own files, without the adapter's name in them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from torch import nn

from remix_cli.compat.peft import drawing_from, no_deprecations, without_bitsandbytes
from remix_cli.core.config import AdapterConfig
from remix_cli.core.patch import Adapter, TargetError
from remix_cli.errors import RecipeError


class InWordsOfPeft(Protocol):
    """What is asked of a method; `peft_base.PeftMethod` says what each means."""

    router_parameters: str

    def describe(self, peft: Any, model: nn.Module, config: AdapterConfig) -> Any: ...

    def start(self, model: Any, wrapped: Any) -> None: ...


class PeftAdapter(Adapter):
    """One of PEFT's methods on `model`, whose weights are frozen; its own parameters are float32."""

    def __init__(self, model: nn.Module, config: AdapterConfig, seed: int, method: InWordsOfPeft):
        super().__init__(model, config)
        self.method = method
        try:
            with without_bitsandbytes():
                import peft
        except ImportError:
            raise RecipeError(
                f"adapter.method: {config.method} needs PEFT, which is not installed; pip install 'remix-cli[peft]'"
            ) from None
        described = method.describe(peft, model, config)
        with drawing_from(seed), no_deprecations():
            try:
                with without_bitsandbytes():
                    self.wrapped: Any = peft.get_peft_model(model, described)
            except ValueError as error:
                raise TargetError(f"{config.method}: {error}") from None
            method.start(model, self.wrapped)
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
        """Those that learn at the router group's rate. Nothing is routed by them."""
        part = self.method.router_parameters
        return {name: parameter for name, parameter in self._named.items() if part and part in name}

    @contextmanager
    def disabled(self) -> Iterator[None]:
        with self.wrapped.disable_adapter():
            yield

    def remove(self) -> None:
        if self.model is not self.wrapped:
            self.wrapped.unload()
