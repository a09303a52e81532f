"""What an adapter is, apart from its weights. Standard library only, so that recipes load without torch."""

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args

Omega = Literal["rslora", "lora"]
Scope = Literal["block", "module", "model"]
Level = Literal["token", "sequence"]
Rule = Literal["constant", "softmax"]
Shortcut = Literal["input", "block", "middle"]  # of LoRAs that are joined over layers, see residual.py
Precondition = Literal["riemannian", "riemannian_unit"]  # see precondition.py
Sizes = dict[str, tuple[int | None, ...]]  # by the end of a tensor's name its dimensions; None: the base model's to say
# settings that adapters of the first release do not name
YOUNGER = {"virtual_tokens", "vectors", "vector_length", "clusters", "pool", "settings"}


@dataclass(frozen=True)
class Pool:
    """How the LoRAs of a pool are weighted and stored.

    `rule`: `constant` gives each active LoRA omega, `softmax` a share of the total weight; None: no router, every LoRA
    is always on, at omega. `shares_a`: one A (r, D_in) for all of them. `of_modules`: the LoRAs of a decoder layer's
    linears are its pool, one on each, and the layer's router says which of them are on; else each linear has n.
    `residual`: one LoRA, always on, and joined to those of the layers before it (residual.py).
    """

    rule: Rule | None = None
    shares_a: bool = False
    of_modules: bool = False
    residual: bool = False

    def __post_init__(self) -> None:
        switches = self.shares_a, self.of_modules, self.residual
        if self.rule not in (None, *get_args(Rule)) or {type(switch) for switch in switches} != {bool}:
            raise ValueError(f"pool ({self.rule!r}, {switches}) must be a rule, or none, and true or false")
        if self.of_modules and (self.rule is None or self.shares_a):
            raise ValueError("a pool of a layer's modules needs a rule, and cannot share A")
        if self.residual and (self.rule is not None or self.shares_a):
            raise ValueError("LoRAs that are joined over layers have no rule and share no A")


# By the name of the method in an adapter folder. A folder of any other method with a pool says what it is.
POOLS = {
    "remix": Pool("constant"),
    "mixlora": Pool("softmax"),
    "hydralora": Pool("softmax", shares_a=True),
    "milora": Pool("softmax", of_modules=True),
    "remix_modules": Pool("constant", of_modules=True),
    "reslora": Pool(residual=True),
    "lora": Pool(),
    "rslora": Pool(),
}

ALL_LINEAR = "all-linear"  # as a target: every linear layer but the output's


@dataclass(frozen=True)
class AdapterConfig:
    """A pool of `pool_size` (n) LoRAs of rank `rank` (r), `active` (k) of them in use per position; or another method.

    `method`: `remix` gives every active LoRA the same constant weight omega; `mixlora` (arXiv 2404.15159) weights
    the active ones by a renormalised softmax (times k * omega, so that the total weight is the same); `hydralora`
    (arXiv 2404.19245) weights all by a softmax and has one A for the pool. `lora` and `rslora` are one LoRA, always
    on. Any other name is a label, and `pool` says how its pool works, if it has one.
    `virtual_tokens`, `vectors` and `vector_length` are not of pools: every adapter folder names them.
    `scope`: `block` places one router on each module that holds targets (an FFN) and lets it read that
    module's input; `module` gives each adapted linear its own router; `model` has one, which reads the input of the
    first such module and chooses for all that follow. `level`: one selection for each position, or one for each
    sequence, from the mean of the router's inputs over the prompt.
    `router_unit_input`: the router reads x / ||x|| instead of x. `clusters`: with `level: sequence`, the router reads
    the nearest of so many centres of the prompts' means instead (clusters.py); 0: the mean itself.
    """

    pool_size: int = 8
    active: int = 4
    rank: int = 8
    omega: Omega = "rslora"
    target_modules: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    dropout: float = 0.0
    method: str = "remix"
    scope: Scope = "block"
    level: Level = "token"
    router_init_std: float = 0.02
    router_unit_input: bool = True
    virtual_tokens: int = 20
    vectors: int = 256
    vector_length: int = 64
    clusters: int = 0
    pool: Pool | None = None  # by default that of `method` in POOLS
    settings: dict[str, Any] = field(default_factory=dict)  # those of the method alone, by name

    def __post_init__(self) -> None:
        """Raises ValueError for any value that could not be meant, so that a damaged file is not computed with."""
        for name in ("pool_size", "active", "rank", "virtual_tokens", "vectors", "vector_length"):
            if type(getattr(self, name)) is not int:
                raise ValueError(f"{name} ({getattr(self, name)!r}) must be a whole number")
        if not isinstance(self.settings, dict):
            raise ValueError(f"settings ({self.settings!r}) must be an object")
        if type(self.method) is not str:
            raise ValueError(f"method ({self.method!r}) must be text")
        for name, known in (("omega", Omega), ("scope", Scope), ("level", Level)):
            if getattr(self, name) not in get_args(known):
                raise ValueError(f"{name} ({getattr(self, name)!r}) must be one of {', '.join(get_args(known))}")
        for name, most in (("dropout", 1.0), ("router_init_std", math.inf)):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 <= value < most:
                raise ValueError(f"{name} ({value!r}) must be a number from 0 to below {most}")
        if type(self.clusters) is not int or self.clusters < 0:
            raise ValueError(f"clusters ({self.clusters!r}) must be a whole number, 0 or more")
        if self.clusters and self.level != "sequence":
            raise ValueError("clusters are of prompts: they need level sequence")
        if type(self.router_unit_input) is not bool:
            raise ValueError(f"router_unit_input ({self.router_unit_input!r}) must be true or false")
        if not self.target_modules or not all(isinstance(name, str) and name for name in self.target_modules):
            raise ValueError(f"target_modules ({self.target_modules!r}) must be names")
        if min(self.virtual_tokens, self.vectors, self.vector_length) < 1:
            raise ValueError("virtual_tokens, vectors and vector_length must be 1 or more")
        if self.pool is None:
            object.__setattr__(self, "pool", POOLS.get(self.method))
        if self.of_modules:  # one LoRA for each of the layer's linears, and each is named
            if ALL_LINEAR in self.target_modules:
                raise ValueError(f"target_modules ({ALL_LINEAR}) must name the linears of a layer, which are the pool")
            if self.scope != "block":
                raise ValueError(f"scope ({self.scope}) must be block: a layer's router chooses among its linears")
            object.__setattr__(self, "pool_size", len(self.target_modules))
        if self.pool_size < 1 or self.rank < 1:
            raise ValueError(f"pool_size ({self.pool_size}) and rank ({self.rank}) must be 1 or more")
        if not 1 <= self.active <= self.pool_size:
            raise ValueError(f"active ({self.active}) must lie between 1 and pool_size ({self.pool_size})")
        if self.scope == "model" and self.rule == "softmax":
            raise ValueError("scope model is one choice for all blocks: it needs a router of constant weights")

    @property
    def rule(self) -> Rule | None:
        """How the router weights the LoRAs; None without a router."""
        return self.pool.rule if self.pool else None

    @property
    def routed(self) -> bool:
        return self.rule is not None

    @property
    def shares_a(self) -> bool:
        """One A (r, D_in) for the whole pool, as HydraLoRA has it."""
        return self.pool is not None and self.pool.shares_a

    @property
    def of_modules(self) -> bool:
        """Is the pool made of the LoRAs of a layer's linears, one on each?"""
        return self.pool is not None and self.pool.of_modules

    @property
    def residual(self) -> bool:
        """Is its LoRA joined to those of the layers before?"""
        return self.pool is not None and self.pool.residual

    @property
    def on_each(self) -> int:
        """LoRAs on one linear: n, or 1 where they are spread over a layer's linears."""
        return 1 if self.of_modules else self.pool_size

    @property
    def scale(self) -> float:
        """omega, the constant weight of an active LoRA: 2/(k r), or 2/sqrt(k r) for `rslora`; k is 1 for LoRAs that are
        alone on their linear."""
        total_rank = self.rank if self.of_modules else self.active * self.rank
        return 2 / math.sqrt(total_rank) if self.omega == "rslora" else 2 / total_rank

    @property
    def total_weight(self) -> float:
        """What a soft rule's weights sum to: k * omega; with a shared A, of rank r, omega at k = 1."""
        if self.shares_a:
            return 2 / math.sqrt(self.rank) if self.omega == "rslora" else 2 / self.rank
        return self.active * self.scale

    @property
    def samples(self) -> bool:
        """Is there anything to sample? Not under a soft rule, nor when every LoRA is always on."""
        return self.rule == "constant" and self.active < self.pool_size

    def tensor_sizes(self) -> Sizes:
        """Those of a pool's tensors, which must all be there; none for a method without a pool."""
        if self.pool is None:
            return {}
        stacked = self.on_each * self.rank
        sizes: Sizes = {".lora_A": (self.rank if self.shares_a else stacked, None), ".lora_B": (None, stacked)}
        if self.routed:
            sizes[".router"] = (self.pool_size, None)
        if self.clusters:
            sizes[".router_common"] = (None,)
            sizes[".router_centres"] = (self.clusters, None)
        return sizes

    def to_dict(self) -> dict[str, Any]:
        """For `remix_config.json`: `pool` where the method's name does not say it, `settings` where there are any."""
        values = asdict(self) | {"target_modules": list(self.target_modules)}
        if self.pool == POOLS.get(self.method):
            del values["pool"]
        elif self.pool is not None:
            younger = {"of_modules": self.pool.of_modules, "residual": self.pool.residual}
            values["pool"] = {key: value for key, value in values["pool"].items() if younger.get(key, True)}
        if not self.settings:
            del values["settings"]
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "AdapterConfig":
        """Inverse of `to_dict`; keys younger than the adapter take their default. Raises ValueError for others."""
        names = {field.name for field in fields(cls)}
        if not names - YOUNGER <= set(values) <= names:
            raise ValueError(f"adapter config keys differ: {sorted((set(values) ^ names) - YOUNGER)}")
        changed: dict[str, Any] = {"target_modules": tuple(values["target_modules"])}
        if "pool" in values:
            changed["pool"] = Pool(**values["pool"])
        return cls(**(values | changed))
