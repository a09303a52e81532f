"""Shared by all tests: tiny models built in code, one place for tolerances, no network."""

import fcntl
import os
import socket
import struct
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["REMIX_CACHE"] = "off"  # nothing of a test stays in the user's own
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# models this small gain nothing from threads, which spin while another process has the core
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():  # before anything imports triton, whose own functions are defined then
    os.environ.setdefault("TRITON_INTERPRET", "1")

from pathlib import Path

import pytest
from helpers.common import DEMO_MODEL
from helpers.tiny import recipe_text, write_recipe, write_rows, write_tiny_model


def pytest_configure() -> None:
    """Two-process tests talk over the loopback device, which `unshare -n` leaves down."""
    get_flags, set_flags, up = 0x8913, 0x8914, 1
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        name = struct.pack("16sH14x", b"lo", 0)
        (flags,) = struct.unpack_from("H", fcntl.ioctl(any_socket, get_flags, name), 16)
        if not flags & up:
            fcntl.ioctl(any_socket, set_flags, struct.pack("16sH14x", b"lo", flags | up))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def demo_model() -> Path:
    if not (DEMO_MODEL / "config.json").exists():
        pytest.fail("the demo model is missing: run `make model`")
    return DEMO_MODEL


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    """L4: nothing in this process opens a connection (`unshare -n make test` shows it for all processes), but to a
    server that the test itself has started."""
    connect = socket.socket.connect

    def refuse(self, address):
        if address[0] != "127.0.0.1":
            raise AssertionError(f"a test tried to connect to {address}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="session")
def stage(tmp_path_factory):
    """(model folder, rows, folder) of a tiny model with a tokenizer, and 40 rows for it."""
    folder = tmp_path_factory.mktemp("stage")
    return write_tiny_model(folder / "model"), write_rows(folder / "rows.jsonl", 40), folder


@pytest.fixture
def verb(capsys, monkeypatch):
    """Run `remix ARGUMENTS` in this process; (stdout, stderr) after checking the exit code and what every
    failure owes its reader: one `error:` line for each problem, no traceback."""

    def call(*arguments, expect=0):
        from remix_cli import cli

        monkeypatch.setattr(sys, "argv", ["remix", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "80")
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        assert ended.value.code == expect, f"exit {ended.value.code}\n{out}\n{err}"
        assert "Traceback" not in err
        if expect not in (0, 1):
            assert all(line.startswith("error: ") for line in err.splitlines()), err
        return out, err

    return call


@pytest.fixture(scope="session")
def finished(stage):
    """A finished run, made once."""
    from rich.console import Console

    from remix_cli.recipe import load_recipe
    from remix_cli.train.trainer import train

    model, rows, folder = stage
    evaluation = {"tasks": [{"task": "nll"}, {"task": "gsm8k", "max_new_tokens": 6}]}
    recipe = recipe_text(model, rows, folder / "run", eval=evaluation)
    train(load_recipe(write_recipe(folder / "recipe.yaml", recipe)), Console(quiet=True))
    return folder / "run"
