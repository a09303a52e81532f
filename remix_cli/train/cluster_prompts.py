"""Find the prompts' clusters before the first step, on the base model: the new adapter changes nothing yet."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast

from remix_cli.core.clusters import centred, common_part, spherical_k_means
from remix_cli.core.patch import Adapter
from remix_cli.core.trace import Decision, Trace
from remix_cli.data.batches import collate
from remix_cli.data.chunks import in_chunks
from remix_cli.data.rows import EncodedRow
from remix_cli.models import batch_losses

Row = TypeVar("Row")
ROWS_PER_CLUSTER, FEWEST_ROWS = 16, 256  # of which the centres are made; more rows move them little


def rows_to_cluster(rows: Sequence[Row], clusters: int, seed: int) -> list[Row]:
    """A sample without replacement, of all rows if there are not enough."""
    order = np.random.default_rng([seed, 2]).permutation(len(rows))
    return [rows[i] for i in order[: max(FEWEST_ROWS, ROWS_PER_CLUSTER * clusters)]]


@torch.no_grad()
def find_clusters(
    adapter: Adapter,
    rows: list[EncodedRow],
    batch_size: int,
    accelerator: Accelerator,
    advance: Callable[[int], None] = lambda _: None,
) -> None:
    """Give every router the common part and the cluster centres of its inputs over the prompts of `rows`.

    Every process reckons with the same rows, as a sharded base needs; the first one's result holds for all, so that
    no two route differently by rounding. `advance` hears of rows done.
    """
    adapter.model.eval()
    means = {name: torch.zeros(len(rows), len(router.common)) for name, router in adapter.routers.items()}

    def measure(chunk: list[int]) -> dict[str, Decision]:
        batch = collate([rows[i] for i in chunk]).to(accelerator.device)
        trace = Trace(prompt=batch.prompt, quantise=False)
        with adapter.tracing(trace):
            batch_losses(adapter.model, batch)
        return trace.decisions

    for chunk, decisions in in_chunks([len(row.input_ids) for row in rows], batch_size, measure):
        for name, decision in decisions.items():
            means[name][chunk] = decision.inputs[:, 0].float().cpu()
        advance(len(chunk))
    for name, router in adapter.routers.items():
        prompts = means[name].to(accelerator.device)
        common = common_part(prompts)
        centres = spherical_k_means(centred(prompts, common), len(router.centres))
        router.common.copy_(broadcast(common))
        router.centres.copy_(broadcast(centres))
