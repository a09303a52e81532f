"""Does the mixture work? Thresholds, reasons, and a watch over a run.

Three ways to collapse, each with a threshold in the recipe's `alarm`:
- the weights in use: their effective support size falls below `ess`. Soft rules only; ReMix keeps it at k.
- the choice: one set of LoRAs serves the share `commonest` of the tokens or more: the pool is one LoRA of rank k r;
- the pool: more than the share `dead` of its LoRAs serve next to no tokens.
"""

from remix_cli.core.step_routing import DEAD_SHARE, StepRouting
from remix_cli.diagnostics.route_stats import BlockStatistics
from remix_cli.recipe.schema import Alarm


def block_problems(block: BlockStatistics, active: int, alarm: Alarm) -> list[str]:
    """Why this router has collapsed; empty if it has not, or has nothing to choose."""
    n = len(block.share)
    if active == n:
        return []
    found = []
    if active > 1 and block.ess_weights < alarm.ess:
        found.append(f"the weights have an effective support of {block.ess_weights:.2f} of {active} LoRAs")
    if block.commonest_set >= alarm.commonest:
        found.append(f"one set serves {100 * block.commonest_set:.0f} % of the tokens")
    if len(block.dead) > alarm.dead * n:
        found.append(f"{len(block.dead)} of {n} LoRAs are dead")
    return found


def verdict(blocks: list[BlockStatistics], active: int, alarm: Alarm) -> tuple[bool, str]:
    """(healthy, the answer in words): which blocks collapse and why, the commonest reason first."""
    reasons: dict[str, list[str]] = {}
    for block in blocks:
        for reason in block_problems(block, active, alarm):
            reasons.setdefault(reason, []).append(short_name(block.name))
    if active == len(blocks[0].share):
        return True, "nothing to route: every LoRA is always active"
    dead = sum(len(block.dead) for block in blocks)
    total = sum(len(block.share) for block in blocks)
    if not reasons:
        lowest = min(block.ess_weights for block in blocks)
        return True, (
            f"healthy: {len(blocks)} routers, {dead} of {total} LoRAs dead, "
            f"weights spread over {lowest:.2f} or more of {active}"
        )
    collapsed: set[str] = set()
    for of_reason in reasons.values():
        collapsed.update(of_reason)
    names = sorted(collapsed, key=_block_order)
    commonest = sorted(reasons, key=lambda reason: -len(reasons[reason]))
    told = "; ".join(f"{reasons[reason][0]}: {reason}" for reason in commonest[:3])
    return False, f"collapsing in {len(names)} of {len(blocks)} blocks ({_listed(names)}): {told}"


def _block_order(name: str) -> tuple[int, str]:
    number = name.split(".")[0]
    if not number.isdigit():
        return 0, name
    return int(number), name


def _listed(names: list[str]) -> str:
    listed = ", ".join(names[:8])
    if len(names) > 8:
        listed += f" and {len(names) - 8} more"
    return listed


def short_name(name: str) -> str:
    """`model.layers.12.mlp` -> `12.mlp`."""
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    if not numbers:
        return name
    return ".".join(parts[numbers[-1] :])


class Watch:
    """Warns when routers have collapsed for `alarm.patience` logged steps in a row, once until they recover."""

    def __init__(self, names: list[str], active: int, alarm: Alarm):
        self.names = names
        self.active = active
        self.alarm = alarm
        self.bad = [0] * len(names)  # by router: logged steps in a row in which it had collapsed
        self.warned = False

    def see(self, routing: StepRouting) -> str | None:
        """A line of warning, or None."""
        n = routing.used.shape[1]
        if self.active == n:
            return None
        decisions = routing.sums[:, 3]
        ess = (routing.sums[:, 2] / decisions).tolist()
        dead = ((routing.used / decisions[:, None]) < DEAD_SHARE).sum(-1).tolist()
        for i in range(len(self.names)):
            collapsed = (self.active > 1 and ess[i] < self.alarm.ess) or dead[i] > self.alarm.dead * n
            self.bad[i] = self.bad[i] + 1 if collapsed else 0
        found = [i for i, count in enumerate(self.bad) if count >= self.alarm.patience]
        if not found:
            self.warned = False
        if not found or self.warned:
            return None
        self.warned = True
        names = [short_name(self.names[i]) for i in found]
        first = found[0]
        return (
            f"warning: routing collapses in {len(found)} of {len(self.names)} blocks ({_listed(names)}): "
            f"{names[0]} has an effective support of {ess[first]:.2f} of {self.active} and {dead[first]} of {n} LoRAs "
            "dead; see docs/routing.md"
        )
