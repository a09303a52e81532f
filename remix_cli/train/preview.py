"""`remix validate`: what a run would do, without weights; writes nothing, but keeps many rows (data/cache.py)."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.text import Text

from remix_cli.data.batches import micro_batches, rounded_up
from remix_cli.data.encode import Encoder
from remix_cli.data.rows import Encoded, EncodedRow
from remix_cli.data.splits import TrainingData, load_data
from remix_cli.diagnostics.parameters import ParameterCounts, count_parameters
from remix_cli.diagnostics.routing_tables import parameter_table
from remix_cli.errors import RecipeError
from remix_cli.evaluation.statistics import too_few
from remix_cli.models import load_tokenizer
from remix_cli.recipe import Recipe, Task
from remix_cli.recipe.schema import Model
from remix_cli.recipe.sources import Source
from remix_cli.runs import Subject
from remix_cli.stored_json import Document
from remix_cli.tasks.base import Settings
from remix_cli.tasks.registry import task_class
from remix_cli.train.lines import say
from remix_cli.train.memory import estimate_memory
from remix_cli.train.micro_batch import describe_router, passes_of
from remix_cli.train.prepare import check_output, check_recipe
from remix_cli.train.told_formats import tell_formats

ENOUGH = 3  # held-out rows of a source: with fewer, its own held-out loss is a matter of one row or two


@dataclass
class SourcePreview:
    """What one source of training rows gives."""

    name: str
    format: str
    rows: int
    conversations: int  # read; a row each, but for those that a chat template needs a row for each turn of
    supervised_tokens: int
    longest: int  # tokens
    repeated: int  # rows that say the same as an earlier one
    cut: int  # rows that lost their end
    dropped: int  # rows that lost everything supervised
    held_out: int | None  # conversations cut from it; None where nothing is cut from train
    left_out: int  # rows of weight 0
    row: list[tuple[str, bool]]  # a short one, in stretches that are supervised or not

    def to_dict(self) -> Document:
        values = asdict(self)
        del values["row"]
        return values

    def describe(self) -> str:
        notes = [f"{self.rows:,} rows", f"{self.supervised_tokens:,} supervised tokens", f"longest {self.longest:,}"]
        if self.repeated:
            notes.append(f"{self.repeated:,} said before")
        if self.cut:
            notes.append(f"{self.cut:,} cut")
        if self.dropped:
            notes.append(f"{self.dropped:,} dropped")
        if self.held_out is not None:
            notes.append(f"{self.held_out:,} held out")
        if self.left_out:
            notes.append(f"{self.left_out:,} left out (weight 0)")
        return f"{self.name} ({self.format}): {', '.join(notes)}"

    def remark(self) -> str:
        """What to say of the held-out rows; empty if they are enough for a loss of their own, or none are cut."""
        if self.held_out is None or self.held_out >= ENOUGH:
            return ""
        return (
            f"{self.held_out} of its rows held out, too few to say how it fares by itself: raise "
            "data.validation_fraction, or name rows in data.validation"
        )


@dataclass
class Preview:
    recipe: Recipe
    told: list[str]  # formats that the recipe leaves out and its rows' columns tell, a line each
    sources: list[SourcePreview]
    padding: float  # share of all tokens of an epoch's micro-batches
    train: str
    validation: str
    held_out: int  # rows
    steps: int
    counts: ParameterCounts
    memory: dict[str, float]  # GiB by what it is for
    rows_per_step: int
    passes: int  # forward passes over each row of a step
    output: str  # where the run is written, or why it is not
    targets: tuple[str, ...]  # what the default targets stand for in this model; empty where they are its own

    def to_dict(self) -> Document:
        return {
            "train": self.train,
            "sources": [source.to_dict() for source in self.sources],
            "padding": self.padding,
            "validation": self.validation,
            "held_out_rows": self.held_out,
            "steps": self.steps,
            "rows_per_step": self.rows_per_step,
            "passes": self.passes,
            "output": self.output,
            "targets": list(self.targets),
            "model": self.recipe.model.model_dump(),
            "parameters": self.counts.to_dict(),
            "memory_gib": self.memory,
            "estimator": self.recipe.router.estimator,
        }


def preview(recipe: Recipe, processes: int = 1, *, resume: bool = False, overwrite: bool = False) -> Preview:
    """As `processes` processes would train with these flags. Raises RecipeError and DataError, as training would."""
    adapter = check_recipe(recipe)
    recipe, told = tell_formats(recipe)
    tokenizer = load_tokenizer(recipe.model)
    data = load_data(recipe, tokenizer, processes)
    subject = Subject(recipe, adapter.model, tokenizer, adapter, Encoder.of(tokenizer, recipe.data))
    for task in recipe.eval.tasks:
        if _at_hand(task):
            task_class(task.task)(subject, task, Settings())  # which reads the rows and counts their tokens
    counts = count_parameters(adapter)
    wanted, found = recipe.adapter_config().target_modules, adapter.config.target_modules
    memory = estimate_memory(recipe, adapter.model, counts, int(data.train.lengths.max()), processes)
    cut = not recipe.data.validation and recipe.data.holds_out
    held_out: Sequence[int | None] = data.held_out_of if cut else [None] * len(data.sources)
    sources = zip(recipe.data.train, data.sources, held_out, strict=True)
    return Preview(
        recipe,
        told,
        [_preview_source(source, encoded, held, tokenizer) for source, encoded, held in sources],
        _padding(recipe, data, processes),
        data.train.describe(),
        data.validation.describe(),
        len(data.validation.rows),
        data.total_steps(recipe),
        counts,
        memory,
        data.plan.rows_per_step,
        passes_of(recipe.router, recipe.adapter_config().samples).total,
        _output(recipe, resume, overwrite),
        () if found == wanted or "target_modules" not in recipe.method.settings else found,
    )


def _output(recipe: Recipe, resume: bool, overwrite: bool) -> str:
    try:
        check_output(recipe, resume=resume, overwrite=overwrite)
    except RecipeError as error:
        return f"nothing: {error}"
    how = "going on with the run that it holds" if resume else "in place of the run that it holds" if overwrite else ""
    return f"{recipe.output_dir}{f', {how}' if how else ''}"


def _preview_source(source: Source, encoded: Encoded, held_out: int | None, tokenizer: Any) -> SourcePreview:
    short = min(encoded.rows[:50], key=lambda row: len(row.input_ids))
    return SourcePreview(
        name=source.place,
        format=source.format,
        rows=len(encoded.rows),
        conversations=encoded.read,
        supervised_tokens=int(encoded.target_counts.sum()),
        longest=int(encoded.lengths.max()),
        repeated=encoded.repeated,
        cut=encoded.truncated,
        dropped=encoded.dropped,
        held_out=held_out,
        left_out=encoded.left_out,
        row=_pieces(tokenizer, short),
    )


def _padding(recipe: Recipe, data: TrainingData, processes: int) -> float:
    """The share of the first epoch's tokens that only fill micro-batches up to their longest row."""
    real, padded = 0, 0
    for rows in data.plan.epoch(0):
        for rank in range(processes):
            size, tokens = recipe.train.per_device_train_batch_size, recipe.train.tokens_per_batch
            cuts = micro_batches(rows, data.train.lengths, size, rank, processes, tokens=tokens)
            for _, part, _ in cuts:
                lengths = data.train.lengths[part]
                real += int(lengths.sum())
                padded += len(part) * rounded_up(int(lengths.max()))
    return 1 - real / padded


def _at_hand(task: Task) -> bool:
    """Does it ask for answers, to rows that need not be fetched?"""
    kind = task_class(task.task)
    if not kind.generates:
        return False
    sources = [source for source in (task.source, task.shots_from) if source is not None]
    return all(source.is_local for source in sources) and (task.source is not None or not kind.brings_rows)


def _pieces(tokenizer: Any, row: EncodedRow) -> list[tuple[str, bool]]:
    """Neighbouring tokens of one kind decoded together, so that multi-token characters stay whole."""
    pieces: list[tuple[str, bool]] = []
    start = 0
    for i in range(1, len(row.input_ids) + 1):
        if i == len(row.input_ids) or row.supervised[i] != row.supervised[start]:
            pieces.append((tokenizer.decode(row.input_ids[start:i]), bool(row.supervised[start])))
            start = i
    return pieces


def describe_model(model: Model, counts: ParameterCounts) -> str:
    bits = "" if model.quantization == "none" else f", weights in {model.quantization}"
    return f"model     {model.name_or_path}, {counts.base:,} parameters, {model.dtype}{bits}"


def describe_taken(passes: int) -> str:
    """How often a step runs its rows, where that is not once."""
    return f"; a step takes its rows through the model {passes} times" if passes > 1 else ""


def print_preview(p: Preview, console: Console) -> None:
    """Plain words first; supervised text is marked by brackets as well as by style."""
    for line in p.told:
        say(console, line)
    model, method = p.recipe.model, p.recipe.adapter.method
    say(console, describe_model(model, p.counts))
    if model.about_dtype:
        say(console, f"dtype     {model.about_dtype}")
    say(console, f"method    {method}: {p.recipe.method.summary}")
    if p.targets:
        say(console, f"targets   {', '.join(p.targets)}: what the default means here")
    say(console, f"train     {p.train}")
    say(console, f"held out  {p.validation}")
    few = too_few(p.held_out)
    if few:
        say(console, f"warning   held-out rows: {few}")
    say(console, f"steps     {p.steps} of {p.rows_per_step} rows each{describe_taken(p.passes)}")
    if p.recipe.adapter_config().samples:
        say(console, f"router    {describe_router(p.recipe.router)}")
    say(console, f"padding   {p.padding:.1%} of the tokens of an epoch")
    say(console, f"writes    {p.output}")
    for source in p.sources:
        say(console, f"\n{source.describe()}")
        if source.remark():
            say(console, f"warning   {source.remark()}")
        say(console, "A row as the model sees it; what it learns stands in «»:")
        text = Text()
        for piece, learnt in source.row:
            text.append(f"«{piece}»" if learnt else piece, style="bold" if learnt else "dim")
        console.print(text, soft_wrap=True)  # broken nowhere: every space counts
    print_size(p.counts, p.memory, console)


def print_size(counts: ParameterCounts, memory: dict[str, float], console: Console) -> None:
    """Parameters, and GiB by what they are for."""
    console.print()
    console.print(parameter_table(counts))
    console.print("\nMemory on one device, estimated, GiB:", highlight=False)
    for name, value in [*memory.items(), ("together", sum(memory.values()))]:
        console.print(f"  {name:<34}{value:8.2f}", highlight=False)
