"""What an adapter is, apart from its weights. Standard library only, so that recipes load without torch."""

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

Omega = Literal["rslora", "lora"]
Method = Literal[
    "remix", "mixlora", "hydralora", "lora", "rslora", "dora", "ia3", "vblora", "prefix", "prompt", "p_tuning", "none"
]
ROUTED = ("remix", "mixlora", "hydralora")  # methods with a pool and a router
POOLED = (*ROUTED, "lora", "rslora")  # those that our own layer computes
YOUNGER = {"virtual_tokens", "vectors", "vector_length"}  # settings that adapters of the first release do not name
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
    `router_unit_input`: the router reads x / ||x|| instead of x.
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

    def __post_init__(self) -> None:
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

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"target_modules": list(self.target_modules)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "AdapterConfig":
        """Inverse of `to_dict`; keys younger than the adapter take their default. Raises ValueError for others."""
        names = {field.name for field in fields(cls)}
        if not names - YOUNGER <= set(values) <= names:
            raise ValueError(f"adapter config keys differ: {sorted((set(values) ^ names) - YOUNGER)}")
        return cls(**(values | {"target_modules": tuple(values["target_modules"])}))
