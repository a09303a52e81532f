"""Routing over the steps of a run, from its metrics.jsonl alone."""

import itertools
import json
from dataclasses import dataclass

from remix_cli.errors import ArtefactError
from remix_cli.runs import RunFolder

# What metrics.jsonl calls it, and what people do.
MEASURES = {
    "ess_weights": "ESS of the weights, mean",
    "ess_weights_worst": "ESS of the weights, worst",
    "ess": "ESS of q, mean",
    "router_entropy": "entropy of q, nats",
    "largest_share": "largest share of tokens",
    "dead_loras": "dead LoRAs",
}
BARS = "▁▂▃▄▅▆▇█"


@dataclass
class History:
    """One run's measures at its logged steps."""

    run: str
    steps: list[int]
    values: dict[str, list[float]]  # by the keys of MEASURES


def read_history(folder: RunFolder) -> History:
    """Raises ArtefactError if the run has logged no routing."""
    found = History(folder.path.name, [], {key: [] for key in MEASURES})
    try:
        for line in folder.metrics.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            if not all(key in record for key in MEASURES):  # of an evaluation
                continue
            found.steps.append(record["step"])
            for key, values in found.values.items():
                values.append(float(record[key]))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArtefactError(f"{folder.metrics}: cannot be read ({error}); give the output_dir of a run") from None
    if not found.steps:
        raise ArtefactError(f"{folder.metrics}: no step with routing in it; does the run's method have a router?")
    return found


def sparkline(values: list[float], low: float, high: float, width: int) -> str:
    """Means over `width` stretches of equal length, as bars between `low` and `high`."""
    width = min(width, len(values))
    cuts = [round(i * len(values) / width) for i in range(width + 1)]
    span = (high - low) or 1.0
    line = ""
    for start, end in itertools.pairwise(cuts):
        mean = sum(values[start:end]) / (end - start)
        height = int((mean - low) / span * 8)
        line += BARS[min(7, max(0, height))]
    return line
