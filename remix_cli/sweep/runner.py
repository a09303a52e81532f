"""A sweep from start to end. What is done stays done: the same command goes on where it was stopped.

1. Every point of every arm is trained under the first seed.
2. As soon as an arm's points are all there, the best by the metric on held-out rows is trained under all seeds.
3. Those runs, and no others, are scored on the recipe's tasks.
With a number of hours the seeds are not given: once all arms are chosen, as many follow as fit into what is left.

What runs out of memory beside other runs is tried again at the end beside half as many, until it is alone. An arm of
which a setting failed for another reason than divergence is not chosen from: the settings would not have been compared.
"""

import functools
import itertools
import json
import math
import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from pathlib import Path

from remix_cli.errors import ArtefactError, DivergedError, FailedRuns, Interrupted, RecipeError
from remix_cli.evaluation.evaluator import check_code
from remix_cli.evaluation.statistics import too_few
from remix_cli.recipe import Recipe, load_recipe
from remix_cli.recipe.obvious import consecutive
from remix_cli.recipe.schema import cost
from remix_cli.recipe.sweep_grammar import Point, Sweep, describe
from remix_cli.runs import RunFolder
from remix_cli.storage import lock_folder, write_json
from remix_cli.sweep.forecast import Awaited, Forecast, in_words, last_logged
from remix_cli.sweep.outcome import write_spelt_out
from remix_cli.sweep.pool import Asked, Pool, Work
from remix_cli.sweep.record import FILE, ArmRecord, SearchedPoint, SweepRecord, read_record
from remix_cli.sweep.size import run_sizes
from remix_cli.sweep.words import how_many, metric_in_words
from remix_cli.sweep.work import (
    Cause,
    Ended,
    Failure,
    is_scored,
    report_file,
    score_run,
    train_run,
)
from remix_cli.tasks.base import Settings
from remix_cli.train.checkpoints import origin_of_last
from remix_cli.train.prepare import check_recipe
from remix_cli.train.resume import Change, compare_recipes
from remix_cli.train.run_size import RunSize
from remix_cli.train.told_formats import day_of, tell_formats

Say = Callable[[str], None]
MOST_SEEDS = 10  # that a number of hours is filled with


@dataclass(frozen=True)
class Job:
    """What a worker is to do with a recipe, and what follows from how that ended."""

    work: Work
    recipe: Recipe
    then: Callable[[Failure | None, float], None]  # with the seconds that it took
    order: int  # seed by seed, so that whoever stops early has all arms under the same seeds, and scored


@dataclass
class _Arm:
    """Where one arm stands."""

    name: str
    points: list[Point]
    values: dict[Path, float] = field(default_factory=dict)  # of the metric, as a cost: less is better
    chosen: Point | None = None
    waiting: int = 0  # runs in hand
    sound: bool = True  # no run failed but for divergence


def run_sweep(
    sweep: Sweep,
    processes: int,
    say: Say,
    allow_code: bool = False,
    hours: float | None = None,
    show: Say = lambda _: None,
) -> Path:
    """Carry it out and return the path of its `sweep.json`. `allow_code`: see `remix eval`.

    `hours`: more seeds than the sweep's follow as long as they fit into so many. `say` gets a line for each run that
    has ended, `show` every few seconds one that stands for the last.

    Raises RecipeError, BusyError, Interrupted, and RemixError at the end if a run failed for another reason than
    divergence, which makes a setting the worst of its arm; ArtefactError if an earlier `sweep.json` is damaged.
    """
    sweep = with_formats(sweep)
    _check(sweep, allow_code)
    sweep = with_one_date(sweep)
    with lock_folder(sweep.folder):
        earlier = read_record(sweep.folder / FILE) if os.path.lexists(sweep.folder / FILE) else None
        write_spelt_out(sweep)
        sizes = say_sizes(sweep, say)
        done = _Sweep(sweep, sizes, processes, say, show, allow_code)
        try:
            done.run(hours)
        except Interrupted:
            if earlier is None or earlier.left is not None:  # `remix compare` shows what there is, or what there was
                _write_record(sweep, replace(done.record(), left=done.left()), say)
            raise
        _write_record(sweep, done.record(), say)
    if done.failures:
        raise _failed(done.failures)
    return sweep.folder / FILE


def _write_record(sweep: Sweep, record: SweepRecord, say: Say) -> None:
    known = _other_arms(sweep, say) | record.arms
    arms = {name: known[name] for name in sweep.arms if name in known}
    write_json(sweep.folder / FILE, replace(record, arms=arms).to_dict())


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


def with_one_date(sweep: Sweep) -> Sweep:
    """All runs have the day that the first was begun on, where the chat template writes one: the same rows."""
    begun = next((found for points in sweep.points.values() for p in points if (found := _date_of(sweep, p))), None)
    days: dict[str, str | None] = {}  # by what decides it
    points: dict[str, list[Point]] = {arm: [] for arm in sweep.points}
    for point in itertools.chain.from_iterable(sweep.points.values()):
        key = f"{point.recipe.model} {point.recipe.data.use_chat_template}"
        if key not in days:
            day = day_of(point.recipe)
            days[key] = day and (begun or day)
        points[point.arm].append(replace(point, recipe=point.recipe.with_date(days[key])))
    return replace(sweep, points=points)


def _date_of(sweep: Sweep, point: Point) -> str | None:
    """That the run of the point was begun on, under the first seed that has one."""
    for seed in sweep.seeds:
        folder = RunFolder(sweep.under(point, seed).folder)
        if folder.recipe.is_file():
            return load_recipe(folder.recipe, stored=True).data.template_date
    return None


def _check(sweep: Sweep, allow_code: bool) -> None:
    """What can be refused before anything is trained. Raises RecipeError, SandboxError, ArtefactError."""
    check_same_recipes(sweep)
    for arm, points in sweep.points.items():
        try:
            check_recipe(points[0].recipe)  # files, targets: what each run would refuse
        except RecipeError as error:
            raise RecipeError(*(f"sweep.arms.{arm}: {problem}" for problem in error.problems)) from None
        check_code(points[0].recipe.eval.tasks, Settings(allow_code=allow_code))


def check_same_recipes(sweep: Sweep) -> None:
    """What lies in the sweep's folder must be runs of this sweep. Raises RecipeError, one line for all of them."""
    _check_folder(sweep)
    runs: Counter[str] = Counter()  # by what was changed
    changes: dict[str, Change] = {}
    arms = set()
    for points in sweep.points.values():
        for change in itertools.chain.from_iterable(_changed(sweep, point) for point in points):
            what = change.but("")
            runs[what] += 1
            changes[what] = change
            arms.add(points[0].arm)
    if not changes:
        return
    where = f"sweep.arms.{arms.pop()}: " if len(arms) == 1 and len(sweep.points) > 1 else ""
    said = "; ".join(change.but(_count(runs[what], sweep.folder)) for what, change in changes.items())
    raise RecipeError(f"{where}{said}; add output_dir=OTHER to begin anew, or give the value of before to go on")


def _count(runs: int, folder: Path) -> str:
    return f"{how_many([runs], 'run')} in {folder} {'were' if runs > 1 else 'was'}"


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


def _changed(sweep: Sweep, point: Point) -> list[Change]:
    """How runs of the point, where there are some, were begun otherwise than the file now says; for each run."""
    changed = []
    for seed in sweep.seeds:
        recipe = sweep.under(point, seed).recipe
        folder = RunFolder(Path(recipe.output_dir))
        if folder.recipe.is_file():
            changed += compare_recipes(recipe, load_recipe(folder.recipe, stored=True))[0]
    return changed


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


def say_sizes(sweep: Sweep, say: Say) -> dict[Path, RunSize]:
    """Read the rows, and say how large the runs are. Raises DataError."""
    say("reading and encoding the rows")
    sizes = run_sizes(point for points in sweep.points.values() for point in points)
    trained = [size for size in sizes.values() if size.tokens] or list(sizes.values())
    by_tokens = sorted(trained, key=lambda size: size.tokens)
    least, most = by_tokens[0], by_tokens[-1]
    more = f" to {most.describe()}" if most.tokens > least.tokens else ""
    say(f"each run: {least.describe()}{more}")
    few = too_few(least.held_out)
    if few:
        say(f"warning: held-out rows: {few}")
    return sizes


class _Sweep:
    def __init__(self, sweep: Sweep, sizes: dict[Path, RunSize], processes: int, say: Say, show: Say, allow_code: bool):
        self.sweep, self.processes, self.say, self.show, self.allow_code = sweep, processes, say, show, allow_code
        self.sizes = sizes  # of the points under the first seed; the others' are the same
        self.arms = {name: _Arm(name, points) for name, points in sweep.points.items()}
        self.forecast = Forecast(processes)
        self.has_forecast = False  # has it been said how long this takes, by what was measured now?
        self.has_guess = False  # or by what earlier runs took?
        self.hours: float | None = None  # that it may take
        self.errors: dict[Path, str] = {}
        self.failures: dict[str, Failure] = {}  # by run folder, or arm
        self.again: list[Job] = []  # for want of memory
        self.count = 0
        self.total = 0
        self.rows: dict[str, tuple[Path, tuple[str, str | None]]] = {}  # by what the recipe says of them

    def run(self, hours: float | None) -> "_Sweep":
        begun = time.monotonic()
        self.hours = hours
        todo = []
        for arm in self.arms.values():
            for point in arm.points:
                todo.append(self._job(arm, point))
            for seed in self._seeds(arm.points[0])[1:]:
                self._await_seed(arm, seed)
            self.forecast.scorings[arm.name] += len(self._seeds(arm.points[0]))
        try:
            self._do(todo)
            if hours is not None:
                self._do(self._more_seeds(3600 * hours - (time.monotonic() - begun)))
        except KeyboardInterrupt as error:
            number = error.number if isinstance(error, Asked) else signal.SIGINT
            so_far = f"remix compare {self.sweep.folder} shows what there is"
            raise Interrupted(number, f"interrupted; the same command goes on, {so_far}") from None
        return self

    def _more_seeds(self, left: float) -> list[Job]:
        """Runs of all chosen arms under as many further seeds as fit into `left` seconds; those that are done do."""
        chosen = [arm for arm in self.arms.values() if arm.chosen is not None and arm.chosen.recipe.method.trains]
        first = self.sweep.seeds[0]
        seeds = [first]
        for seed in consecutive(first + 1, MOST_SEEDS - 1):
            cost_of_seed = sum(self._seconds_under(arm, seed) for arm in chosen) / self.processes
            if cost_of_seed > left:
                break
            left -= cost_of_seed
            seeds.append(seed)
        self.sweep = replace(self.sweep, seeds=seeds)
        self.say(f"     seeds that fit: {', '.join(map(str, seeds))}")
        jobs = []
        for arm in chosen:
            self.forecast.scorings[arm.name] += len(seeds) - 1
            jobs += self._jobs_under_other_seeds(arm)
        return jobs

    def _seconds_under(self, arm: _Arm, seed: int) -> float:
        """That the chosen setting of the arm will take; 0 if that is done."""
        assert arm.chosen is not None
        if _is_complete(self.sweep.under(arm.chosen, seed)):
            return 0.0
        seconds = self.forecast.seconds_of_run(arm.name, self.sizes[arm.chosen.folder])
        return (seconds or 0.0) + self.forecast.seconds_of_scoring(arm.name)

    def _job(self, arm: _Arm, point: Point, setting: Point | None = None) -> Job:
        """Train the point; `setting`: the same under the first seed, if it has another."""
        size = self.sizes[(setting or point).folder]
        self.total += 1
        if _is_complete(point):
            self.forecast.had_run(arm.name, size, _seconds_of_summary(point))
        else:
            self.forecast.awaited[point.folder] = Awaited(arm.name, size, point.folder)
        arm.waiting += 1
        return Job(train_run, point.recipe, functools.partial(self._trained, arm, point), self._order(point))

    def _order(self, point: Point) -> int:
        return 2 * self.sweep.seeds.index(point.seed)

    def _await_seed(self, arm: _Arm, seed: int) -> None:
        """A run whose setting is not chosen yet is expected to be as large as any."""
        largest = max((self.sizes[point.folder] for point in arm.points), key=lambda size: size.work)
        self.total += 1
        self.forecast.awaited[arm.name, seed] = Awaited(arm.name, largest)

    def _jobs_under_other_seeds(self, arm: _Arm) -> list[Job]:
        assert arm.chosen is not None
        jobs = []
        for seed in self._seeds(arm.chosen)[1:]:
            if self.forecast.awaited.pop((arm.name, seed), None) is not None:
                self.total -= 1  # it is counted as what it turned out to be
            jobs.append(self._job(arm, self.sweep.under(arm.chosen, seed), arm.chosen))
        return jobs

    def _do(self, jobs: list[Job]) -> None:
        """These jobs and those that follow from them; what lacked memory again, beside half as many others."""
        processes = self.processes
        self._at_once(jobs, processes)
        while self.again:
            jobs, self.again = self.again, []
            processes //= 2
            at_once = "one" if processes == 1 else processes
            self.say(f"     {how_many([len(jobs)], 'run')} lacked memory; now {at_once} at a time")
            self.forecast.processes = processes
            self._at_once(jobs, processes)

    def _at_once(self, jobs: list[Job], processes: int) -> None:
        if not jobs:
            return
        if self.forecast.awaited:
            self.say("loading the model; how long all takes is known after the first step")
        with Pool(processes) as pool:
            self.pool = pool
            for job in jobs:
                self._submit(job)
            pool.until_idle(self._look)

    def _submit(self, job: Job) -> None:
        def done(ended: Ended) -> None:
            problem = ended.failure
            lacked_memory = problem is not None and problem.cause is Cause.NO_MEMORY
            if lacked_memory and self.pool.processes > 1:
                self.again.append(job)
            else:
                job.then(problem, ended.seconds)

        self.pool.submit(job.work, job.recipe, done, job.order)

    def _look(self) -> None:
        """Every few seconds: how far the runs in hand are, and as soon as that is known, how long all will take."""
        left = self.forecast.seconds_left()
        if left is None:
            return
        if not self.has_forecast and self.forecast.has_measured:
            self.has_forecast = True
            aside = f"and what loading the model takes{self._unknown_yet()}"
            self.say(f"     about {_until(left)} by the first steps, {aside}")
        elif not self.has_forecast and not self.has_guess:
            self.has_guess = True
            self.say(f"     about {_until(left)} by what earlier runs took; said anew after the first step")
        self._compare_with_hours(left)
        self.show(f"{self.count}/{self.total} runs{self._in_hand()}; {in_words(left)} left")

    def _compare_with_hours(self, left: float) -> None:
        """Say it once if the search alone takes longer than all was to take."""
        if self.hours is None or left <= 3600 * self.hours:
            return
        cut = "Ctrl-C, then fewer arms (--only), or fewer steps in another output_dir"
        self.say(f"     that is more than the {self.hours:g} h asked for: {cut}")
        self.hours = None

    def _in_hand(self) -> str:
        parts = []
        for run in self.forecast.awaited.values():
            logged = last_logged(run.folder) if run.folder else None
            if run.folder and logged and logged.step < run.size.steps:
                parts.append(f"{run.folder.relative_to(self.sweep.folder)} {logged.step}/{run.size.steps}")
        return f"; {', '.join(parts[: self.processes])}" if parts else ""

    def _trained(self, arm: _Arm, point: Point, problem: Failure | None, seconds: float) -> None:
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
        awaited = self.forecast.awaited.pop(point.folder, None)
        if problem is None:
            if awaited is not None:
                seconds = max(seconds, _seconds_of_summary(point))  # that of earlier parts, too
                self.forecast.ran(arm.name, awaited.size, seconds)
            shown = f"{metric_in_words(self.sweep.metric)} {abs(value):.4f}"
        else:
            value = math.inf
            shown = problem.line
            self.errors[point.folder] = problem.line
            if problem.cause is not Cause.DIVERGED:
                arm.sound = False
                self.failures[str(point.folder)] = problem
        arm.values[point.folder] = value
        following = self._follow(arm, point, problem)
        took = f", {in_words(seconds)}" if awaited is not None else ""
        self.say(f"{self.count:>4}/{self.total} trained  {_name(arm, point)}: {shown}{took}{self._left()}")
        self._compare_with_hours(self.forecast.seconds_left() or 0.0)
        for job in following:
            self._submit(job)

    def _left(self) -> str:
        left = self.forecast.seconds_left()
        if not left:
            return ""
        self.has_forecast = True
        return f"; {_until(left)}{self._unknown_yet()}"

    def _unknown_yet(self) -> str:
        return ", and scoring" if self.forecast.scores_unmeasured else ""

    def _follow(self, arm: _Arm, point: Point, problem: Failure | None) -> list[Job]:
        """What is to be done now that the point is trained."""
        if arm.chosen is not None and problem is None:
            return [self._scoring(point)]
        if arm.chosen is not None:
            self.forecast.scorings[arm.name] -= 1
            return []
        if arm.waiting:
            return []
        self._choose(arm)
        if arm.chosen is None:
            self._expect_nothing_of(arm)
            return []
        return [self._scoring(arm.chosen), *self._jobs_under_other_seeds(arm)]

    def _expect_nothing_of(self, arm: _Arm) -> None:
        """Nothing is chosen from it: what was expected to follow does not."""
        seeds = self._seeds(arm.points[0])
        for seed in seeds[1:]:
            self.forecast.awaited.pop((arm.name, seed), None)
            self.total -= 1
        self.forecast.scorings[arm.name] -= len(seeds)

    def _other_rows(self, point: Point) -> Failure | None:
        """Was the run trained on other rows than those before it whose recipes name the same?"""
        origin = origin_of_last(RunFolder(point.folder).checkpoints)
        if origin is None:
            return None
        found = origin.data, origin.held_out
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

    def _seeds(self, point: Point) -> list[int]:
        """Without training nothing depends on a seed."""
        return self.sweep.seeds if point.recipe.method.trains else self.sweep.seeds[:1]

    def _scoring(self, point: Point) -> Job:
        work = functools.partial(score_run, allow_code=self.allow_code)
        then = functools.partial(self._scored, point, is_scored(point.recipe))
        return Job(work, point.recipe, then, self._order(point) + 1)

    def _scored(self, point: Point, was_scored: bool, problem: Failure | None, seconds: float) -> None:
        said = ""
        self.forecast.scorings[point.arm] -= 1
        if problem is not None:
            self.failures[str(point.folder)] = problem
            said = f": {problem.line}"
        elif not was_scored:
            self.forecast.scored(point.arm, seconds)
        self.say(f"{'':>{4 + len(str(self.total))}} scored   {point.arm}, seed {point.seed}{said}")

    def record(self) -> SweepRecord:
        """Of the arms that were run."""
        arms = {name: self._record_of(arm) for name, arm in self.arms.items()}
        return SweepRecord(self.sweep.metric, self.sweep.seeds, arms)

    def left(self) -> str:
        """What is still to be done, in words."""
        runs = self.total - self.count
        return how_many([runs], "run") if runs else "scoring"

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


def _is_complete(point: Point) -> bool:
    return RunFolder(point.folder).summary.is_file()


def _seconds_of_summary(point: Point) -> float:
    """Of training, over all its parts; 0 if the run does not say."""
    try:
        return float(RunFolder(point.folder).read_summary()["seconds"])
    except ArtefactError:
        return 0.0


def _until(seconds: float) -> str:
    """How long, and until when if that is worth saying."""
    said = f"{in_words(seconds)} left"
    if seconds < 300:
        return said
    end = datetime.now() + timedelta(seconds=seconds)
    day = "" if end.date() == datetime.now().date() else f"{end:%A} "
    return f"{said}, until {day}{end:%H:%M}"


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
