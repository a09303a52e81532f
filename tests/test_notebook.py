"""examples/first_run.ipynb runs from its first cell to its last, and a notebook shows what a terminal does."""

import io
import json
import os
import shutil

import pytest
from helpers.common import ROOT
from rich.progress import Progress

from remix_cli.cli.common import Bars
from remix_cli.terminal import Console
from remix_cli.train.console import TrainingConsole

NOTEBOOK = ROOT / "examples" / "first_run.ipynb"


def test_it_holds_no_outputs_of_another_day():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    assert not [cell for cell in cells if cell.get("outputs") or cell.get("execution_count")]


@pytest.mark.parametrize(("where", "live"), [({"force_jupyter": True}, True), ({"file": io.StringIO()}, False)])
def test_a_notebook_has_a_bar_and_a_file_has_none(where, live):
    shown = TrainingConsole(Console(**where), total=3, start=0, main=True, shown=[])
    assert isinstance(shown.live, Progress) is live


def test_the_other_bars_are_shown_in_a_notebook_too(monkeypatch):
    assert not Bars().shown
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    assert Bars().shown


@pytest.mark.slow
def test_every_cell_runs_and_its_tables_bars_and_pictures_are_rendered(tmp_path, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipywidgets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    (tmp_path / "examples").mkdir()
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    shutil.copy(NOTEBOOK, tmp_path / "examples")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    where = {"metadata": {"path": str(tmp_path / "examples")}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=where).execute()

    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    data = [output.data for output in outputs if "data" in output]
    tables = "".join(found["text/html"] for found in data if "text/html" in found)
    for title in ("Parameters", "Routing of 2,250 tokens", "Routing over 100 steps", "The base model", "Scores, and"):
        assert title in tables, title
    assert sum("image/svg+xml" in found for found in data) == 2
    widgets = json.dumps(notebook.metadata.widgets)
    assert "100/100" in widgets
    made = tmp_path / "examples" / "first_run"
    losses = [json.loads((made / "routed" / "eval" / f"{who}.json").read_text()) for who in ("base", "adapter")]
    base, routed = (report["results"][0]["scores"]["loss"] for report in losses)
    assert routed < base - 1
    log = [json.loads(line) for line in (made / "routed" / "metrics.jsonl").read_text().splitlines()]
    decided = [record["router_entropy"] for record in log if "router_entropy" in record]
    assert decided[-1] < decided[0] - 0.5  # there is something to see in the router's pictures
