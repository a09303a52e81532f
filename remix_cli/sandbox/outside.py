"""The parent's side: start a program's solver and judge, wait for the verdict, leave nothing behind."""

import functools
import json
import os
import secrets
import selectors
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from remix_cli.errors import SandboxError
from remix_cli.sandbox.crossing import ENDED

INSIDE = Path(__file__).with_name("inside.py")
CPU_SECONDS = 5
WALL_SECONDS = 15.0
OUTPUT_LIMIT = 64 * 1024
# For the reports.
LEVEL: dict[str, Any] = {
    "by": "fresh processes under rlimits, Landlock and seccomp",
    "cpu_seconds": CPU_SECONDS,
    "wall_seconds": WALL_SECONDS,
}


@dataclass(frozen=True)
class Program:
    """A program to judge. `test` defines `check(candidate)`; `prompt` what `test` may use besides."""

    program: str
    entry_point: str
    prompt: str
    test: str


@dataclass(frozen=True)
class Verdict:
    passed: bool
    reason: str  # empty if passed; `timeout`; or why it failed
    output: str  # what the program printed, cut at 64 KiB


def check_available() -> None:
    """Confine one process and see. Raises SandboxError where the kernel cannot."""
    _ask("probe", _limits(CPU_SECONDS))


def _limits(cpu_seconds: int) -> dict[str, Any]:
    return {"cpu_seconds": cpu_seconds, "parent": os.getpid(), "readable": _readable_paths(*_command())}


@functools.cache
def _readable_paths(*command: str) -> list[str]:
    """What the confined processes of this interpreter may read, found once in a process of its own."""
    return json.loads(_ask("readable", {}))


def _ask(role: str, payload: dict[str, Any]) -> str:
    """The last line that a process in this role prints. Raises SandboxError where it fails."""
    try:
        done = subprocess.run(
            [*_command(), role], input=json.dumps(payload).encode(), env={}, cwd="/", capture_output=True, timeout=60
        )
    except subprocess.TimeoutExpired:
        raise SandboxError("generated code is not run on this machine: the confined process hangs") from None
    said = done.stdout.decode(errors="replace").strip().splitlines()
    if done.returncode or not said:
        why = done.stderr.decode(errors="replace").strip().splitlines()
        raise SandboxError(
            f"generated code is not run on this machine: {why[-1] if why else 'the confined process died'}; "
            "run this task on Linux 5.13 or newer with Landlock and seccomp, or leave it out"
        )
    return said[-1]


def judge_all(programs: list[Program], workers: int | None = None) -> Iterator[tuple[int, Verdict]]:
    """(index, verdict) of every program as it comes, several at a time."""
    pool = ThreadPoolExecutor(workers or os.cpu_count() or 1)
    try:
        waiting = {pool.submit(judge, program): i for i, program in enumerate(programs)}
        for done in as_completed(waiting):
            yield waiting[done], done.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def judge(program: Program, cpu_seconds: int = CPU_SECONDS, wall_seconds: float = WALL_SECONDS) -> Verdict:
    """Run one program against its test in two confined processes, each with so much processor time."""
    nonce = secrets.token_hex(16)
    common = _limits(cpu_seconds) | {"entry_point": program.entry_point}
    solution = common | {"program": program.program}
    test = common | {"prompt": program.prompt, "test": program.test, "nonce": nonce}
    (calls_out, calls_in), (answers_out, answers_in), (verdict_out, verdict_in) = (os.pipe() for _ in range(3))
    processes: list[subprocess.Popen] = []
    try:
        try:
            processes.append(_start("solver", (calls_out, answers_in), solution, subprocess.PIPE))
            processes.append(_start("judge", (calls_in, answers_out, verdict_in), test, subprocess.DEVNULL))
        finally:  # the children have their own; a pipe whose writer died must end
            for descriptor in (calls_out, calls_in, answers_out, answers_in, verdict_in):
                os.close(descriptor)
        said, output = _wait(verdict_out, processes[0], time.monotonic() + wall_seconds)
    finally:
        # The kernel's limit counts ticks, which on a busy machine run well ahead of the time that it reports.
        used = [_kill(process) >= 0.5 * cpu_seconds for process in processes]
        os.close(verdict_out)
    shown = output.decode("utf-8", errors="replace")
    if said is None:
        return Verdict(False, "timeout", shown)
    try:
        found = json.loads(said)
        if found["nonce"] != nonce:
            raise ValueError
    except (ValueError, KeyError, TypeError):
        return Verdict(False, "timeout" if any(used) else "the test's process died", shown)
    if found["passed"] is True:
        return Verdict(True, "", shown)
    if found["reason"] == ENDED and any(used):
        return Verdict(False, "timeout", shown)
    return Verdict(False, _printable(str(found["reason"])) or "failed", shown)


def _printable(text: str) -> str:
    """Without lone surrogates, which a program's error may hold and no file can."""
    return text.encode("utf-8", "replace").decode()


def _command() -> list[str]:
    return [sys.executable, "-I", "-S", "-B", str(INSIDE)]


def _start(role: str, descriptors: tuple[int, ...], payload: dict[str, Any], output: int) -> subprocess.Popen:
    """A fresh process in a session of its own, with an empty environment and the payload as its input."""
    memory = os.memfd_create("payload")
    try:
        with os.fdopen(os.dup(memory), "wb") as file:
            file.write(json.dumps(payload).encode())
        os.lseek(memory, 0, os.SEEK_SET)
        return subprocess.Popen(
            [*_command(), role, *map(str, descriptors)],
            stdin=memory,
            stdout=output,
            stderr=subprocess.STDOUT if output == subprocess.PIPE else output,
            env={},
            cwd="/",
            pass_fds=descriptors,
            start_new_session=True,
        )
    finally:
        os.close(memory)


def _wait(verdict: int, solver: subprocess.Popen, deadline: float) -> tuple[bytes | None, bytes]:
    """(what the judge said, None if it was silent to the end; what the solver printed)."""
    assert solver.stdout is not None
    said, printed = bytearray(), bytearray()
    with selectors.DefaultSelector() as selector:
        selector.register(verdict, selectors.EVENT_READ)
        selector.register(solver.stdout.fileno(), selectors.EVENT_READ)
        while (left := deadline - time.monotonic()) > 0:
            for key, _ in selector.select(left):
                data = os.read(key.fd, 65536)
                into = said if key.fd == verdict else printed
                into.extend(data[: OUTPUT_LIMIT - len(into)])
                if not data:
                    selector.unregister(key.fd)
                    if key.fd == verdict:
                        _drain(solver.stdout.fileno(), printed)
                        return bytes(said), bytes(printed)
    return None, bytes(printed)


def _drain(descriptor: int, printed: bytearray) -> None:
    """Read what already lies in the pipe: the verdict may have been seen first."""
    os.set_blocking(descriptor, False)
    with suppress(BlockingIOError):
        while len(printed) < OUTPUT_LIMIT:
            data = os.read(descriptor, 65536)
            if not data:
                return
            printed.extend(data[: OUTPUT_LIMIT - len(printed)])


def _kill(process: subprocess.Popen) -> float:
    """End a process; the seconds of processor time that it had used."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, 9)
    _, _, usage = _reap(process)
    if process.stdout:
        process.stdout.close()
    return usage.ru_utime + usage.ru_stime


def _reap(process: subprocess.Popen) -> Any:
    found = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(found[1])
    return found
