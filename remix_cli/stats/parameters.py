"""Parameter counts of an adapter, from shapes alone (a model skeleton will do)."""

from dataclasses import asdict, dataclass

from remix_cli.adapter.patch import Adapter


@dataclass(frozen=True)
class ParameterCounts:
    lora_a: int
    lora_b: int
    router: int
    active: int  # adapter parameters that serve one token: k of n LoRAs, and the routers
    base: int

    @property
    def trained(self) -> int:
        return self.lora_a + self.lora_b + self.router

    def to_dict(self) -> dict[str, int]:
        return asdict(self) | {"trained": self.trained}


def count_parameters(adapter: Adapter) -> ParameterCounts:
    loras = adapter.lora_parameters()
    a = sum(p.numel() for name, p in loras.items() if name.endswith("lora_A"))
    b = sum(p.numel() for name, p in loras.items() if name.endswith("lora_B"))
    router = sum(p.numel() for p in adapter.router_parameters().values())
    everything = sum(p.numel() for p in adapter.model.parameters())
    active = (a + b) * adapter.config.active // adapter.config.pool_size + router
    return ParameterCounts(a, b, router, active, everything - a - b - router)
