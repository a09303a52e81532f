"""What `remix route-stats` shows: collects, writes the files asked for, and hands back what to print."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from remix_cli.data.chunks import start_size
from remix_cli.data.rows import EncodedRow
from remix_cli.data.splits import evenly
from remix_cli.diagnostics.health import verdict
from remix_cli.diagnostics.history import read_history
from remix_cli.diagnostics.page import page
from remix_cli.diagnostics.plots import plot_history, plot_use
from remix_cli.diagnostics.route_stats import collect, report, trace_lines
from remix_cli.diagnostics.routing_tables import heat_map, history_table, means_table, routing_legend, routing_table
from remix_cli.errors import RecipeError
from remix_cli.runs import LoadedRun, RunFolder, load_run
from remix_cli.storage import write_json, write_text

PAGE_ROWS = 8  # of which the page shows every token


@dataclass(frozen=True)
class Request:
    """The verb's flags."""

    data: str | None = None
    limit: int | None = None
    compare_with: Path | None = None
    plot: Path | None = None
    trace: Path | None = None
    page: Path | None = None
    best: bool = False
    any_base: bool = False


@dataclass
class Shown:
    """Rich parts in order of importance, the JSON document, and whether the routing is healthy."""

    parts: list[Any]
    document: dict[str, Any]
    healthy: bool = True


def _check_routed(run: Path) -> None:
    """Raises RecipeError for a run whose method has no router."""
    config = RunFolder(run).load_recipe().adapter_config()
    if not config.routed:
        raise RecipeError(f"{run}: trained by {config.method}, which has no router; nothing is routed")


def history(runs: list[Path], plot: Path | None, width: int) -> Shown:
    """Measures over the steps. Raises ArtefactError."""
    found = [read_history(RunFolder(run)) for run in runs]
    parts: list[Any] = [history_table(found, width)]
    if plot is not None:
        parts += [f"written: {path}" for path in plot_history(found, plot)]
    return Shown(parts, {"runs": [asdict(one) for one in found]})


def routing(run: Path, request: Request, progress: Callable[[str, int], Any], width: int) -> Shown:
    """Statistics of one run, or of two on the same rows. Raises DataError, ArtefactError, RecipeError."""
    _check_routed(run)
    if request.compare_with is not None:
        _check_routed(request.compare_with)
    loaded = load_run(run, best=request.best, any_base=request.any_base)
    rows = loaded.rows_to_look_at(request.data, request.limit)
    result, healthy = _measured(loaded, rows, progress)
    parts: list[Any] = [result["verdict"], "", heat_map(result, width), "", routing_table(result)]
    parts += [routing_legend(result), ""]
    reports = [result]
    names = [run.name]
    if request.compare_with is not None:
        other, _ = _measured(_beside(loaded, request), rows, progress)
        reports.append(other)
        names.append(request.compare_with.name)
        parts.append(f"{request.compare_with.name}: {other['verdict']}")
        result = {**result, "compared": other}
    parts.append(means_table(reports, names))
    if request.plot is not None:
        parts += [f"written: {path}" for path in plot_use(result, request.plot)]
    if request.trace is not None:
        lines = (json.dumps(line) for line in trace_lines(loaded, rows))
        write_text(request.trace, "".join(f"{line}\n" for line in lines))
        parts.append(f"written: {request.trace}")
    if request.page is not None:
        logged = read_history(loaded.folder) if loaded.folder.metrics.is_file() else None
        shown = list(trace_lines(loaded, evenly(rows, PAGE_ROWS)))
        write_text(request.page, page(run.name, result, logged, shown))
        parts.append(f"written: {request.page}")
    return Shown(parts, result, healthy)


def _beside(first: LoadedRun, request: Request) -> LoadedRun:
    """The run to compare with. Raises RecipeError if the first one's token ids mean something else to it."""
    assert request.compare_with is not None
    other = load_run(request.compare_with, best=request.best, any_base=request.any_base)
    if other.identity.tokenizer_fingerprint != first.identity.tokenizer_fingerprint:
        raise RecipeError(
            f"--compare: {request.compare_with} has another tokenizer, so the rows are not the same to it; look at "
            "each run apart"
        )
    return other


def _measured(
    loaded: LoadedRun, rows: list[EncodedRow], progress: Callable[[str, int], Any]
) -> tuple[dict[str, Any], bool]:
    size = start_size(loaded.recipe.eval.batch_size, loaded.device)
    blocks = collect(loaded, rows, size, progress("routing", len(rows)).advance)
    healthy, words = verdict(blocks, loaded.adapter.config.active, loaded.recipe.alarm)
    result = {"verdict": words, "healthy": healthy} | report(loaded, rows, blocks)
    write_json(loaded.folder.statistics / f"routing-{loaded.which}.json", result)
    return result, healthy
