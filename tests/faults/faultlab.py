"""Kill or starve training runs on purpose, many times, from one warmed process that forks.

    faultlab.py kills 2000          SIGKILL at random instants, half of them while something is written
    faultlab.py points [EVERY]      SIGKILL at every EVERY-th file-changing call after the first save
    faultlab.py errors [EVERY]      the disk refuses at that call instead (no space, I/O error)
    faultlab.py signals 100         SIGTERM or Ctrl-C at random instants

Each run is resumed until it is done; its adapter, optimizer state and metrics must then equal, bit for bit, those of
a run that nothing happened to. Prints one JSON document. A process of its own, because torch cannot be
differentiated in a fork of a process that has used it.
"""

import errno
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))
WRITES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir"}  # Python's audit events
ERRORS = (errno.ENOSPC, errno.EIO, errno.EDQUOT)


class Lab:
    """A tiny recipe (dropout, M = 2, accumulation, several epochs) and everything a run loads, loaded once."""

    def __init__(self, folder: Path):
        import torch
        from helpers import runs
        from helpers.tiny import write_rows, write_tiny_model

        from remix_cli.train import setup

        torch.set_num_threads(1)
        self.tools, self.folder = runs, folder
        self.stage = (write_tiny_model(folder / "model"), write_rows(folder / "rows.jsonl", 24), folder)
        recipe = self.recipe(folder / "warm")
        tokenizer = setup.load_tokenizer(recipe.model)
        data = setup.load_data(recipe, tokenizer, 1)
        model = setup.load_model(recipe.model, torch.device("cpu"))
        setup.load_tokenizer, setup.load_data = lambda *_: tokenizer, lambda *_: data
        setup.load_model = lambda *_: model
        begun = time.monotonic()
        self.wait(self.start(folder / "whole"))
        self.seconds = time.monotonic() - begun
        self.expected = self.tools.outcome(folder / "whole")

    def recipe(self, output: Path):
        train = {**self.tools.TRAIN, "save_total_limit": 1}
        return self.tools.recipe_for(self.stage, output, train=train)

    def start(self, output: Path, before: Callable[[], None] = lambda: None) -> int:
        """Fork a child that begins or resumes the run; `before` runs in the child first."""
        child = os.fork()
        if child:
            return child
        code = 1
        try:
            recipe = self.recipe(output)
            before()
            self.tools.run(recipe, resume=(output / "recipe.yaml").exists())
            code = 0
        except BaseException as error:
            code = 130 if isinstance(error, KeyboardInterrupt) else getattr(error, "exit_code", 1)
            if code == 1:
                print(f"{type(error).__name__}: {error}", file=sys.stderr)
        finally:
            os._exit(code)

    @staticmethod
    def wait(child: int) -> int:
        """The exit code, or minus the signal's number."""
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def valid(self, output: Path) -> bool:
        """Is there a checkpoint that verifies?"""
        from remix_cli.train.checkpoints import list_checkpoints, verify

        return any(verify(c) is None for c in list_checkpoints(output / "checkpoints"))

    def same(self, output: Path) -> bool:
        return self.tools.outcome(output) == self.expected


def scratch_in(output: Path) -> list[str]:
    return [p.name for place in (output, output / "checkpoints") for p in place.glob(".tmp-*")]


def random_kills(lab: Lab, kills: int, seed: int) -> dict:
    """SIGKILL until `kills` have hit; every run that survives to its end is compared."""
    draw = random.Random(seed)
    report = {"kills": 0, "finished": 0, "mismatches": 0, "lost": 0, "errors": 0, "while_writing": 0}
    output, had_one = lab.folder / "run", False
    while report["kills"] < kills or (output / "recipe.yaml").exists():
        child, begun = lab.start(output), time.monotonic()
        hit = report["kills"] < kills
        delay = draw.uniform(0, 1.1 * lab.seconds) if hit else 60.0
        patience = draw.uniform(0, 0.004) if hit and draw.random() < 0.5 else None
        while os.waitpid(child, os.WNOHANG) == (0, 0):
            writing = patience is not None and bool(scratch_in(output))
            if writing:
                time.sleep(patience)
            if writing or time.monotonic() - begun > delay:
                os.kill(child, signal.SIGKILL)
                code = lab.wait(child)
                report["kills"] += code == -signal.SIGKILL
                report["while_writing"] += writing and code == -signal.SIGKILL
                break
            time.sleep(0.0005)
        valid = lab.valid(output)
        report["lost"] += had_one and not valid
        had_one = valid
        if (output / "summary.json").exists():
            report["finished"] += 1
            report["mismatches"] += not lab.same(output)
            shutil.rmtree(output)
            had_one = False
        elif not hit:
            report["errors"] += 1
            break
    return report


def random_signals(lab: Lab, count: int, seed: int) -> dict:
    """A polite request to stop at a random instant, then the resumed run to its end."""
    draw = random.Random(seed)
    report = {"signals": 0, "saved": 0, "mismatches": 0, "lost": 0, "wrong_exit": 0}
    for i in range(count):
        output, number = lab.folder / f"signal{i}", (signal.SIGTERM, signal.SIGINT)[i % 2]
        child = lab.start(output)
        time.sleep(draw.uniform(0, lab.seconds))
        os.kill(child, number)
        code = lab.wait(child)
        report["signals"] += 1
        report["saved"] += code == 128 + number and lab.valid(output)
        # 0: it was done; minus the signal: it had not begun and Python's own handling held
        report["wrong_exit"] += code not in (0, 128 + number, -number)
        report["lost"] += code == 128 + number and (output / "checkpoints").exists() and not lab.valid(output)
        if code:
            report["wrong_exit"] += lab.wait(lab.start(output)) != 0
        report["mismatches"] += not lab.same(output)
        shutil.rmtree(output)
    return report


def at_call(number: int, output: Path, act: Callable[[], None]) -> Callable[[], None]:
    """For a child: call `act` in front of the `number`-th file-changing call after the first checkpoint."""

    def install() -> None:
        seen, begun = 0, False
        sync = os.fsync

        def count(place: str) -> None:
            nonlocal seen, begun
            begun = begun or (output / "checkpoints" / "step-000002").exists()
            if str(output) in place and begun:
                seen += 1
                if seen == number:
                    act()

        def audit(event: str, arguments: tuple) -> None:
            changes = event in WRITES or (event == "open" and isinstance(arguments[2], int) and arguments[2] & 0o3)
            if changes:
                count(str(arguments[0]))

        def fsync(descriptor: int) -> None:
            count(os.readlink(f"/proc/self/fd/{descriptor}"))
            sync(descriptor)

        sys.addaudithook(audit)
        os.fsync = fsync

    return install


def every_point(lab: Lab, every: int, kill: bool) -> dict:
    """Stop at call 1, 1 + every, ... of an evaluation with a new best, a save and the pruning after it."""
    report = {"points": 0, "mismatches": 0, "lost": 0, "wrong_exit": 0, "harmless": 0, "scratch_left": 0}
    number, fired = 1, lab.folder / "fired"
    while True:
        output = lab.folder / f"point{number}"

        def act(number: int = number) -> None:
            fired.touch()
            if kill:
                os.kill(os.getpid(), signal.SIGKILL)
            code = ERRORS[number % len(ERRORS)]
            raise OSError(code, os.strerror(code))

        code = lab.wait(lab.start(output, at_call(number, output, act)))
        if not fired.exists():  # the run ended before its `number`-th call
            return report
        fired.unlink()
        report["points"] += 1
        report["lost"] += not lab.valid(output)
        report["harmless"] += code == 0  # an error while scratch was being removed
        report["wrong_exit"] += code != -signal.SIGKILL if kill else code not in (0, 4)
        report["wrong_exit"] += lab.wait(lab.start(output)) != 0
        report["mismatches"] += not lab.same(output)
        report["scratch_left"] += bool(scratch_in(output))
        shutil.rmtree(output)
        number += every


def main() -> None:
    mode, count = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 1
    seed = int(sys.argv[3]) if len(sys.argv) > 3 else 0
    with tempfile.TemporaryDirectory() as folder:
        begun = time.monotonic()
        lab = Lab(Path(folder))
        if mode == "kills":
            report = random_kills(lab, count, seed)
        elif mode == "signals":
            report = random_signals(lab, count, seed)
        else:
            report = every_point(lab, count, kill=mode == "points")
        print(json.dumps(report | {"seconds": round(time.monotonic() - begun, 1)}))


if __name__ == "__main__":
    main()
