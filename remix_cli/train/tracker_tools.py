"""The tools that show a run while it goes on, each through accelerate: how it is opened, and what it holds already.

A class says what accelerate's tracker of that name does not: where the tool writes, how the same tracked run is taken
up again, and the last step that it holds. Steps up to that one are not sent again.
"""

import logging
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from remix_cli.compat.trackio import end_run, last_step
from remix_cli.runs import RunFolder

if TYPE_CHECKING:
    import numpy as np

Row = dict[str, int | float]  # what one step has to show


@dataclass(frozen=True)
class Following:
    """One run of ours, as its trackers are told of it."""

    project: str
    folder: RunFolder
    recipe: dict[str, Any]  # by dotted key
    key: str  # 32 hexadecimal digits, which nothing else has
    since: int  # the step after which the run goes on

    @property
    def name(self) -> str:
        """The end of its folder's path: `runs/gsm8k`, and of a sweep's `arm/setting-seed0`."""
        return "/".join(self.folder.path.absolute().parts[-2:])


class Tool:
    """Give `name`, `package`, and what differs from accelerate's way."""

    name: ClassVar[str]  # accelerate's
    package: ClassVar[str]  # what pip installs
    module: ClassVar[str]  # what Python imports

    def __init__(self, run: Following, found: str | None):
        """`found`: the tool's own name for the tracked run that is to be taken up."""
        self.run, self.found = run, found
        self.tracker: Any = None
        self.held = -1  # the last step that the tracked run holds

    def open(self) -> None:
        """Raises whatever the tool does."""
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        self.tracker = LOGGER_TYPE_TO_CLASS[self.name](*self.arguments(), **self.options())
        self.tracker.start()
        self.opened()

    def arguments(self) -> tuple[Any, ...]:
        return (self.run.project,)

    def options(self) -> dict[str, Any]:
        """For the tool's own way of opening a run."""
        return {}

    def opened(self) -> None:
        """Find out what it holds, and tell a new tracked run the recipe."""

    def lacks(self, step: int, row: Row) -> Row:
        """What of `row` is not there yet."""
        return row if step > self.held else {}

    def log(self, step: int, row: Row) -> None:
        self.tracker.log(row, step=step)

    def show(self, step: int, name: str, pixels: "np.ndarray") -> None:
        """An image, (H, W, 3) uint8."""
        self.tracker.log_images({name: [pixels]}, step=step)

    def close(self) -> None:
        self.tracker.finish()

    def where(self) -> str:
        """Where a person finds the tracked run."""
        return self.run.name


class TensorBoard(Tool):
    """Its files are the run's own. Readers forget every step from `purge_step` on."""

    name, package, module = "tensorboard", "tensorboard", "tensorboard"

    def arguments(self) -> tuple[Any, ...]:
        return ("tensorboard", str(self.run.folder.path))  # a name, and where the folder of that name is

    def options(self) -> dict[str, Any]:
        return {"purge_step": self._first()}

    def _first(self) -> int | None:
        """The first step to be written: the one gone on from is, for its evaluation may not have been."""
        return self.run.since if os.path.exists(self._place()) else None

    def open(self) -> None:
        self.held = (self._first() or 0) - 1
        super().open()

    def opened(self) -> None:
        text = "\n".join(f"    {key}: {value}" for key, value in self.run.recipe.items())
        self.tracker.tracker.add_text("recipe", text, 0)

    def show(self, step: int, name: str, pixels: "np.ndarray") -> None:
        self.tracker.log_images({name: pixels}, step=step, dataformats="HWC")

    def _place(self) -> Path:
        return self.run.folder.path / "tensorboard"

    def where(self) -> str:
        return f"tensorboard --logdir {self._place()}"


class Wandb(Tool):
    """On line the server says which step it holds. Off line nobody does, and a run can only be written anew: all of it
    goes into one new folder, which `wandb sync` reads."""

    name, package, module = "wandb", "wandb", "wandb"

    def options(self) -> dict[str, Any]:
        import wandb

        return {
            "id": self.run.key,
            "name": self.run.name,
            "resume": "allow",
            "dir": str(self.run.folder.path),
            "config": self.run.recipe,
            "settings": wandb.Settings(silent=True),
        }

    def open(self) -> None:
        before = self._written()
        super().open()
        if self.tracker.run.offline:
            for folder in before:
                shutil.rmtree(folder)

    def opened(self) -> None:
        self.held = self.tracker.run.starting_step - 1

    def _written(self) -> list[Path]:
        return sorted(self.run.folder.path.glob("wandb/offline-run-*"))

    def where(self) -> str:
        run = self.tracker.run
        return f"wandb sync {self._written()[-1]}" if run.offline else run.url


class Mlflow(Tool):
    """Each value has steps of its own, and the store can be asked for them."""

    name, package, module = "mlflow", "mlflow", "mlflow"

    def options(self) -> dict[str, Any]:
        return {"run_id": self.found, "run_name": self.run.name}

    def open(self) -> None:
        import mlflow  # which sets up its log

        logging.getLogger(mlflow.__name__).setLevel(logging.WARNING)
        super().open()

    def opened(self) -> None:
        import mlflow

        if self.found is None:
            self.tracker.store_init_configuration(self.run.recipe)
        self.found = self.tracker.tracker.info.run_id
        client = mlflow.MlflowClient()
        self.steps: dict[str, set[int]] = {}
        for key in client.get_run(self.found).data.metrics:
            self.steps[key] = {point.step for point in client.get_metric_history(self.found, key)}
        self.held = max((max(steps) for steps in self.steps.values()), default=-1)

    def lacks(self, step: int, row: Row) -> Row:
        return {key: value for key, value in row.items() if step not in self.steps.get(_mlflow_name(key), ())}

    def log(self, step: int, row: Row) -> None:
        super().log(step, {_mlflow_name(key): value for key, value in row.items()})

    def show(self, step: int, name: str, pixels: "np.ndarray") -> None:
        import mlflow

        mlflow.log_image(pixels, key=name, step=step)

    def where(self) -> str:
        import mlflow

        return f"run {self.found} in {mlflow.get_tracking_uri()}"


def _mlflow_name(key: str) -> str:
    return "".join(c if c.isalnum() or c in "_-. /:" else "_" for c in key)


class Trackio(Tool):
    name, package, module = "trackio", "trackio", "trackio"

    @property
    def _name(self) -> str:
        """Runs of one name are one run there."""
        return f"{self.run.name}-{self.run.key[:8]}"

    def options(self) -> dict[str, Any]:
        quiet = {"auto_log_gpu": False, "auto_log_cpu": False, "embed": False}
        return {"name": self._name, "resume": "allow", "config": self.run.recipe} | quiet

    def opened(self) -> None:
        self.held = last_step(self.tracker.run)

    def show(self, step: int, name: str, pixels: "np.ndarray") -> None:
        import trackio

        self.log(step, {name: trackio.Image(pixels)})  # type: ignore[dict-item]

    def close(self) -> None:
        end_run()

    def where(self) -> str:
        return f'trackio show --project "{self.run.project}", {self._name}'


class DvcLive(Tool):
    """Its files are the run's own, and are written anew."""

    name, package, module = "dvclive", "dvclive", "dvclive"

    def options(self) -> dict[str, Any]:
        place = str(self.run.folder.path / "dvclive")
        return {"dir": place, "resume": False, "save_dvc_exp": False, "dvcyaml": None, "report": None}

    def opened(self) -> None:
        self.tracker.store_init_configuration(self.run.recipe)

    def show(self, step: int, name: str, pixels: "np.ndarray") -> None:
        self.tracker.live.step = step
        self.tracker.live.log_image(f"{name}.png", pixels)

    def where(self) -> str:
        return str(self.run.folder.path / "dvclive")


TOOLS: dict[str, type[Tool]] = {tool.name: tool for tool in (TensorBoard, Wandb, Mlflow, Trackio, DvcLive)}


def missing_packages(names: Iterable[str]) -> list[str]:
    """A line for each tool that is not installed."""
    from importlib.util import find_spec

    wanted = [TOOLS[name] for name in names]
    return [
        f"train.report_to: {tool.name} is not installed; pip install {tool.package}"
        for tool in wanted
        if find_spec(tool.module) is None
    ]
