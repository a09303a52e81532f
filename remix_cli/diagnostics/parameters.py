"""Parameter counts of an adapter, from shapes alone (a model skeleton will do)."""

from dataclasses import asdict, dataclass

from remix_cli.core.patch import Adapter


@dataclass(frozen=True)
class ParameterCounts:
    lora_a: int
    lora_b: int
    other: int  # of methods without matrices A and B
    router: int
    active: int  # adapter parameters that serve one token: k of n LoRAs, and the routers
    base: int
    frozen: int = 0  # LoRAs that are no longer trained

    @property
    def trained(self) -> int:
        return self.lora_a + self.lora_b + self.other + self.router - self.frozen

    def describe(self) -> str:
        parts = {"A": self.lora_a, "B": self.lora_b, "other": self.other, "router": self.router}
        listed = ", ".join(f"{name} {count:,}" for name, count in parts.items() if count)
        if self.frozen:
            listed += "; A and B frozen"
        return f"{self.trained:,} trained ({listed or 'nothing'}), {self.active:,} active per token"

    def to_dict(self) -> dict[str, int]:
        values = asdict(self) | {"trained": self.trained}
        if not self.frozen:
            del values["frozen"]
        return values


def count_parameters(adapter: Adapter) -> ParameterCounts:
    loras = adapter.lora_parameters()
    a = sum(p.numel() for name, p in loras.items() if ".lora_A" in name)
    b = sum(p.numel() for name, p in loras.items() if ".lora_B" in name)
    other = sum(p.numel() for p in loras.values()) - a - b
    router = sum(p.numel() for p in adapter.router_parameters().values())
    everything = sum(p.numel() for p in adapter.model.parameters())
    active = (a + b) * adapter.config.active // adapter.config.pool_size + other + router
    frozen = 0 if adapter.loras_learn else a + b
    return ParameterCounts(a, b, other, router, active, everything - a - b - other - router, frozen)
