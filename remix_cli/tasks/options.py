"""What tasks have in common that compare the likelihoods of options."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from remix_cli.data.formats import RowError
from remix_cli.tasks.base import Scorer, key_of

if TYPE_CHECKING:
    from remix_cli.data.rows import EncodedRow


class Comparing(Scorer):
    """A task that compares options by likelihood: `load` ends with `compare`, `run` reads `nats_of_options`."""

    options: list[list["EncodedRow"]]  # of each item a row for each option, in which the option alone is supervised

    def compare(self, options: list[list["EncodedRow"]]) -> None:
        """Set the options, and the keys from them. Raises DataError if the model cannot read one at once."""
        self.options = options
        self.keys = []
        of_all = []
        for rows in options:
            shown = []
            for row in rows:
                of_all.append(row.input_ids)
                shown += [row.input_ids, row.supervised]
            self.keys.append(key_of(*shown))
        self.check_fits(of_all)

    def nats_of_options(self, todo: list[int]) -> Iterator[tuple[int, list[float]]]:
        """(item, minus the log-likelihood of each of its options), as soon as all of an item's are known."""
        rows: list[EncodedRow] = []
        of_row: list[tuple[int, int]] = []  # (item, option) of each
        for item in todo:
            for option, row in enumerate(self.options[item]):
                rows.append(row)
                of_row.append((item, option))
        found: dict[int, dict[int, float]] = {item: {} for item in todo}
        for place, loss in self.row_losses(rows, [item for item, _ in of_row]):
            item, option = of_row[place]
            found[item][option] = loss.nats
            if len(found[item]) == len(self.options[item]):
                yield item, [found[item][i] for i in range(len(found[item]))]


def only_the_last_answer(ids: list[int], supervised: list[bool], task: str) -> "EncodedRow":
    """A row of which the last supervised stretch counts, not the answers of the examples before.

    Raises RowError if there is none.
    """
    import numpy as np

    from remix_cli.data.rows import EncodedRow

    if not any(supervised[1:]):
        raise RowError("an option has no token of its own")
    last = int(np.flatnonzero(supervised)[-1])
    first = last
    while first and supervised[first - 1]:
        first -= 1
    only = np.zeros(len(ids), bool)
    only[first : last + 1] = True
    return EncodedRow(np.array(ids, np.int32), only, task)
