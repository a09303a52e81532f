"""What `--help` prints is whole at 80 columns."""

import re

import pytest
import typer

import remix_cli
from remix_cli.cli import app

VERBS = list(typer.main.get_command(app).commands)


@pytest.mark.parametrize("arguments", [[], *([name] for name in VERBS)], ids=" ".join)
def test_help_is_not_cut_at_80_columns(verb, arguments):
    out, _ = verb(*arguments, "--help")
    assert "…" not in out
    assert all(len(line) <= 80 for line in out.splitlines())


def test_the_list_of_verbs_gives_each_a_whole_sentence(verb):
    out, _ = verb("--help")
    listed = re.findall(r"^  ([a-z-]+) +(\S.*)$", out.split("Commands:")[1], flags=re.MULTILINE)
    assert [name for name, _ in listed] == VERBS
    assert all(said.endswith(".") and not said.endswith("...") for _, said in listed), listed


def test_the_version_is_told(verb):
    out, _ = verb("--version")
    assert out == f"remix {remix_cli.__version__}\n"
