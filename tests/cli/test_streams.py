"""Standard input, output and error that are closed, full, or that nobody reads any more."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
from helpers.common import ROOT
from helpers.tiny import recipe_text, write_recipe
from rich.console import Console

from remix_cli import cli
from remix_cli.errors import Interrupted
from remix_cli.recipe import load_recipe
from remix_cli.train import micro_batch, trainer


def nobody_reads():
    reading, writing = os.pipe()
    os.close(reading)
    return open(writing, "w")


def full():
    return open("/dev/full", "w")


@pytest.fixture
def ended(monkeypatch, capsys):
    """Run `remix ARGUMENTS` with this standard output, or error; (exit code, standard error)."""

    def call(*arguments, stdout=None, stderr=None):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["remix", *map(str, arguments)])
            patch.setattr(sys, "stdout", stdout or sys.stdout)
            patch.setattr(sys, "stderr", stderr or sys.stderr)
            with pytest.raises(SystemExit) as end:
                cli.main()
            for stream in (stdout, stderr):
                if stream:
                    stream.close()  # flushes, as the interpreter does at its end
        return end.value.code, capsys.readouterr().err

    return call


@pytest.mark.parametrize("lost", [nobody_reads, full])
def test_training_goes_on_without_a_console_and_says_where_its_log_is(lost, stage, tmp_path, ended):
    recipe = write_recipe(tmp_path / "r.yaml", recipe_text(*stage[:2], tmp_path / "out"))
    code, err = ended("train", recipe, stdout=lost())
    assert code == 0
    (line,) = [line for line in err.splitlines() if line.startswith("warning: standard output: ")]
    assert line.endswith(f"; training goes on; its log is {tmp_path}/out/metrics.jsonl")
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["steps"] == 4


def test_training_without_any_console_ends_with_its_real_exit_code(stage, tmp_path, ended, monkeypatch):
    recipe = write_recipe(tmp_path / "r.yaml", recipe_text(*stage[:2], tmp_path / "out"))
    assert ended("train", recipe, "train.max_stepz=3", stdout=nobody_reads(), stderr=nobody_reads())[0] == 2
    assert ended("train", recipe, "--json", stdout=nobody_reads(), stderr=nobody_reads())[0] == 0
    assert (tmp_path / "out" / "summary.json").is_file()

    def poisoned(*_, **__):
        raise MemoryError

    monkeypatch.setattr(micro_batch, "accumulate_batch", poisoned)
    assert ended("train", recipe, "--overwrite", stdout=full(), stderr=full())[0] == 2


def test_what_reports_ends_quietly_when_nobody_reads_it(finished, ended):
    for arguments in (("schema",), ("--help",), ("eval", finished, "--task", "nll", "--limit", 2)):
        assert ended(*arguments, stdout=nobody_reads()) == (141, "")


def test_a_report_that_cannot_be_written_is_an_error(ended):
    message = "error: standard output: No space left on device; write it elsewhere\n"
    assert ended("schema", stdout=full()) == (4, message)


def test_standard_error_is_never_a_reason_to_end(finished, ended, capsys):
    assert ended("compare", finished, finished, stderr=full())[0] in (0, 5)
    assert ended("nonsense", stderr=nobody_reads())[0] == 2
    assert ended("schema", stderr=nobody_reads())[0] == 0


@pytest.mark.slow
def test_closed_streams_are_as_dev_null_and_lend_their_numbers_to_no_file(stage, tmp_path):
    """A real process. What the shell closed must not become the number of a file that is opened later."""
    recipe = write_recipe(tmp_path / "r.yaml", recipe_text(*stage[:2], tmp_path / "out"))
    code = (
        "import os, sys; from remix_cli import cli; real = cli.app\n"
        "def app(**given):\n"
        "    for n in (0, 1, 2): assert os.readlink(f'/proc/self/fd/{n}') == '/dev/null', n\n"
        "    assert all(os.get_inheritable(n) for n in (0, 1, 2))\n"
        "    print('lost'); real(**given)\n"
        "cli.app = app; sys.argv = ['remix', *sys.argv[1:]]; cli.main()"
    )
    command = 'exec "$0" -c "$1" validate "$2" <&- >&- 2>&-'
    done = subprocess.run(["sh", "-c", command, sys.executable, code, recipe], timeout=60, cwd=ROOT, check=False)
    assert done.returncode == 0


@pytest.mark.parametrize("stdin", [None, io.StringIO(""), io.TextIOWrapper(io.BytesIO(b"w1\xff\n"), "utf-8")])
def test_generate_without_a_prompt_is_refused(stdin, finished, verb, monkeypatch):
    monkeypatch.setattr(sys, "stdin", stdin)
    _, err = verb("generate", finished, "--max-new-tokens", 1, expect=2)
    assert err.startswith("error: standard input: ")


def test_a_terminal_that_closes_is_a_signal_to_save_and_end(stage, tmp_path, monkeypatch):
    recipe = load_recipe(write_recipe(tmp_path / "r.yaml", recipe_text(*stage[:2], tmp_path / "out")))
    step = trainer.Trainer._step

    def hanging_up(self, n):
        asked = step(self, n)
        os.kill(os.getpid(), signal.SIGHUP)
        return asked

    before = signal.signal(signal.SIGHUP, lambda *_: None)  # should the run not heed it
    try:
        monkeypatch.setattr(trainer.Trainer, "_step", hanging_up)
        with pytest.raises(Interrupted) as ended:
            trainer.train(recipe, Console(quiet=True))
        assert ended.value.exit_code == 129
        assert (tmp_path / "out" / "checkpoints" / "step-000002").is_dir()
        shutil.rmtree(tmp_path / "out")
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup: it is to go on
        trainer.train(recipe, Console(quiet=True))
    finally:
        signal.signal(signal.SIGHUP, before)
