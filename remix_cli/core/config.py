"""What an adapter is, apart from its weights. Standard library only, so that recipes load without torch."""

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

Omega = Literal["rslora", "lora"]
Method = Literal[
    "remix", "mixlora", "hydralora", "lora", "rslora", "dora", "ia3", "vblora", "prefix", "prompt", "p_tuning", "none"
]
ROUTED = ("remix", "mixlora", "hydralora")  # methods with a pool and a router
POOLED = (*ROUTED, "lora", "rslora")  # those that our own layer computes
# settings that adapters of the first release do not name
YOUNGER = {"virtual_tokens", "vectors", "vector_length", "clusters"}
Scope = Literal["block", "module"]
Level = Literal["token", "sequence"]


@dataclass(frozen=True)
class AdapterConfig:
    """A pool of `pool_size` (n) LoRAs of rank `rank` (r), `active` (k) of them in use per position; or another method.

    `method`: `remix` gives every active LoRA the same constant weight omega; `mixlora` (arXiv 2404.15159) weights
    the active ones by a renormalised softmax (times k * omega, so that the total weight is the same); `hydralora`
    (arXiv 2404.19245) weights all by a softmax and has one A for the pool. `lora` and `rslora` are one LoRA, always
    on. The others are PEFT's: `virtual_tokens` of the prompt methods, `vectors` and `vector_length` of VB-LoRA's
    bank. `none` is the base model.
    `scope`: `block` places one router on each module that holds targets (an FFN) and lets it read that
    module's input; `module` gives each adapted linear its own router. `level`: one selection for each
    position, or one for each sequence, from the mean of the router's inputs over the prompt.
    `router_unit_input`: the router reads x / ||x|| instead of x. `clusters`: with `level: sequence`, the router reads
    the nearest of so many centres of the prompts' means instead (clusters.py); 0: the mean itself.
    """

    pool_size: int = 8
    active: int = 4
    rank: int = 8
    omega: Omega = "rslora"
    target_modules: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    dropout: float = 0.0
    method: Method = "remix"
    scope: Scope = "block"
    level: Level = "token"
    router_init_std: float = 0.02
    router_unit_input: bool = True
    virtual_tokens: int = 20
    vectors: int = 256
    vector_length: int = 64
    clusters: int = 0

    def __post_init__(self) -> None:
        """Raises ValueError for any value that could not be meant, so that a damaged file is not computed with."""
        for name in ("pool_size", "active", "rank", "virtual_tokens", "vectors", "vector_length"):
            if type(getattr(self, name)) is not int:
                raise ValueError(f"{name} ({getattr(self, name)!r}) must be a whole number")
        for name, known in (("omega", Omega), ("method", Method), ("scope", Scope), ("level", Level)):
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
        if self.pool_size < 1 or self.rank < 1:
            raise ValueError(f"pool_size ({self.pool_size}) and rank ({self.rank}) must be 1 or more")
        if not 1 <= self.active <= self.pool_size:
            raise ValueError(f"active ({self.active}) must lie between 1 and pool_size ({self.pool_size})")

    @property
    def routed(self) -> bool:
        return self.method in ROUTED

    @property
    def shares_a(self) -> bool:
        """One A (r, D_in) for the whole pool, as HydraLoRA has it."""
        return self.method == "hydralora"

    @property
    def scale(self) -> float:
        """omega, the constant weight of an active LoRA: 2/(k r), or 2/sqrt(k r) for `rslora`."""
        total_rank = self.active * self.rank
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
        return self.method == "remix" and self.active < self.pool_size

    def misfit(self, shapes: dict[str, tuple[int, ...]]) -> str | None:
        """In what tensors of these shapes, by name, are not an adapter of this config; None if they may be one.

        A name's end says which dimensions the config sets; each of them must be there, so that no size is believed
        that the weights do not bear out.
        """
        stacked = self.pool_size * self.rank
        sizes: dict[str, tuple[int | None, ...]] = {}  # by the end of a name; None: the model's to say
        if self.method in POOLED:
            sizes = {".lora_A": (self.rank if self.shares_a else stacked, None), ".lora_B": (None, stacked)}
            sizes |= {".router": (self.pool_size, None)} if self.routed else {}
            sizes |= {".router_common": (None,), ".router_centres": (self.clusters, None)} if self.clusters else {}
        elif self.method == "dora":
            sizes = {".lora_A.weight": (self.rank, None), ".lora_B.weight": (None, self.rank)}
        elif self.method == "vblora":
            sizes = {"vblora_vector_bank": (self.vectors, self.vector_length)}
            sizes |= {"vblora_logits_A": (self.rank, None, self.vectors)}
        elif self.method in ("prefix", "prompt", "p_tuning"):
            sizes = {"embedding.weight": (self.virtual_tokens, None)}
        for end, wanted in sizes.items():
            found = {name: shape for name, shape in shapes.items() if name.endswith(end)}
            if not found:
                return f"no tensor named *{end}"
            for name, shape in found.items():
                if len(shape) != len(wanted) or any(w not in (None, s) for w, s in zip(wanted, shape, strict=True)):
                    return f"{name} is {shape}, declared {tuple('any' if w is None else w for w in wanted)}"
        return None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"target_modules": list(self.target_modules)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "AdapterConfig":
        """Inverse of `to_dict`; keys younger than the adapter take their default. Raises ValueError for others."""
        names = {field.name for field in fields(cls)}
        if not names - YOUNGER <= set(values) <= names:
            raise ValueError(f"adapter config keys differ: {sorted((set(values) ^ names) - YOUNGER)}")
        return cls(**(values | {"target_modules": tuple(values["target_modules"])}))
