"""What tasks have in common that compare the likelihoods of options."""

from typing import TYPE_CHECKING

from remix_cli.data.formats import RowError

if TYPE_CHECKING:
    from remix_cli.data.encode import EncodedRow


def only_the_last_answer(ids: list[int], supervised: list[bool], task: str) -> "EncodedRow":
    """A row of which the last supervised stretch counts, not the answers of the examples before.

    Raises RowError if there is none.
    """
    import numpy as np

    from remix_cli.data.encode import EncodedRow

    if not any(supervised[1:]):
        raise RowError("an option has no token of its own")
    last = int(np.flatnonzero(supervised)[-1])
    first = last
    while first and supervised[first - 1]:
        first -= 1
    only = np.zeros(len(ids), bool)
    only[first : last + 1] = True
    return EncodedRow(np.array(ids, np.int32), only, task)
