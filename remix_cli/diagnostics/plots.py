"""Figures of routing, PNG and SVG. Needs the extra `plots` (matplotlib)."""

from pathlib import Path
from typing import Any

import numpy as np

from remix_cli.diagnostics.health import short_name
from remix_cli.diagnostics.history import History
from remix_cli.errors import RecipeError
from remix_cli.storage import storage_errors

# Okabe and Ito's colours, told apart by colour-blind people; lines differ in dash, too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ("-", "--", "-.", ":")


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise RecipeError("--plot needs matplotlib; pip install 'remix-cli[plots]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as pyplot

    return pyplot


def plot_history(histories: list[History], folder: Path) -> list[Path]:
    """ESS of the weights (mean and worst token) and entropy of q over the steps, one line per run."""
    plt = _pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
    panels = ("ess_weights", "ess_weights_worst", "router_entropy")
    titles = ("ESS of the weights, mean over tokens", "ESS of the weights, worst token", "entropy of q, nats")
    for axis, key, title in zip(axes, panels, titles, strict=True):
        for i, history in enumerate(histories):
            style = {"color": COLOURS[i % 6], "linestyle": DASHES[i % 4]}
            axis.plot(history.steps, history.values[key], label=history.run, **style)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step")
        axis.set_ylim(bottom=0)
    axes[0].legend(fontsize=8)
    return _save(plt, figure, folder / "history")


def plot_use(report: dict[str, Any], folder: Path) -> list[Path]:
    """Share of tokens that each LoRA serves, block by block."""
    plt = _pyplot()
    figure = plt.figure(layout="constrained")
    _draw_use(figure, [block["name"] for block in report["blocks"]], [block["share"] for block in report["blocks"]])
    return _save(plt, figure, folder / "use")


def picture_of_use(routers: list[str], shares: list[list[float]]) -> np.ndarray:
    """The same as pixels, (H, W, 3) uint8, of shares (L routers, n LoRAs)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    canvas = FigureCanvasAgg(figure)
    _draw_use(figure, routers, shares)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _draw_use(figure: Any, routers: list[str], shares: list[list[float]]) -> None:
    figure.set_size_inches(1.6 + 0.45 * len(shares[0]), 1.2 + 0.2 * len(shares))
    axis = figure.subplots()
    image = axis.imshow(shares, aspect="auto", cmap="cividis", vmin=0, vmax=1)
    axis.set_yticks(range(len(shares)), [short_name(name) for name in routers], fontsize=7)
    axis.set_xticks(range(len(shares[0])))
    axis.set_xlabel("LoRA")
    figure.colorbar(image, label="share of tokens")


def plot_rates(
    rates: list[float], changes: list[float], smoothed: list[float], suggested: float | None, folder: Path
) -> list[Path]:
    """A range test: the change of the loss against the learning rate, step by step and smoothed."""
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(6, 3.4), layout="constrained")
    axis.plot(rates, changes, ".", color=COLOURS[5], markersize=3, label="step")
    axis.plot(rates, smoothed, color=COLOURS[0], label="smoothed")
    if suggested is not None:
        axis.axvline(suggested, color=COLOURS[1], linestyle="--", label=f"suggested: {suggested:g}")
    axis.set_xscale("log")
    axis.set_xlabel("learning rate")
    axis.set_ylabel("change of the loss, nats a token")
    axis.legend(fontsize=8)
    return _save(plt, figure, folder / "rates")


def _save(plt: Any, figure: Any, stem: Path) -> list[Path]:
    paths = [stem.with_suffix(suffix) for suffix in (".png", ".svg")]
    for path in paths:
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)
    return paths
