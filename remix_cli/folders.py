"""The run folder: what it holds, its recipe, and what can be refused of it at once. Needs no torch."""

import glob
import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from remix_cli.core.description import CONFIG_FILE, check_shapes, read_description, read_shapes
from remix_cli.core.lora_folder import PEFT_CONFIG, is_peft, read_peft_config
from remix_cli.errors import ArtefactError
from remix_cli.methods.registry import METHODS, method_named
from remix_cli.recipe import Recipe, Source, Task, load_recipe
from remix_cli.recipe.loader import dump
from remix_cli.recipe.schema import Model
from remix_cli.storage import read_whole, write_text
from remix_cli.stored_json import Damaged, Kinds, check_kinds, read_object

DTYPES = get_args(Model.model_fields["dtype"].annotation)
# what an adapter and its recipe must agree on
OF_BOTH = ("method", "pool", "pool_size", "active", "rank", "level", "settings")
BegunWith = dict[str, Any]  # by dotted key of the recipe; a resumed run may say otherwise
BEGUN_WITH = "# begun with "  # in front of them, in the second line
RUN_FROM = "# run from "  # in front of the working directory, in the first line of a run's recipe


@dataclass(frozen=True)
class RunFolder:
    """Names of what a run holds. `adapter/` is the last adapter, `best/` the one of lowest held-out loss."""

    path: Path

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def best(self) -> Path:
        return self.path / "best"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def trackers(self) -> Path:
        return self.path / "trackers.json"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def evaluations(self) -> Path:
        return self.path / "eval"

    @property
    def statistics(self) -> Path:
        return self.path / "stats"

    OWN = (
        "recipe.yaml",
        "adapter",
        "best",
        "checkpoints",
        "metrics.jsonl",
        "summary.json",
        "eval",
        "stats",
        "trackers.json",
        "tensorboard",
        "wandb",
        "dvclive",
    )

    @property
    def is_model(self) -> bool:
        """A model in the hub's format, exported or anyone's, and no run of ours."""
        return os.path.isfile(self.path / "config.json") and not os.path.isfile(self.recipe)

    @property
    def is_peft(self) -> bool:
        """A PEFT adapter, exported or anyone's."""
        return is_peft(self.path) and not os.path.isfile(self.recipe)

    @property
    def is_run(self) -> bool:
        """Or claims to be one: neither of the others."""
        return not self.is_model and not self.is_peft

    def check(self) -> None:
        """Raises ArtefactError if this is no run folder."""
        if not self.is_run:
            what = "a model" if self.is_model else "a PEFT adapter"
            raise ArtefactError(f"{self.path}: {what}, not a run; give the output_dir of a `remix train`")
        if os.path.isfile(self.path / CONFIG_FILE):
            raise ArtefactError(f"{self.path}: the adapter of a run; give that run's folder, with --best for best/")
        if not os.path.isfile(self.recipe):
            raise ArtefactError(
                f"{self.path}: not a run folder (no recipe.yaml); give the output_dir of a `remix train`"
            )

    def model_config(self) -> dict[str, Any]:
        """Of a model folder, its config.json. Raises ArtefactError."""
        return read_object(self.path / "config.json")

    def read_summary(self) -> dict[str, Any]:
        """What training wrote when it ended. Raises ArtefactError."""
        try:
            return check_kinds(read_object(self.summary), SUMMARY)
        except Damaged as error:
            raise ArtefactError(f"{self.summary}: {error}; move it away and resume the run") from None

    def foreign(self, where: Path) -> str | None:
        """Why the adapter at `where` is not the one that the run wrote there, in words; None if no record says so.

        What checkpoints say of recipe and rows is the same for the whole run. What the summary says of the weights
        holds while it is there: training removes it first and writes it last, so a kill leaves none. Raises
        ArtefactError.
        """
        described, made = read_description(where), self._origin()
        hashes = {"recipe": described.trained_on.recipe, "data": described.trained_on.data}
        if any(mine is not None and made.get(key, mine) != mine for key, mine in hashes.items()):
            return "trained by another run"
        weights = read_object(self.summary).get("adapters") if os.path.lexists(self.summary) else None
        known = weights.get(where.name) if isinstance(weights, dict) else None
        return "not the adapter that the run ended with" if known not in (None, described.weights_sha256) else None

    def _origin(self) -> dict[str, Any]:
        """Hashes of what the run is made from, by its newest checkpoint; empty if nothing says so."""
        for manifest in sorted(self.checkpoints.glob("step-*/manifest.json"), reverse=True):
            with suppress(ArtefactError):
                made = read_object(manifest).get("origin")
                if isinstance(made, dict):
                    return made
        return {}

    def write_recipe(self, recipe: Recipe, begun_with: BegunWith) -> None:
        """With the working directory in front, from which its relative paths count; then what the recipe said
        otherwise when the run was begun. Raises StorageError."""
        head = f"{RUN_FROM}{json.dumps(str(Path.cwd()))}\n"
        if begun_with:
            head += f"{BEGUN_WITH}{json.dumps(begun_with)}\n"
        write_text(self.recipe, head + dump(recipe))

    def begun_with(self) -> BegunWith:
        """What `write_recipe` was told; nothing where it cannot be read."""
        with suppress(OSError, ValueError, IndexError):
            line = self.recipe.read_text(encoding="utf-8").split("\n", 2)[1]
            found = json.loads(line.removeprefix(BEGUN_WITH)) if line.startswith(BEGUN_WITH) else {}
            return found if isinstance(found, dict) else {}
        return {}

    def load_recipe(self) -> Recipe:
        """The run's own recipe, its files found from any working directory, also when the folder was moved.

        For a model or PEFT folder a recipe that says no more than which model it is. Raises ArtefactError.
        """
        if not self.is_run:
            model = _described_model(self.path if self.is_model else base_of_peft(self.path))
            values = {"model": model, "adapter": {"method": "none"}, "data": {"train": [{"path": "rows.jsonl"}]}}
            return Recipe.model_validate(values | {"output_dir": str(self.path)})
        self.check()
        recipe = load_recipe(self.recipe, stored=True)
        return _located(recipe, self._origins(recipe.output_dir))

    def begun_in(self) -> Path | None:
        """The folder from which this is the recipe's `output_dir`, so that its other paths count from there, too."""
        output = load_recipe(self.recipe, stored=True).output_dir
        return next((o for o in self._origins(output) if o.is_dir() and _is_same(o / output, self.path)), None)

    def _origins(self, output_dir: str) -> list[Path]:
        """Where relative paths of the recipe may count from, likeliest first.

        Where the run was started; the folder in which this one lies as `output_dir` says, if a whole project was
        moved or the run is older than that record; here.
        """
        origins = []
        first = self.recipe.read_text(encoding="utf-8").partition("\n")[0]
        with suppress(ValueError, TypeError):
            if first.startswith(RUN_FROM):
                origins.append(Path(json.loads(first.removeprefix(RUN_FROM))))
        here, below = self.path.absolute(), Path(output_dir).parts
        if not Path(output_dir).is_absolute() and here.parts[-len(below) :] == below:
            origins.append(Path(*here.parts[: -len(below)]))
        return [*origins, Path.cwd()]


def _described_model(place: Path) -> dict[str, Any]:
    """The `model` group for a model folder, in the type of its weights; or for a hub id."""
    model: dict[str, Any] = {"name_or_path": str(place)}
    if (place / "config.json").is_file():
        found = read_object(place / "config.json")
        dtype = found.get("dtype") or found.get("torch_dtype")
        model["dtype"] = dtype if dtype in DTYPES else "float32"
    return model


def base_of_peft(folder: Path) -> Path:
    """The base model that a PEFT folder names, from here or from beside the folder. Raises ArtefactError."""
    named = read_peft_config(folder).get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        raise ArtefactError(f"{folder / PEFT_CONFIG}: base_model_name_or_path: names no model; write its path there")
    place = next((p for p in (Path(named), folder / named) if p.exists()), None)
    if place is None and Model(name_or_path=named).is_local:
        raise ArtefactError(
            f"{folder / PEFT_CONFIG}: base_model_name_or_path: {named} is not on this machine; write there where the "
            "base model lies now"
        )
    return place or Path(named)


def check_subject(path: Path, *, best: bool = False) -> RunFolder:
    """The folder of whatever can be asked something: a finished run, a model, a PEFT adapter. Raises ArtefactError."""
    folder = RunFolder(path)
    if folder.is_run:
        return check_run(path, best=best)
    if best:
        raise ArtefactError(f"{path}: --best is of a run, which has two adapters; leave it out")
    folder.load_recipe()
    return folder


def _is_same(one: Path, other: Path) -> bool:
    return one.exists() and one.samefile(other)


SUMMARY: Kinds = {
    "steps": int,
    "best_eval_loss": int | float | None,
    "best_step": int | None,
    "seconds": int | float,
    "parameters": dict,
}


def _located(recipe: Recipe, origins: list[Path]) -> Recipe:
    """The recipe with every relative path from the first of `origins` that has it; others, as hub ids, as they are."""

    def found(path: str) -> str:
        origin = next((o for o in origins if os.path.exists(o / path) or glob.glob(str(o / path))), Path.cwd())
        return path if origin == Path.cwd() else str(origin / path)

    def source(one: Source) -> Source:
        if one.path is None:
            return one
        path = found(one.path) if isinstance(one.path, str) else [*map(found, one.path)]
        return one.model_copy(update={"path": path})

    def task(one: Task) -> Task:
        sources = {"source": one.source, "shots_from": one.shots_from}
        return one.model_copy(update={key: source(value) for key, value in sources.items() if value is not None})

    model = recipe.model.model_copy(update={"name_or_path": found(recipe.model.name_or_path)})
    rows = {"train": [*map(source, recipe.data.train)], "validation": [*map(source, recipe.data.validation)]}
    data = recipe.data.model_copy(update=rows)
    asked = recipe.eval.model_copy(update={"tasks": [*map(task, recipe.eval.tasks)]})
    return recipe.model_copy(update={"model": model, "data": data, "eval": asked})


def _check_own(folder: RunFolder, where: Path) -> None:
    problem = folder.foreign(where)
    if problem:
        resume = "" if where == folder.best else f", or remix train {folder.recipe} --resume: a checkpoint has it"
        raise ArtefactError(f"{where}: {problem}; put the run's own back{resume}")


def check_run(path: Path, *, best: bool = False) -> RunFolder:
    """The folder of a run that has an adapter, whose description and sizes hold. Raises ArtefactError.

    What can be told without torch, so that whoever names a wrong folder learns it at once.
    """
    folder = RunFolder(path)
    folder.check()
    where = folder.best if best else folder.adapter
    if not (where / CONFIG_FILE).is_file():
        if best and folder.summary.is_file():
            raise ArtefactError(
                f"{where}: no evaluation beat the base model, so there is no best adapter; leave out --best"
            )
        raise ArtefactError(f"{where}: no adapter yet; finish the run with `remix train {folder.recipe} --resume`")
    recipe = folder.load_recipe()
    read_whole(where, _check_sizes)
    read_whole(where, lambda place: _check_own(folder, place))
    found, said = read_description(where).config, recipe.adapter_config()
    other = [key for key in OF_BOTH if getattr(found, key) != getattr(said, key)]
    if other:
        one, two = (", ".join(f"{key} {getattr(config, key)}" for key in other) for config in (found, said))
        raise ArtefactError(f"{where}: an adapter of {one}, but {folder.recipe} says {two}: put the run's own back")
    return folder


def _check_sizes(adapter: Path) -> None:
    """Raises ArtefactError for an adapter of a method that is not known, or of other sizes than its config says."""
    config = read_description(adapter).config
    if config.method not in METHODS:
        known = ", ".join(METHODS)
        raise ArtefactError(f"{adapter / CONFIG_FILE}: its method ({config.method!r}) is none of those known: {known}")
    check_shapes(adapter, method_named(config.method).tensor_sizes(config), read_shapes(adapter))


def report_file(path: Path) -> Path:
    """A report of `remix eval`: the file itself, or of a run folder its last of the adapter. Raises ArtefactError."""
    if not os.path.exists(path):
        raise ArtefactError(f"{path}: no such run folder or report")
    file = path
    if path.is_dir():
        found = [path / "eval" / f"{name}.json" for name in ("adapter", "best", "model")]
        file = next((f for f in found if f.is_file()), found[0])
    if not file.is_file():
        if holds_runs(path):
            raise ArtefactError(f"{path}: a sweep, not a run; compare it alone, or name runs of it")
        raise ArtefactError(
            f"{path}: not evaluated yet; run `remix eval {path}` (or name a report, RUN/eval/base.json)"
        )
    return file


def holds_runs(path: Path) -> bool:
    """A sweep's folder, as it is from the first run on: ARM/SETTING-seedS/recipe.yaml."""
    return not os.path.exists(path / "recipe.yaml") and any(path.glob("*/*/recipe.yaml"))
