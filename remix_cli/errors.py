"""The ways in which a command may end, each with its exit code. Standard library only.

0 done · 1 our bug · 2 bad recipe, data or flags (nothing written), or out of memory · 3 diverged · 4 storage ·
5 artefact or checkpoint refused · 6 output folder in use · 7 no sandbox here ·
129/130/143 interrupted by SIGHUP, Ctrl-C, SIGTERM · 141 nobody reads what is reported.
"""


class RemixError(Exception):
    """An error a user can act on. `problems` holds one line each: what, where, how to mend it."""

    exit_code = 1

    def __init__(self, *problems: str):
        super().__init__("\n".join(problems))
        self.problems = list(problems)


class RecipeError(RemixError):
    """The recipe or a flag is wrong; every problem found is listed at once."""

    exit_code = 2


class DataError(RemixError):
    """The data cannot be used as the recipe says."""

    exit_code = 2


class DivergedError(RemixError):
    """A loss, gradient or weight stopped being finite."""

    exit_code = 3


class StorageError(RemixError):
    """The output could not be written."""

    exit_code = 4


class ArtefactError(RemixError):
    """An adapter, checkpoint or run folder is damaged or does not belong to this base model."""

    exit_code = 5


class BusyError(RemixError):
    """Another process works in the output folder."""

    exit_code = 6


class SandboxError(RemixError):
    """Generated code cannot be confined on this machine, so it is not run."""

    exit_code = 7


class FailedRuns(RemixError):
    """Runs of a sweep failed. The exit code is what the first of them alone would have ended with."""

    def __init__(self, exit_code: int, *problems: str):
        super().__init__(*problems)
        self.exit_code = exit_code


class Interrupted(RemixError):
    """A signal ended the run after a checkpoint was written."""

    def __init__(self, signal_number: int, *problems: str):
        super().__init__(*problems)
        self.signal_number = signal_number
        self.exit_code = 128 + signal_number

    def __reduce__(self) -> tuple:
        """As a worker process hands it to its parent."""
        return type(self), (self.signal_number, *self.problems)


def shortened(text: str, length: int = 200) -> str:
    """On one line, cut between words: half an address would lead nowhere."""
    words = " ".join(text[: 50 * length].split())
    if len(words) <= length:
        return words
    kept = words[: length + 1].rpartition(" ")[0] or words[:length]
    return f"{kept} ..."


def is_out_of_memory(error: Exception) -> bool:
    """Python's, torch's and CUDA's own on a GPU, and torch's on a CPU; the last two have no class of their own."""
    names = {base.__name__ for base in type(error).__mro__}
    if names & {"MemoryError", "OutOfMemoryError"}:
        return True
    return any(words in str(error) for words in ("can't allocate memory", "CUDA error: out of memory"))
