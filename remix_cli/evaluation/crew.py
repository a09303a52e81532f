"""Several processes that score together: `accelerate launch -m remix_cli eval RUN`.

The first one keeps the answers and writes the report; the others answer their share and hand it over. What is asked
goes out in slices, so that an interrupted evaluation has kept the answers of those that were finished.
"""

from collections.abc import Iterator

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from remix_cli.launch import launch_size
from remix_cli.tasks.base import Line, Scorer

BATCHES = 8  # that each process answers between two times of handing over


class Crew:
    """The processes of this launch; one alone where there is none."""

    def __init__(self) -> None:
        self.size, self.rank = 1, 0
        if launch_size() > 1:
            state = Accelerator()
            self.size, self.rank = state.num_processes, state.process_index

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def answers(self, scorer: Scorer, todo: list[int]) -> Iterator[tuple[int, Line]]:
        """(item, line) for the items `todo` of the first process; all must ask alike, and all get all."""
        if self.size == 1:
            yield from scorer.run(todo)
            return
        told = [todo]
        broadcast_object_list(told)
        items = told[0]
        slice_size = BATCHES * scorer.batch_size * self.size
        for start in range(0, len(items), slice_size):
            mine = items[start : start + slice_size][self.rank :: self.size]
            yield from gather_object(list(scorer.run(mine)))
