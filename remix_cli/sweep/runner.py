"""A sweep from start to end. What is done stays done: the same command goes on where it was stopped.

1. Every point of every arm is trained under the first seed.
2. As soon as an arm's points are all there, the best by the metric on held-out rows is trained under all seeds.
3. Those runs, and no others, are scored on the recipe's tasks.

What runs out of memory beside other runs is tried again alone, at the end. An arm of which a setting failed for
another reason than divergence is not chosen from: the settings would not have been compared.
"""

import functools
import itertools
import json
import math
import multiprocessing
import os
import signal
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from remix_cli.errors import ArtefactError, DivergedError, FailedRuns, Interrupted, RecipeError
from remix_cli.evaluation.evaluator import check_code
from remix_cli.recipe import Recipe, load_recipe
from remix_cli.recipe.schema import cost
from remix_cli.recipe.sweep_grammar import Point, Sweep, describe
from remix_cli.runs import RunFolder
from remix_cli.storage import lock_folder, write_json
from remix_cli.sweep.record import FILE, ArmRecord, SearchedPoint, SweepRecord, read_record
from remix_cli.sweep.work import Cause, Failure, is_scored, report_file, score_run, set_up, train_run
from remix_cli.tasks.base import Settings
from remix_cli.train.checkpoints import rows_of_last
from remix_cli.train.prepare import check_recipe
from remix_cli.train.resume import check_same_recipe
from remix_cli.train.told_formats import tell_formats

Say = Callable[[str], None]
Work = Callable[[Recipe], Failure | None]  # what went wrong
Then = Callable[[Failure | None], None]


@dataclass(frozen=True)
class Job:
    """What a worker is to do with a recipe, and what follows from how that ended."""

    work: Work
    recipe: Recipe
    then: Then


@dataclass
class _Arm:
    """Where one arm stands."""

    name: str
    points: list[Point]
    values: dict[Path, float] = field(default_factory=dict)  # of the metric, as a cost: less is better
    chosen: Point | None = None
    waiting: int = 0  # runs in hand
    sound: bool = True  # no run failed but for divergence


def run_sweep(sweep: Sweep, processes: int, say: Say, allow_code: bool = False) -> Path:
    """Carry it out and return the path of its `sweep.json`. `allow_code`: see `remix eval`.

    Raises RecipeError, BusyError, Interrupted, and RemixError at the end if a run failed for another reason than
    divergence, which makes a setting the worst of its arm; ArtefactError if an earlier `sweep.json` is damaged.
    """
    sweep = with_formats(sweep)
    _check(sweep, allow_code)
    with lock_folder(sweep.folder):
        if os.path.lexists(sweep.folder / FILE):
            read_record(sweep.folder / FILE)  # its other arms would be lost
        done = _Sweep(sweep, say, allow_code).run(processes)
        record = done.record()
        known = _other_arms(sweep, say) | record.arms
        arms = {name: known[name] for name in sweep.arms if name in known}
        write_json(sweep.folder / FILE, replace(record, arms=arms).to_dict())
    if done.failures:
        raise _failed(done.failures)
    return sweep.folder / FILE


def with_formats(sweep: Sweep) -> Sweep:
    """As each run's own recipe will have them. Raises DataError."""
    points = {arm: _all_with_formats(some) for arm, some in sweep.points.items()}
    others = {arm: _all_with_formats(some) for arm, some in sweep.others.items()}
    return replace(sweep, points=points, others=others)


def _all_with_formats(points: list[Point]) -> list[Point]:
    """Most points of an arm have the same rows, which are looked at once."""
    made: list[Point] = []
    for _, some in itertools.groupby(points, key=lambda point: (point.recipe.data, point.recipe.eval)):
        alike = list(some)
        told = tell_formats(alike[0].recipe).recipe
        for point in alike:
            recipe = point.recipe.model_copy(update={"data": told.data, "eval": told.eval})
            made.append(replace(point, recipe=recipe))
    return made


def _check(sweep: Sweep, allow_code: bool) -> None:
    """What can be refused before anything is trained. Raises RecipeError, SandboxError, ArtefactError."""
    _check_folder(sweep)
    for arm, points in sweep.points.items():
        try:
            check_recipe(points[0].recipe)  # files, targets: what each run would refuse
        except RecipeError as error:
            raise RecipeError(*(f"sweep.arms.{arm}: {problem}" for problem in error.problems)) from None
        check_code(points[0].recipe.eval.tasks, Settings(allow_code=allow_code))
    changed = []
    for points in sweep.points.values():
        for point in points:
            changed += _changed(sweep, point)
    if changed:
        raise RecipeError(*changed)


def _failed(failures: dict[str, Failure]) -> FailedRuns:
    """With the exit code of the first, and a line for each."""
    first = next(iter(failures))
    more = f" and {len(failures) - 1} more" if len(failures) > 1 else ""
    return FailedRuns(
        failures[first].exit_code,
        *(f"{what}: {failure.line}" for what, failure in failures.items()),
        f"failed: {first}{more}; mend the cause (logs are beside the run folders) and give the same command again, "
        "which keeps what is done",
    )


def _changed(sweep: Sweep, point: Point) -> list[str]:
    """How runs of the point, where there are some, were begun otherwise than the file now says: a line for each."""
    problems = []
    for seed in sweep.seeds:
        recipe = sweep.under(point, seed).recipe
        folder = RunFolder(Path(recipe.output_dir))
        if folder.recipe.is_file():
            try:
                check_same_recipe(recipe, load_recipe(folder.recipe, stored=True), folder)
            except RecipeError as error:
                problems.append(f"sweep.arms.{point.arm}: {'; '.join(error.problems)}")
    return problems


def _other_arms(sweep: Sweep, say: Say) -> dict[str, ArmRecord]:
    """What an earlier command with the same metric and seeds has left of arms that this one did not run.

    An arm that the file has changed since is none of them: its runs answer another question.
    """
    if not os.path.lexists(sweep.folder / FILE):
        return {}
    earlier = read_record(sweep.folder / FILE)
    if earlier.metric != sweep.metric or earlier.seeds != sweep.seeds:
        return {}
    kept = {}
    for name, points in sweep.others.items():
        if name not in earlier.arms:
            continue
        had = {str(sweep.folder / point.run) for point in earlier.arms[name].searched}
        has = {str(point.folder) for point in points}
        if had != has or any(_changed(sweep, point) for point in points):
            say(f"{name}: was run before with other settings than the file now has, so it is not in the table")
            continue
        kept[name] = earlier.arms[name]
    return kept


def _check_folder(sweep: Sweep) -> None:
    """A sweep's folder holds its arms and nothing else. Raises RecipeError."""
    if RunFolder(sweep.folder).recipe.exists():
        raise RecipeError(f"output_dir: {sweep.folder} holds a single run; choose another folder for the sweep")


class _Sweep:
    def __init__(self, sweep: Sweep, say: Say, allow_code: bool):
        self.sweep, self.say, self.allow_code = sweep, say, allow_code
        self.arms = {name: _Arm(name, points) for name, points in sweep.points.items()}
        self.errors: dict[Path, str] = {}
        self.failures: dict[str, Failure] = {}  # by run folder, or arm
        self.again: list[Job] = []  # for want of memory
        self.count = 0
        self.rows: dict[str, tuple[Path, tuple[str, str | None]]] = {}  # by what the recipe says of them

    def run(self, processes: int) -> "_Sweep":
        todo = []
        for arm in self.arms.values():
            for point in arm.points:
                arm.waiting += 1
                todo.append(Job(train_run, point.recipe, functools.partial(self._trained, arm, point)))
        try:
            self._do(todo, processes)
            if self.again:
                self.say(f"     {len(self.again)} runs lacked memory; now one at a time")
                todo, self.again = self.again, []
                self._do(todo, 1)
        except KeyboardInterrupt as error:
            number = error.number if isinstance(error, _Asked) else signal.SIGINT
            raise Interrupted(number, "interrupted; the same command goes on where every run was stopped") from None
        return self

    def _do(self, jobs: list[Job], processes: int) -> None:
        """These jobs and those that follow from them."""
        with _Pool(processes) as pool:
            self.pool = pool
            for job in jobs:
                self._submit(job)
            pool.until_idle()

    def _submit(self, job: Job) -> None:
        def done(problem: Failure | None) -> None:
            lacked_memory = problem is not None and problem.cause is Cause.NO_MEMORY
            if lacked_memory and self.pool.processes > 1:
                self.again.append(job)
            else:
                job.then(problem)

        self.pool.submit(job.work, job.recipe, done)

    def _trained(self, arm: _Arm, point: Point, problem: Failure | None) -> None:
        arm.waiting -= 1
        self.count += 1
        value = math.inf
        if problem is None:
            try:
                value = _cost(self.sweep.metric, point)
            except (OSError, ValueError, TypeError, AttributeError) as error:
                problem = Failure(f"metrics.jsonl: {error}", ArtefactError.exit_code)
        if problem is None:
            problem = self._other_rows(point)
        if problem is None:
            shown = f"{self.sweep.metric} {abs(value):.4f}"
        else:
            value = math.inf
            shown = problem.line
            self.errors[point.folder] = problem.line
            if problem.cause is not Cause.DIVERGED:
                arm.sound = False
                self.failures[str(point.folder)] = problem
        arm.values[point.folder] = value
        self.say(f"{self.count:>4} trained  {_name(arm, point)}: {shown}")
        if arm.chosen is None and arm.waiting == 0:
            self._choose(arm)
        elif arm.chosen is not None and problem is None:
            self._score(point)

    def _other_rows(self, point: Point) -> Failure | None:
        """Was the run trained on other rows than those before it whose recipes name the same?"""
        found = rows_of_last(RunFolder(point.folder).checkpoints)
        if found is None:
            return None
        asked = f"{point.recipe.model} {point.recipe.data}"
        first, rows = self.rows.setdefault(asked, (point.folder, found))
        if rows == found:
            return None
        line = f"trained on other rows than {first}: a data file was changed between them; begin a new output_dir"
        return Failure(line, RecipeError.exit_code)

    def _choose(self, arm: _Arm) -> None:
        if not arm.sound:
            return
        best = min(arm.points, key=lambda point: arm.values[point.folder])
        if not math.isfinite(arm.values[best.folder]):
            line = "every setting of it diverged; try lower rates"
            self.failures[f"sweep.arms.{arm.name}"] = Failure(line, DivergedError.exit_code)
            return
        arm.chosen = best
        self._score(best)
        for seed in self._seeds(best)[1:]:
            point = self.sweep.under(best, seed)
            arm.waiting += 1
            self._submit(Job(train_run, point.recipe, functools.partial(self._trained, arm, point)))

    def _seeds(self, point: Point) -> list[int]:
        """Without training nothing depends on a seed."""
        return self.sweep.seeds if point.recipe.method.trains else self.sweep.seeds[:1]

    def _score(self, point: Point) -> None:
        work = functools.partial(score_run, allow_code=self.allow_code)
        self._submit(Job(work, point.recipe, functools.partial(self._scored, point)))

    def _scored(self, point: Point, problem: Failure | None) -> None:
        said = ""
        if problem is not None:
            self.failures[str(point.folder)] = problem
            said = f": {problem.line}"
        self.say(f"     scored   {point.arm}, seed {point.seed}{said}")

    def record(self) -> SweepRecord:
        """Of the arms that were run."""
        arms = {name: self._record_of(arm) for name, arm in self.arms.items()}
        return SweepRecord(self.sweep.metric, self.sweep.seeds, arms)

    def _record_of(self, arm: _Arm) -> ArmRecord:
        searched = []
        for point in arm.points:
            value = _finite(arm.values.get(point.folder), self.sweep.metric, point)
            error = self.errors.get(point.folder)
            searched.append(SearchedPoint(point.setting, self._relative(point.folder), value, error))
        if arm.chosen is None:
            return ArmRecord(searched, None, [])
        reports = []
        for seed in self._seeds(arm.chosen):
            recipe = self.sweep.under(arm.chosen, seed).recipe
            if is_scored(recipe):
                reports.append(self._relative(report_file(recipe)))
        return ArmRecord(searched, arm.chosen.setting, reports)

    def _relative(self, folder: Path) -> str:
        return str(folder.relative_to(self.sweep.folder))


def _name(arm: _Arm, point: Point) -> str:
    setting = describe(point.setting)
    return f"{arm.name} ({setting}), seed {point.seed}" if setting else f"{arm.name}, seed {point.seed}"


def _finite(value: float | None, metric: str, point: Point) -> float | None:
    """The metric itself from its cost, which is its own inverse; None if there is none."""
    if value is None or not math.isfinite(value):
        return None
    return cost(metric, value, point.recipe.eval.tasks)


def _cost(metric: str, point: Point) -> float:
    """The metric of the run's last measurement on held-out rows, such that less is better."""
    value = math.nan
    for line in RunFolder(point.folder).metrics.read_text(encoding="utf-8").splitlines():
        value = json.loads(line).get(metric, value)
    if math.isnan(value):
        raise ValueError(f"no {metric} was measured; are there held-out rows?")
    return cost(metric, value, point.recipe.eval.tasks)


class _Pool:
    """Worker processes, each with a GPU in turn; what a job returns goes to its callback, in this process."""

    def __init__(self, processes: int):
        self.processes = processes
        context = multiprocessing.get_context("spawn")
        devices = context.Queue()
        for device in _devices(processes):
            devices.put(device)
        threads = max(1, (os.cpu_count() or 1) // processes)
        self.ended = context.Event()
        self.executor = ProcessPoolExecutor(processes, context, set_up, (devices, threads, self.ended))
        self.pending: dict[Future, Then] = {}

    def __enter__(self) -> "_Pool":
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is not None:
            self.stop()
        self.executor.shutdown(cancel_futures=True)

    def submit(self, job: Work, recipe: Recipe, then: Then) -> None:
        self.pending[self.executor.submit(job, recipe)] = then

    def until_idle(self) -> None:
        heeded = [s for s in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(s) != signal.SIG_IGN]
        before = {s: signal.signal(s, _interrupt) for s in heeded}
        try:
            while self.pending:
                for future in wait(self.pending, return_when=FIRST_COMPLETED).done:
                    then = self.pending.pop(future)
                    try:
                        then(future.result())
                    except Interrupted as error:  # the signal went to the worker, too, which was quicker
                        raise _Asked(error.signal_number) from None
                    except BrokenProcessPool:
                        line = "a worker process was killed, perhaps for want of memory; the same command goes on"
                        raise FailedRuns(2, line) from None
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def stop(self) -> None:
        """Ask the runs in hand to save and end; those that wait in a worker's queue are not begun."""
        self.ended.set()
        for future in self.pending:
            future.cancel()
        for process in multiprocessing.active_children():
            process.terminate()


class _Asked(KeyboardInterrupt):
    """Another signal than that of Ctrl-C, with the same consequences."""

    def __init__(self, number: int):
        super().__init__()
        self.number = number


def _interrupt(number: int, _: Any) -> None:
    raise _Asked(number)


def _devices(processes: int) -> list[str | None]:
    """Which GPU each process gets, in turn; None where there is no choice."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        names = [name for name in visible.split(",") if name]
    else:
        import torch

        names = [str(i) for i in range(torch.cuda.device_count())]
    if len(names) < 2:
        return [None] * processes
    return [names[i % len(names)] for i in range(processes)]
