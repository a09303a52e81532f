"""Put a routed adapter on a model and take it off again."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any, get_args

import regex
import torch
from torch import Tensor, nn

from remix_cli.core.config import ALL_LINEAR, AdapterConfig, Shortcut
from remix_cli.core.layer import RoutedLinear
from remix_cli.core.locality import local_linears
from remix_cli.core.residual import ResidualLinear
from remix_cli.core.router import Router
from remix_cli.core.rules import make_rule
from remix_cli.core.trace import RoutingState, Seed, Trace, selection_noise
from remix_cli.errors import RecipeError, shortened

PATIENCE = 1.0  # seconds for a pattern and all names: a regular expression may take years
DEFAULT_TARGETS = AdapterConfig().target_modules
# What the default stands for in models without layers of its names, first come first served: the feed-forward layers by
# other names; where those are no layers, because all experts are one parameter, the attention's.
STAND_INS = (
    ("gate_up_proj", "down_proj"),  # Phi-3, GLM: gate and up in one
    ("mlp.up_proj", "mlp.down_proj"),  # Nemotron: no gate
    ("fc1", "fc2"),  # Phi-2, OPT
    ("dense_h_to_4h", "dense_4h_to_h"),  # GPT-NeoX, Falcon, BLOOM
    ("mlp.c_fc", "mlp.c_proj"),  # StarCoder2
    ("q_proj", "k_proj", "v_proj", "o_proj"),  # Mixtral, Qwen3-MoE, GPT-OSS
)


class TargetError(ValueError):
    """A target name matches no linear layer of the model."""


def find_targets(model: nn.Module, patterns: tuple[str, ...]) -> list[str]:
    """Names of the linear layers that `patterns` select, in the model's order.

    A pattern is the end of a module's dotted name (`up_proj`, `mlp.up_proj`), a regular expression for the
    whole name, or `all-linear`. The output embedding is never a target. The default patterns stand for others where
    the model has no such names: see `meant_by`. Raises TargetError, with the names the model has, if a pattern selects
    nothing.
    """
    linears = _linears(model)
    found: set[str] = set()
    for pattern in meant_by(model, patterns):
        hits = _selected(pattern, linears)
        if not hits:
            have = ", ".join(last_names(linears)) or "no nn.Linear at all"
            raise TargetError(f"no linear layer matches {pattern!r}; this model has: {have}")
        found |= hits
    return [name for name in linears if name in found]


def meant_by(model: nn.Module, patterns: tuple[str, ...]) -> tuple[str, ...]:
    """`patterns`; for DEFAULT_TARGETS, if one of them selects nothing, the first of STAND_INS that all do."""
    if patterns != DEFAULT_TARGETS:
        return patterns
    linears = _linears(model)
    fitting = (row for row in (patterns, *STAND_INS) if all(_selected(pattern, linears) for pattern in row))
    return next(fitting, patterns)


def _linears(model: nn.Module) -> list[str]:
    """Names of all linear layers but the output embedding, in the model's order."""
    get_head: Any = getattr(model, "get_output_embeddings", lambda: None)
    head = get_head()
    return [name for name, m in model.named_modules() if is_linear(m) and m is not head]


def _selected(pattern: str, linears: list[str]) -> set[str]:
    if pattern == ALL_LINEAR:
        return set(linears)
    return {n for n in linears if n == pattern or n.endswith(f".{pattern}")} | _full_matches(pattern, linears)


def last_names(names: Iterable[str]) -> list[str]:
    """What users call modules: `up_proj` of `model.layers.0.mlp.up_proj`, each once."""
    return list(dict.fromkeys(name.rpartition(".")[2] for name in names))


def is_linear(module: nn.Module) -> bool:
    """nn.Linear and what quantisation libraries put in its place."""
    return isinstance(module, nn.Linear) or (
        hasattr(module, "in_features") and hasattr(module, "out_features") and hasattr(module, "weight")
    )


def _full_matches(pattern: str, names: list[str]) -> set[str]:
    """Those of `names` that are the regular expression's as a whole. Raises TargetError."""
    end = time.monotonic() + PATIENCE
    try:
        expression = regex.compile(pattern)
        return {n for n in names if expression.fullmatch(n, timeout=max(1e-3, end - time.monotonic()))}
    except (RecursionError, MemoryError):  # thousands of brackets, (?R) without an end
        raise TargetError(f"{shortened(pattern, 60)!r} is no regular expression that can be read") from None
    except regex.error as error:
        raise TargetError(f"{pattern!r} is neither a module name nor a regular expression: {error}") from None
    except TimeoutError:
        raise TargetError(f"{pattern!r} takes too long to match; repeat nothing that repeats itself") from None


class Adapter:
    """A routed adapter in place on `model`: its parts by name, its parameters, and its traces.

    Its config names the targets that the model has, where the default stands for others: see `meant_by`.
    """

    def __init__(self, model: nn.Module, config: AdapterConfig):
        self.model = model
        self.config = replace(config, target_modules=meant_by(model, config.target_modules))
        self.routers: dict[str, Router] = {}
        self.linears: dict[str, RoutedLinear] = {}
        self.others: dict[str, nn.Parameter] = {}  # trained parameters by name, of methods without LoRAs of ours
        self.state = RoutingState()
        self.hooks: list[Any] = []  # in the model, until `remove`
        self._local: set[str] | None = None  # see find_local
        self.loras_learn = True  # until freeze_loras

    def tracing(self, trace: Trace) -> Any:
        """Context: forward passes inside follow and fill `trace`."""
        return self.state.tracing(trace)

    def unchanging(self) -> Any:
        """Context: a promise that no parameter of the adapter changes inside, so that each is cast only once."""
        return self.state.unchanging()

    @cached_property
    def local(self) -> Tensor:
        """(routers,) bool on the routers' device: does a choice at a position change the loss there alone?

        Asked for the first time, it runs `find_local`. There must be routers.
        """
        device = next(iter(self.routers.values())).weight.device
        local = self.find_local()
        return torch.tensor([name in local for name in self.routers], device=device)

    def find_local(self) -> set[str]:
        """Names of the routers all of whose linears are local: see locality.py.

        The first call runs a small pass of the base model, which must be whole and not compiled then.
        """
        if self._local is None:
            self._local = self._look_for_local()
        return self._local

    def _look_for_local(self) -> set[str]:
        """Only the last layer is looked into: on every other one follows that mixes positions."""
        last = _last_layer_prefix(self.model)
        if last is None or not self.routers:
            return set()
        with self.disabled():
            local = local_linears(self.model, [name for name in self.linears if name.startswith(last)])
        routers = set(self.routers)
        for name, linear in self.linears.items():
            if linear.router is not None and name not in local:
                routers.discard(linear.router.name)
        return routers

    def noise(self, seed: Seed, rows: Tensor, length: int) -> Tensor:
        """Selection noise of one forward pass over rows (B,) of `length` positions, (routers, B, T, n).

        T is 1 with `level: sequence`.
        """
        length = 1 if self.config.level == "sequence" else length
        return selection_noise(seed, rows, length, len(self.routers), self.config.pool_size)

    @contextmanager
    def activating(self, active: int) -> Iterator[None]:
        """Context: top `active` instead of the trained k, at the trained total weight k omega.

        Raises ValueError if the pool is smaller.
        """
        if not 1 <= active <= self.config.pool_size:
            raise ValueError(f"active ({active}) must lie between 1 and pool_size ({self.config.pool_size})")
        self._activate(active)
        try:
            yield
        finally:
            self._activate(self.config.active)

    def _activate(self, active: int) -> None:
        for router in self.routers.values():
            router.rule = make_rule(self.config, active)

    def lora_parameters(self) -> dict[str, nn.Parameter]:
        named = {}
        for name, linear in self.linears.items():
            named[f"{name}.lora_A"] = linear.lora_A
            named[f"{name}.lora_B"] = linear.lora_B
        return named | self.others

    def freeze_loras(self) -> None:
        """From now on the routers alone are trained."""
        self.loras_learn = False
        for parameter in self.lora_parameters().values():
            parameter.requires_grad_(False)

    def router_parameters(self) -> dict[str, nn.Parameter]:
        return {f"{name}.router": router.weight for name, router in self.routers.items()}

    def parameters(self) -> dict[str, nn.Parameter]:
        """Every trained parameter by name: `<linear>.lora_A`, `<linear>.lora_B`, `<block>.router`."""
        return self.lora_parameters() | self.router_parameters()

    def cluster_tensors(self) -> dict[str, Tensor]:
        """What routers with `clusters` go by, `<block>.router_common` (D,) and `<block>.router_centres` (C, D)."""
        named: dict[str, Tensor] = {}
        if not self.config.clusters:
            return named
        for name, router in self.routers.items():
            named[f"{name}.router_common"] = router.common
            named[f"{name}.router_centres"] = router.centres
        return named

    def tensors(self) -> dict[str, Tensor]:
        """All that makes up the adapter, trained or found before training, by name."""
        return self.parameters() | self.cluster_tensors()

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Copy `tensors` into the adapter's. Raises ValueError for other names or shapes."""
        own = self.tensors()
        if own.keys() != tensors.keys():
            missing = sorted(own.keys() - tensors.keys())
            extra = sorted(tensors.keys() - own.keys())
            raise ValueError(
                f"adapter tensors do not fit the model: {len(missing)} missing (first: {missing[:1]}), "
                f"{len(extra)} unexpected (first: {extra[:1]})"
            )
        for name, parameter in own.items():
            if parameter.shape != tensors[name].shape:
                shapes = f"{tuple(tensors[name].shape)} for {tuple(parameter.shape)}"
                raise ValueError(f"adapter tensor {name} has another shape: {shapes}")
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(tensors[name])

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Context: the base model alone, bit for bit."""
        self._swap(base=True)
        self.state.off = True
        try:
            yield
        finally:
            self.state.off = False
            self._swap(base=False)

    def _swap(self, base: bool) -> None:
        for name, linear in self.linears.items():
            set_module(self.model, name, linear.base_layer if base else linear)

    def remove(self) -> None:
        """Restore the model as it was before `apply_adapter`; `put_back` undoes it."""
        self._swap(base=True)
        for hook in self.hooks:
            hook.remove()
        self.hooks = []
        if self.config.scope != "module":
            for name in self.routers:
                del self.model.get_submodule(name).remix_router

    def put_back(self) -> None:
        """Undo `remove`, on a model that has no other adapter in place."""
        self._swap(base=False)
        if self.config.scope != "module":
            for name, router in self.routers.items():
                self.hooks += _attach_to_block(self.model.get_submodule(name), router)


def apply_adapter(model: nn.Module, config: AdapterConfig, *, seed: int) -> Adapter:
    """Freeze `model` and put pools and routers on its targets; B starts at zero, so outputs do not change.

    A and P are drawn from `seed` alone. Raises TargetError if a target matches nothing, ValueError for a method
    without a pool.
    """
    if config.pool is None:
        raise ValueError(f"{config.method} is not a method of pools; see remix_cli.methods")
    targets = find_targets(model, config.target_modules)
    model.requires_grad_(False)
    adapter = Adapter(model, config)
    named = adapter.config.target_modules
    if config.of_modules and named != config.target_modules:  # others than named would change the pool's size
        raise TargetError(f"target_modules: name this model's linears, of which the pool is made: {', '.join(named)}")
    layers = _names_of_layers(model)
    for name in targets:
        base = model.get_submodule(name)
        router = _router_of(name, base, adapter, layers) if config.routed else None
        place = None
        if config.of_modules:
            place = sum(linear.router is router for linear in adapter.linears.values())
        kind = ResidualLinear if config.residual else RoutedLinear
        linear = kind(base, config, router, adapter.state, place)
        adapter.linears[name] = linear
        set_module(model, name, linear)
    if config.of_modules:
        _check_one_of_each(adapter)
    if config.residual:
        _join_layers(adapter, layers)
    generator = torch.Generator().manual_seed(seed)
    parts: list[RoutedLinear | Router] = [*adapter.linears.values(), *adapter.routers.values()]
    for part in parts:
        if next(part.parameters()).device.type != "meta":
            part.reset_parameters(generator)
    return adapter


def _router_of(name: str, base: nn.Module, adapter: Adapter, layers: list[str]) -> Router:
    """The router that serves the linear `name`: that of its block or of the model, made for the first linear of it, or
    its own."""
    config = adapter.config
    by_block = config.scope != "module"
    owner = name.rpartition(".")[0] if by_block else name
    if config.of_modules:
        owner = _layer_of(name, layers)
    if config.scope == "model":
        owner = next(iter(adapter.routers), owner)
    router = adapter.routers.get(owner)
    if router is None:
        width = _hidden_size(adapter.model) if by_block else int(base.in_features)  # type: ignore[arg-type]
        device = next(base.parameters()).device
        router = Router(owner, len(adapter.routers), width, config, adapter.state, device)
        adapter.routers[owner] = router
        if by_block:
            adapter.hooks += _attach_to_block(adapter.model.get_submodule(owner), router)
    return router


def _names_of_layers(model: nn.Module) -> list[str]:
    """The decoder layers, in order; none if they cannot be told."""
    layers = set(decoder_layers(model))
    return [name for name, module in model.named_modules() if module in layers]


def _layer_of(name: str, layers: list[str]) -> str:
    """The one of `layers` that the linear `name` is in. Raises TargetError."""
    found = next((layer for layer in layers if name.startswith(f"{layer}.")), None)
    if found is None:
        raise TargetError(f"{name} is in none of the decoder layers; name linears that are")
    return found


def _check_one_of_each(adapter: Adapter) -> None:
    """Raises TargetError unless every layer has one linear for each name: a pool has the same LoRAs everywhere."""
    names = adapter.config.target_modules
    for owner, router in adapter.routers.items():
        there = [name for name, linear in adapter.linears.items() if linear.router is router]
        if len(there) != len(names):
            raise TargetError(
                f"{owner} has {len(there)} linears for the {len(names)} names {', '.join(names)}; "
                "a pool of modules needs one for each name, in every layer"
            )


def _join_layers(adapter: Adapter, layers: list[str]) -> None:
    """Join each linear to those of its name in the layers before (residual.py). Raises TargetError, ValueError."""
    settings: dict[str, Any] = {"shortcut": "middle", "previous": 1} | adapter.config.settings
    most = settings["previous"]
    if settings["shortcut"] not in get_args(Shortcut) or type(most) is not int or most < 1:
        known = ", ".join(get_args(Shortcut))
        raise ValueError(f"shortcut ({settings['shortcut']!r}) must be one of {known}, previous ({most!r}) 1 or more")
    rows: dict[str, list[ResidualLinear]] = {}
    for name, linear in adapter.linears.items():
        assert isinstance(linear, ResidualLinear)
        row = rows.setdefault(name.removeprefix(_layer_of(name, layers)), [])
        if row and (row[0].lora_A.shape, row[0].lora_B.shape) != (linear.lora_A.shape, linear.lora_B.shape):
            raise TargetError(f"{name} has another size than its namesakes in the layers before, to which it is joined")
        row.append(linear)
    for row in rows.values():
        for i, linear in enumerate(row):
            earlier = tuple(reversed(row[max(0, i - most) : i]))
            is_last = i + 1 == len(row)
            linear.join(settings["shortcut"], earlier, earlier if is_last else earlier[most - 1 :], not is_last)


def compile_unadapted(model: nn.Module, backend: str = "inductor") -> int:
    """Compile each decoder layer's parts that hold no adapted linear, for any shape; how many there are.

    The adapted ones stay eager: their routers follow a trace, which changes with every pass. Generation goes by the
    eager code (see evaluation/generate.py).
    """
    count = 0
    for layer in decoder_layers(model):
        for part in layer.children():
            adapted = any(isinstance(module, RoutedLinear | Router) for module in part.modules())
            if adapted or next(part.parameters(), None) is None:
                continue
            part.compile(dynamic=True, backend=backend)
            count += 1
    return count


def _attach_to_block(block: nn.Module, router: Router) -> list[Any]:
    """Let the router read the block's input and hold its choice while the block runs; one for the model until the
    next pass."""

    if isinstance(block, nn.Sequential):  # it would run the router as one more layer
        raise TargetError(
            f"{router.name} is a row of layers, which has no place for a router; set router.scope: module"
        )

    def choose(_: nn.Module, args: tuple, kwargs: dict) -> None:
        if not router.state.off:
            inputs = args[0] if args else kwargs.get("hidden_states")
            if inputs is None:
                raise RecipeError(
                    f"adapter.target_modules: {router.name} is not called with hidden states, from which a router "
                    "could choose; set router.scope: module"
                )
            router.block.weighting = router(inputs)

    def forget(_: nn.Module, args: tuple, output: Any) -> None:
        router.block.weighting = None

    block.add_module("remix_router", router)
    hooks: list[Any] = [block.register_forward_pre_hook(choose, with_kwargs=True)]
    if router.config.scope == "block":
        hooks.append(block.register_forward_hook(forget, always_call=True))
    return hooks


def set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _hidden_size(model: nn.Module) -> int:
    config: Any = model.config
    return int(config.get_text_config().hidden_size)


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The only list as long as the model is deep; an empty one if that does not tell."""
    config: Any = getattr(model, "config", None)
    if config is None:
        return nn.ModuleList()
    depth = getattr(config.get_text_config(), "num_hidden_layers", None)
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    return lists[0] if len(lists) == 1 else nn.ModuleList()


def _last_layer_prefix(model: nn.Module) -> str | None:
    """Dotted prefix of the last decoder layer; None if the layers cannot be told."""
    layers = decoder_layers(model)
    for name, module in model.named_modules():
        if len(layers) and module is layers[-1]:
            return f"{name}."
    return None
