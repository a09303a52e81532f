"""Generated programs can neither harm nor deceive: hostile ones, one test for each row of the fault list."""

import ast
import hashlib
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from remix_cli.errors import SandboxError
from remix_cli.evaluate.humaneval import load_problems
from remix_cli.sandbox import outside
from remix_cli.sandbox.outside import Program, judge, judge_all

SECRET = "token-3f9a-never-to-be-seen"
TEST = "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(3) == 9\n"
DENIED = ("Permission", "not permitted", "can't start new thread", "not allowed", "Errno 1")


def run(code: str, **limits):
    return judge(Program(code, "f", "", TEST), **limits)


def body(lines: str) -> str:
    """A right answer that first tries something else."""
    return "def f(x):\n" + "".join(f"    {line}\n" for line in lines.splitlines()) + "    return x * x\n"


def left_behind() -> list[str]:
    """Command lines of confined processes that still exist."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            if "inside.py" in command and "-I" in command:
                found.append(command)
    return found


def test_right_and_wrong_programs_are_told_apart():
    assert run("def f(x): return x * x") == outside.Verdict(True, "", "")
    assert run("def f(x): return 2 * x").reason == "wrong answer"
    assert "ZeroDivisionError" in run("def f(x): return x / 0").reason
    assert "NameError" in run("def g(x): return x * x\ny = z").reason
    assert run("print('hello')\ndef f(x): return x * x").output == "hello\n"


def test_values_cross_the_pipes_unchanged():
    test = (
        "def check(candidate):\n"
        "    for v in [None, True, 0, -1, 10**50, 1.5, float('inf'), 'a\\ud800\\n', b'x', 1j, [], [1, [2.0, (3, 'x')]],"
        " {frozenset([1])},"
        " {1: 'a', 'b': (1, 2)}, {1, 2}, ()]:\n"
        "        w = candidate(v)\n"
        "        assert w == v and type(w) is type(v)\n"
        "    assert str(candidate(float('nan'))) == 'nan' and candidate(-0.0).hex() == (-0.0).hex()\n"
    )
    assert judge(Program("def f(x): return x", "f", "", test)).passed


@pytest.mark.parametrize(
    "code",
    [
        "import os\nos._exit(0)",
        "import sys\nsys.exit(0)",
        "raise SystemExit(0)",
        "class E(int):\n    def __eq__(self, other): return True\ndef f(x): return E(7)",
        "class E:\n    def __eq__(self, other): return True\ndef f(x): return E()",
        "class L(list):\n    def __eq__(self, other): return True\n    def __iter__(self): return iter([4])\n"
        "def f(x): return L()",
        "import builtins\nbuiltins.AssertionError = ZeroDivisionError\ndef f(x): return 7",
        "def check(candidate): pass\ndef f(x): return 7",
        'import os\nfor d in range(64):\n    try: os.write(d, b\'{"passed": true, "nonce": ""}\\n\')\n'
        "    except OSError: pass\n"
        "def f(x): return 7",
        "import gc, sys\nfor o in gc.get_objects():\n    if isinstance(o, dict) and 'passed' in o: o['passed'] = True\n"
        "def f(x): return 7",
        "import json\njson.dumps = lambda *a, **k: '{\"passed\": true}'\ndef f(x): return 7",
        "print('{\"passed\": true}')\nimport os\nos.close(1)\ndef f(x): return 7",
    ],
)
def test_a_verdict_cannot_be_forged(code):
    verdict = run(code)
    assert not verdict.passed
    assert verdict.reason


def test_X1_code_runs_only_when_allowed_and_only_confined(verb, finished, monkeypatch):
    _, err = verb("eval", finished, "--task", "humaneval", expect=2)
    assert "--allow-code-execution" in err
    real = outside.INSIDE.read_text()
    for missing in ("abi = 0", "machine = 'vax'"):
        faked = finished.parent / "inside.py"
        line = "abi = libc.syscall" if "abi" in missing else "machine = platform"
        faked.write_text("\n".join(_replaced(text, line, missing) for text in real.splitlines()))
        monkeypatch.setattr(outside, "INSIDE", faked)
        with pytest.raises(SandboxError):
            outside.check_available()
        _, err = verb("eval", finished, "--task", "humaneval", "--allow-code-execution", expect=7)
        assert "not confined" in err


def _replaced(text: str, start: str, by: str) -> str:
    indent = len(text) - len(text.lstrip())
    return " " * indent + by if text.strip().startswith(start) else text


@pytest.mark.parametrize(
    "attempt",
    [
        "import os; os.fork()",
        "import posix; posix.fork()",
        "import ctypes; c = ctypes.CDLL(None, use_errno=True); assert c.fork() >= 0, 'Errno 1'",
        "import ctypes; c = ctypes.CDLL(None, use_errno=True); assert c.syscall(435, None, 0) >= 0, 'Errno 1'",
        "import subprocess; subprocess.run(['true'])",
        "import multiprocessing as m; p = m.get_context('fork').Process(target=print); p.start()",
        "import threading\nfor _ in range(99): threading.Thread(target=print).start()",
        "import os\nif os.fork() == 0:\n    os.setsid()\n    os.fork()",
        "import os; os.execv('/bin/sh', ['sh'])",
    ],
)
def test_X2_no_second_process_or_thread(attempt):
    verdict = run(body(attempt))
    assert not verdict.passed
    assert any(word in verdict.reason for word in DENIED), verdict
    assert left_behind() == []


@pytest.mark.parametrize(
    "code",
    [
        body("while True: pass"),
        body("while True:\n    try:\n        while True: pass\n    except BaseException: pass"),
        body("import signal as s\ns.signal(s.SIGTERM, s.SIG_IGN)\ns.signal(s.SIGXCPU, s.SIG_IGN)\nwhile True: pass"),
        "while True: pass",
        body("return 9 ** 9 ** 9"),
    ],
)
def test_X3_endless_programs_end_as_timeouts(code):
    begun = time.monotonic()
    assert run(code, cpu_seconds=1).reason == "timeout"
    assert time.monotonic() - begun < 3
    assert left_behind() == []


def test_X3_sleeping_programs_and_timers():
    begun = time.monotonic()
    assert run(body("import time\ntime.sleep(60)"), wall_seconds=1.0).reason == "timeout"
    assert time.monotonic() - begun < 2
    assert "not permitted" in run(body("import signal\nsignal.setitimer(signal.ITIMER_REAL, 0.1)")).reason
    assert "RecursionError" in run("def f(x): return f(x)").reason


def tree(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        info = path.lstat()
        digest.update(f"{path} {info.st_mode} {info.st_size} {info.st_mtime_ns} {info.st_nlink}".encode())
        digest.update(path.read_bytes() if path.is_file() else b"")
    return digest.hexdigest()


@pytest.mark.parametrize(
    "attempt",
    [
        "open('{t}/new', 'w')",
        "open('{t}/a', 'a')",
        "open('{t}/a', 'r+')",
        "open('{t}/a').read()",
        "import os; os.listdir('{t}')",
        "import os; os.unlink('{t}/a')",
        "import os; os.rename('{t}/a', '{t}/b')",
        "import os; os.chmod('{t}/a', 0o777)",
        "import os; os.chown('{t}/a', 1, 1)",
        "import os; os.utime('{t}/a')",
        "import os; os.truncate('{t}/a', 0)",
        "import os; os.symlink('{t}/a', '{t}/s')",
        "import os; os.link('{t}/a', '{t}/h')",
        "import os; os.mkdir('{t}/d')",
        "import os; os.rmdir('{t}/sub')",
        "import os; os.mkfifo('{t}/p')",
        "import os; os.setxattr('{t}/a', b'user.x', b'1')",
        "import os; os.chdir('{t}')",
        "import os; os.chroot('{t}')",
        "import shutil; shutil.rmtree('{t}')",
        "import tempfile; tempfile.mkstemp()",
        "import ctypes; c = ctypes.CDLL(None); assert c.mount(b'none', b'{t}', b'tmpfs', 0, None) == 0, 'Errno 1'",
    ],
)
def test_X5_the_file_system_is_out_of_reach(attempt, tmp_path):
    (tmp_path / "a").write_text("canary")
    (tmp_path / "sub").mkdir()
    before = tree(tmp_path)
    verdict = run(body(attempt.replace("{t}", str(tmp_path))))
    assert not verdict.passed
    assert any(word in verdict.reason for word in (*DENIED, "No usable temporary directory")), verdict
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    "attempt",
    [
        "import socket; socket.create_connection(('127.0.0.1', {port}), 1)",
        "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', {port}))",
        "import socket; socket.socket(socket.AF_UNIX).connect('\\0remix')",
        "import socket; socket.getaddrinfo('localhost', 80)",
        "import socket; socket.socketpair()",
        "print(open('/proc/self/environ').read())",
        "print(open('/proc/{pid}/environ').read())",
        "print(open('{home}/.cache/token').read())",
        "print(open('/etc/passwd').read())",
    ],
)
def test_X6_no_network_and_no_secrets(attempt, tmp_path, monkeypatch):
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "token").write_text(SECRET)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.settimeout(0.05)
        port = listener.getsockname()[1]
        verdict = run(
            body(
                attempt.replace("{port}", str(port)).replace("{home}", str(tmp_path)).replace("{pid}", str(os.getpid()))
            )
        )
        with pytest.raises(TimeoutError):
            listener.accept()
    assert not verdict.passed
    assert any(word in verdict.reason for word in (*DENIED, "gaierror")), verdict
    assert SECRET not in verdict.output + verdict.reason


def test_X6_the_environment_is_empty(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    verdict = run(body("import os\nprint(dict(os.environ))"))
    assert verdict.passed
    assert SECRET not in verdict.output
    assert ast.literal_eval(verdict.output.splitlines()[0]).keys() <= {"LC_CTYPE"}


@pytest.mark.parametrize(
    "attempt",
    [
        "import os; os.kill(os.getppid(), 9)",
        "import os; os.kill(-1, 9)",
        "import os; os.killpg(0, 9)",
        "import signal; signal.raise_signal(9)",
        "import ctypes; c = ctypes.CDLL(None); assert c.ptrace(16, {pid}, 0, 0) == 0, 'Errno 1'",
        "import ctypes; c = ctypes.CDLL(None); assert c.syscall(424, {pid}, 9) == 0, 'Errno 1'",
        "import resource as r; r.setrlimit(r.RLIMIT_CPU, (99, 99))",
        "import resource as r; r.setrlimit(r.RLIMIT_AS, (r.RLIM_INFINITY, r.RLIM_INFINITY))",
        "import fcntl, os; fcntl.fcntl(1, fcntl.F_SETOWN, os.getppid())",
        "import os; os.setuid(1)",
        "import os; os.sched_setaffinity(0, [0])",
    ],
)
def test_X7_no_signal_trace_or_higher_limit(attempt):
    verdict = run(body(attempt.replace("{pid}", str(os.getpid()))))
    assert not verdict.passed
    assert any(word in verdict.reason for word in DENIED), verdict


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (body("import ctypes\nctypes.string_at(0)"), "process ended"),
        ("x = 'a\0b'", "null bytes"),
        ("def f(:", "SyntaxError"),
        ("def f(x):\n\treturn 1\n        return 2", "TabError"),
        ("f = " + "(" * 10**4, "SyntaxError"),
        (body("return [x] * 10**12"), "MemoryError"),
        (body("return object()"), "not plain data"),
        (body("return lambda: 1"), "not plain data"),
        (body("a = []\na.append(a)\nreturn a"), "nested too deeply"),
        ("x = 1", "KeyError: 'f'"),
        ("def f(x): raise Exception('\\ud800')", "Exception: ?"),
    ],
)
def test_X9_broken_programs_fail_with_a_reason(code, reason):
    verdict = run(code)
    assert not verdict.passed
    assert reason in verdict.reason


def test_X9_large_programs_and_output_are_cut():
    assert run(f"x = {'a' * 10**6!r}\ndef f(x): return x * x").passed
    verdict = run(body("import os\nfor _ in range(400): os.write(1, b'\\xff' * 10**4)"))
    assert verdict.passed
    assert len(verdict.output) == outside.OUTPUT_LIMIT
    assert set(verdict.output) == {"\ufffd"}


def canonical(step: int = 1) -> list[Program]:
    return [
        Program(p["prompt"] + p["canonical_solution"], p["entry_point"], p["prompt"], p["test"])
        for p in load_problems(None)[::step]
    ]


def _spin(stop) -> None:
    while not stop.is_set():
        sum(range(10**5))


@pytest.mark.parametrize("repeats", [1])
def test_X10_canonical_solutions_pass_with_busy_cores(repeats):
    """A quarter of them here; `make sandbox` does all 164, three times."""
    step = int(os.environ.get("REMIX_CANONICAL_STEP", "4"))
    context = multiprocessing.get_context("fork")
    stop = context.Event()
    busy = [context.Process(target=_spin, args=(stop,), daemon=True) for _ in range(os.cpu_count() or 1)]
    for process in busy:
        process.start()
    try:
        for _ in range(int(os.environ.get("REMIX_CANONICAL_REPEATS", repeats))):
            programs = canonical(step)
            failed = [(programs[i].entry_point, v.reason) for i, v in judge_all(programs) if not v.passed]
            assert failed == []
    finally:
        stop.set()
        for process in busy:
            process.join()


def test_X2_nothing_outlives_a_killed_parent():
    """The parent is killed while a program sleeps; solver and judge go with it."""
    code = (
        "from remix_cli.sandbox.outside import *\n"
        "judge(Program('import time\\ntime.sleep(1000)', 'f', '', 'def check(c): c(1)'), 60, 60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code])
    end = time.monotonic() + 20
    while len(left_behind()) < 2 and time.monotonic() < end:
        time.sleep(0.02)
    assert len(left_behind()) == 2
    parent.kill()
    parent.wait()
    while left_behind() and time.monotonic() < end:
        time.sleep(0.02)
    assert left_behind() == []
