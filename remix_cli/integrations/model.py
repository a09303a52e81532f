"""Routed adapters on a transformers model, in PEFT's manner."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from remix_cli.compat.bitsandbytes import packed_layers
from remix_cli.compat.transformers import recompute_activations
from remix_cli.core.config import AdapterConfig
from remix_cli.core.patch import Adapter, apply_adapter
from remix_cli.core.store import CONFIG_FILE, WEIGHTS_FILE, BaseIdentity, StoredAdapter, TrainedOn, load_stored
from remix_cli.core.store import save_adapter as write_adapter
from remix_cli.core.trace import Trace
from remix_cli.errors import ArtefactError
from remix_cli.export.hub import check_push, push
from remix_cli.models.identity import identity_of
from remix_cli.train.shard import shard_base

DEFAULT = "default"


def get_remix_model(
    model: nn.Module, config: AdapterConfig, *, seed: int = 0, adapter_name: str = DEFAULT
) -> "RemixModel":
    """Freeze `model`, put a new adapter on it in place, and return both as one object.

    B starts at zero, so outputs do not change; A and the routers are drawn from `seed` alone. Raises TargetError if a
    target matches nothing, ValueError for a method without a pool (PEFT has those).
    """
    wrapped = RemixModel(model)
    wrapped.add_adapter(adapter_name, config, seed=seed)
    return wrapped


class RemixModel(nn.Module):
    """A transformers model with one or more adapters of ours, one of them active.

    Call it and generate with it as with the model below, `base_model`, which holds the active adapter in place: what
    calls that one directly is routed, too. Attributes that are not found here are the model's. `level: sequence`
    needs to know the prompts: the positions before the first label, or where none are given all that the attention
    mask shows.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.base_model: Any = model
        self.adapters: dict[str, Adapter] = {}
        self.active_adapter = ""
        self._shared: BaseIdentity | None = None  # what the base is, once no process has all of it

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_model"), name)

    # The adapters.

    @property
    def adapter(self) -> Adapter:
        """The active one: its parameters, its traces."""
        return self.adapters[self.active_adapter]

    def add_adapter(self, adapter_name: str, config: AdapterConfig, *, seed: int = 0) -> None:
        """A new one, active from now on. Raises ValueError for a name that is taken or a shared base, TargetError."""
        if self._shared:
            raise ValueError(f"adapter {adapter_name!r}: add it before the base is shared out, which a trainer does")
        if not adapter_name or adapter_name in self.adapters:
            raise ValueError(f"adapter {adapter_name!r}: give a name that is not one of {list(self.adapters)}")
        self._take_off()
        try:
            self.adapters[adapter_name] = apply_adapter(self.base_model, config, seed=seed)
        except Exception:
            self._put_on(self.active_adapter)
            raise
        self.active_adapter = adapter_name

    def set_adapter(self, adapter_name: str) -> None:
        """Make another one the active one. Raises ValueError for a name that is none."""
        if adapter_name not in self.adapters:
            raise ValueError(f"adapter {adapter_name!r}: not one of {list(self.adapters)}")
        self._take_off()
        self._put_on(adapter_name)

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget one; if it was the active one, the first of the others is from now on. Raises ValueError."""
        if adapter_name not in self.adapters:
            raise ValueError(f"adapter {adapter_name!r}: not one of {list(self.adapters)}")
        if adapter_name == self.active_adapter:
            self._take_off()
            self.active_adapter = ""
        del self.adapters[adapter_name]
        if not self.active_adapter:
            self._put_on(next(iter(self.adapters), ""))

    def _take_off(self) -> None:
        if self.active_adapter:
            self.adapter.remove()

    def _put_on(self, adapter_name: str) -> None:
        if adapter_name:
            adapter = self.adapters[adapter_name]
            for part in (*adapter.linears.values(), *adapter.routers.values()):
                part.to(self.base_model.device)  # which may have been moved while this one was off
            adapter.put_back()
        self.active_adapter = adapter_name

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Context: the base model alone, bit for bit."""
        if not self.active_adapter:
            yield
            return
        with self.adapter.disabled():
            yield

    # Running.

    def forward(self, *args: Any, **inputs: Any) -> Any:
        """The model's own forward."""
        ids = args[0] if args else inputs.get("input_ids", inputs.get("inputs_embeds"))
        with self.routing(ids, inputs.get("attention_mask"), inputs.get("labels")):
            return self.base_model(*args, **inputs)

    @torch.no_grad()
    def generate(self, *args: Any, **inputs: Any) -> Any:
        """The model's own generate; a selection by sequence is made once, from the prompt."""
        ids = args[0] if args else inputs.get("input_ids", inputs.get("inputs_embeds"))
        with self.routing(ids, inputs.get("attention_mask")):
            return self.base_model.generate(*args, **inputs)

    @contextmanager
    def routing(
        self, ids: Tensor | None, attention_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> Iterator[None]:
        """Context: forward passes of `base_model` on rows (B, T, ...) know their prompts, as `level: sequence` needs.

        Nothing where the adapter routes by token, or where a trace is in force already.
        """
        state = self.adapter.state if self.active_adapter else None
        if state is None or state.trace is not None or self.adapter.config.level == "token" or ids is None:
            yield
            return
        with state.tracing(Trace(prompt=prompts_of(ids, attention_mask, labels), record=False)):
            yield

    def gradient_checkpointing_enable(self) -> None:
        """The model's own, without reentrance; what is recomputed repeats its selections."""

        def contexts() -> Any:  # of whichever adapter is active
            return self.adapter.state.checkpoint_contexts()

        recompute_activations(self.base_model, {"use_reentrant": False, "context_fn": contexts})

    def share_base(self, device: torch.device, processes: int, *, offload: bool = False, tokenizer: Any = None) -> None:
        """Shard the frozen base over the processes by FSDP2; the adapter is whole on each, with the first one's values.

        The first one's weights are everybody's; the others may have theirs on the meta device. Every pass is a
        collective from now on, and folders name the tokenizer that is given here. `offload`: layers that do not run lie
        in host memory. Raises RecipeError if the processes' models are not alike.
        """
        told: list[Any] = [identity_of(self.base_model, tokenizer) if dist.get_rank() == 0 else None]
        broadcast_object_list(told)
        packed_layers(self.base_model)  # so that a shard of a 4-bit layer is one that older torch takes
        shard_base(self.base_model, self.adapter, device, processes, offload)
        self._shared = told[0]

    @property
    def shares_base(self) -> bool:
        return self._shared is not None

    # What is trained.

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Numbers: trained, and all together."""
        trained = sum(p.numel() for p in self.parameters() if p.requires_grad)
        return trained, sum(p.numel() for p in self.parameters())

    def print_trainable_parameters(self) -> None:
        trained, total = self.get_nb_trainable_parameters()
        print(f"trainable params: {trained:,} || all params: {total:,} || trainable%: {100 * trained / total:.4f}")

    # Folders.

    def save_pretrained(self, folder: str | Path, *, tokenizer: Any = None) -> None:
        """Write the active adapter into `folder` as `remix train` does: remix_config.json, adapter.safetensors.

        With the tokenizer, whoever loads it is told when theirs is another one.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_adapter(folder, self.adapter, self._shared or identity_of(self.base_model, tokenizer), TrainedOn())

    def load_adapter(self, folder: str | Path, adapter_name: str = DEFAULT, *, tokenizer: Any = None) -> None:
        """Put the adapter of `folder` on, active from now on: of save_pretrained, or of a run (best/, adapter/).

        Raises ArtefactError for a damaged folder, another base model or tokenizer; ValueError for a name that is taken.
        """
        stored = _read(folder)
        base = self.base_model
        if next(base.parameters()).is_meta:  # of a process that only gets its share: the first one checks
            other = []
        else:
            other = stored.identity.differences(self._shared or identity_of(base, tokenizer))
        if other:
            raise ArtefactError(
                f"{folder}: trained on another {' and '.join(other)}; use {stored.identity.base_model} as it was then"
            )
        self.add_adapter(adapter_name, stored.config)
        try:
            self.adapter.load(stored.tensors)
        except ValueError as error:
            self.delete_adapter(adapter_name)
            raise ArtefactError(f"{folder}: {error}") from None

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        folder: str | Path,
        adapter_name: str = DEFAULT,
        *,
        is_trainable: bool = False,
        tokenizer: Any = None,
        revision: str | None = None,
    ) -> "RemixModel":
        """`model` with the adapter of a folder, or of a repository of the hub, on it. Raises as `load_adapter`."""
        if not Path(folder).is_dir():
            folder = _download(str(folder), revision)
        model.requires_grad_(False)
        loaded = cls(model)
        loaded.load_adapter(folder, adapter_name, tokenizer=tokenizer)
        for parameter in loaded.adapter.parameters().values():
            parameter.requires_grad_(is_trainable)
        return loaded.train(is_trainable)

    def push_to_hub(self, repo: str, *, private: bool = True, tokenizer: Any = None) -> str:
        """Upload the active adapter; the repository's address. Raises RecipeError where the hub does not take it."""
        client = check_push(repo)
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, tokenizer=tokenizer)
            return push(client, Path(folder), repo, not private)


def prompts_of(ids: Tensor, attention_mask: Tensor | None, labels: Tensor | None) -> Tensor:
    """Where the prompts of ids (B, T, ...) stand, (B, T) bool: real tokens before a row's first label that is not -100.

    All real ones where there are no labels; one, where a row begins with its answer. `attention_mask` (B, T) is 1 for
    real tokens.
    """
    real = torch.ones(ids.shape[:2], dtype=torch.bool, device=ids.device)
    if attention_mask is not None:
        real = attention_mask.bool()
    if labels is None:
        return real
    answered = (labels != -100).cumsum(-1) > 0
    prompt = real & ~answered
    first = real & (real.cumsum(-1) == 1)
    return torch.where(prompt.any(-1, keepdim=True), prompt, first)


def _read(folder: str | Path) -> StoredAdapter:
    """Raises ArtefactError; for a run it says which of its folders to take."""
    folder = Path(folder)
    if not (folder / CONFIG_FILE).exists() and (folder / "adapter" / CONFIG_FILE).exists():
        raise ArtefactError(f"{folder}: is a run; give {folder / 'best'} or {folder / 'adapter'}")
    return load_stored(folder)


def _download(repo: str, revision: str | None) -> Path:
    """Of the hub's repository the two files that make up an adapter. Raises ArtefactError."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=[CONFIG_FILE, WEIGHTS_FILE]))
    except Exception as error:  # the hub's own, and whatever its client raises when the network fails
        raise ArtefactError(f"{repo}: no such folder, and the hub does not give it ({error})") from None
