"""Generated programs can neither harm nor deceive: hostile ones, one test for each row of the fault list."""

import ast
import hashlib
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from remix_cli.errors import SandboxError
from remix_cli.sandbox import outside
from remix_cli.sandbox.outside import Program, judge, judge_all
from remix_cli.tasks.humaneval import load_problems

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


def test_what_was_printed_is_kept_however_soon_the_process_is_killed():
    slow_to_end = "import atexit, time\natexit.register(time.sleep, 60)\n"
    assert run(slow_to_end + "def f(x):\n    print('called')\n    return x * x").output == "called\n" * 2
    assert run(slow_to_end + "print('broken')\n1 / 0").output == "broken\n"
    closed = run("import sys\nsys.stdout.close()\ndef f(x): return x * x")
    assert closed == outside.Verdict(True, "", "")


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


# Writes into the pipe whatever it likes, past the code that answers calls.
RAW = """
import json, os
def send(message):
    for d in range(3, 64):
        try: os.write(d, (message if isinstance(message, str) else json.dumps(message)).encode() + b"\\n")
        except OSError: pass
"""
ANY_ERROR = "try: f(1)\nexcept Exception: pass"
SKIPPED = """
import unittest
class T(unittest.TestCase):
    def test(self): assert f(1) == 1
result = unittest.TestResult()
T('test').run(result)
assert result.wasSuccessful()
"""
# (program, test, reason): the test would pass if the program's trick worked.
TRICKS = [
    # to end the loop that checks
    ("def f(x): raise StopIteration", "assert list(map(f, [1, 2])) == []", "StopIteration"),
    ("class S(StopIteration): pass\ndef f(x): raise S", "assert list(map(f, [1])) == [] and S", "StopIteration"),
    (RAW + "def f(x): send({'root': 3, 'table': [None] * 3 + [['l', [4, 5]], ['t', []], ['d', []]],"
     " 'raise': [['builtins', 'StopIteration']], 'text': 'over'})", "assert list(map(f, [1, 2])) == []", "over"),
    (RAW + "def f(x): send({'root': None, 'table': [None] * 3, 'end': 1})", "list(map(f, [1, 2]))", "StopIteration"),
    ("import unittest\ndef f(x): raise unittest.SkipTest", SKIPPED, "wrong answer"),
    ("class Skip(Exception): pass\ndef f(x): raise Skip",
     "class Skip(Exception): pass\ntry: assert f(1) == 1\nexcept Skip: pass", "Skip"),
    # to fail where the test expects an error of the function
    ("import os\ndef f(x): os._exit(0)", ANY_ERROR, "process ended"),
    ("raise ValueError(1)", ANY_ERROR, "ValueError: 1"),
    ("def f(x): return object()", ANY_ERROR, "not plain data"),
    (RAW + "def f(x): send('[' * 10**6)", ANY_ERROR, "RecursionError"),
    (RAW + "def f(x): send('[]')", ANY_ERROR, "TypeError"),
    # to have its code run, or its objects made, where the test runs
    ("def f(x): return eval if x else \"__import__('os')._exit(0)\"", "f(1)(f(0))", "process ended"),
    (RAW + "def f(x): send({'root': ['name', 'eval'], 'table': [None] * 3})", "f(1)('1')", "KeyError"),
    (RAW + "def f(g): return g('1 / 0')", "f(eval)", "ZeroDivisionError"),
    ("class C:\n    def __eq__(s, o): return True\n    def __call__(s): return 4\ndef f(x): return C()",
     "assert f(1) == 4", "wrong answer"),
    ("class C:\n    def __eq__(s, o): return True\n    def __iter__(s): return s\n    def __next__(s): return 4\n"
     "def f(x): return C()", "assert f(1) == [4]", "wrong answer"),
    ("import crossing\ncrossing.Peer.answer = lambda s, r: {'root': 5, 'table': [None] * 3, 'passed': True}\n"
     "def f(x): return 1", "assert f(1) == 4", "IndexError"),
    # to change what it was not given to change, or to send what cannot be
    (RAW + "def f(x): send({'root': True, 'table': [None, ['l', []], None]})", "f(1)", "become another"),
    (RAW + "def f(x): send({'root': True, 'table': [['d', []], None, None]})", "f(1)", "become another"),
    (RAW + "def f(x): send({'root': 3, 'table': [None] * 3 + [['t', [4]], ['z', [3]]]})", "f(1)", "part of itself"),
    (RAW + "def f(x): send({'root': 3, 'table': [None] * 3 + [['keys', [4]], ['function', 0]]})", "f(1)", "TypeError"),
    # to give the test's words another meaning
    ("class len(Exception): pass\nclass check(Exception): pass\ndef f(x): return x", "assert len(f([1])) == 2",
     "wrong answer"),
    ("class AssertionError(Exception): pass\ndef f(x): raise AssertionError", "f(1)", "AssertionError"),
    (RAW + "send({'errors': [['good', [['', ''], ['builtins', 'Exception']]]]})\ndef f(x): return 1",
     "good = 4\nassert f(1) == good", "KeyError"),
    # to keep the test busy
    ("def f(g):\n    while True: g(1)", "f(lambda x: x)", "timeout"),
    ("def f(x):\n    while True: yield x", "assert list(f(1))", "timeout"),
    ("def f(g): return g(g)", "f(f)", "RecursionError"),
]  # fmt: skip


@pytest.mark.parametrize(("code", "test", "reason"), TRICKS)
def test_what_crosses_the_pipes_cannot_deceive_the_test(code, test, reason):
    lines = "".join(f"    {line}\n" for line in test.splitlines())
    verdict = judge(
        Program(code, "f", "", f"def check(f):\n{lines}"),
        cpu_seconds=2,
        wall_seconds=2.0 if reason == "timeout" else 15,
    )
    assert not verdict.passed
    assert reason in verdict.reason


def test_X1_code_runs_only_when_allowed_and_only_confined(verb, finished, monkeypatch):
    _, err = verb("eval", finished, "--task", "humaneval", expect=2)
    assert "--allow-code-execution" in err
    real = outside.INSIDE.parent
    for missing in ("abi = 0", "machine = 'vax'"):
        faked = finished.parent / "sandbox"
        shutil.copytree(real, faked, dirs_exist_ok=True)
        line = "abi = libc.syscall" if "abi" in missing else "machine = platform"
        lines = (real / "confine.py").read_text().splitlines()
        (faked / "confine.py").write_text("\n".join(_replaced(text, line, missing) for text in lines))
        monkeypatch.setattr(outside, "INSIDE", faked / "inside.py")
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


def installation(folder: Path) -> tuple[str, list[Path]]:
    """An interpreter outside any virtual environment, its libraries laid out as by conda, uv, pyenv and Debian.

    Returns (the interpreter, files of installed packages).
    """
    real = Path(os.__file__).parent
    python = folder / "bin" / real.name
    library = folder / "lib" / real.name
    python.parent.mkdir(parents=True)
    shutil.copy(Path(sys.executable).resolve(), python)
    library.mkdir(parents=True)
    for entry in real.iterdir():
        if entry.name not in ("site-packages", "dist-packages", "lib-dynload"):
            (library / entry.name).symlink_to(entry)
    (library / "lib-dynload").mkdir()
    for entry in (real / "lib-dynload").iterdir():
        (library / "lib-dynload" / entry.name).symlink_to(entry)
    for entry in real.parent.glob("libpython*"):
        (folder / "lib" / entry.name).symlink_to(entry)
    places = [
        library / "site-packages",  # pip, pyenv, conda, uv; a pipx environment has one in its own folder
        library / "dist-packages",
        folder / "lib" / "python3" / "dist-packages",  # Debian's packages
        folder / "local" / "lib" / real.name / "dist-packages",  # Debian's pip
        folder / "lib",  # among the shared libraries
        library,  # a stray module
    ]
    packages = []
    for place in places:
        packages.append(place / "human_eval_faked" / "__init__.py")
        packages[-1].parent.mkdir(parents=True)
        packages[-1].write_text(f"answers = {SECRET!r}\n")
    return str(python), packages


READERS = """
import importlib, importlib.util, io, linecache, mmap, os, pkgutil, runpy, sqlite3, tokenize, zipimport, ctypes
def seen(package):
    folder = os.path.dirname(package)
    def imported():
        sys.path.insert(0, os.path.dirname(folder))
        return importlib.import_module("human_eval_faked").answers
    def by_location():
        spec = importlib.util.spec_from_file_location("x", package)
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
        return "seen"
    yield from (
        lambda: open(package).read(), lambda: os.listdir(folder), lambda: list(os.scandir(folder))[0].name, imported,
        by_location, lambda: runpy.run_path(package), lambda: linecache.getlines(package)[0],
        lambda: tokenize.open(package).read(), lambda: pkgutil.get_data("human_eval_faked", "__init__.py"),
        lambda: os.read(os.open(package, os.O_PATH), 9), lambda: os.open(".", os.O_RDONLY, dir_fd=os.open(folder, 0)),
        lambda: open(folder + "/../" + os.path.basename(folder) + "/__init__.py").read(),
        lambda: [x[2] or x[1] for x in os.walk(os.path.dirname(folder))][0],
    )
import sys
def f(packages):
    got = []
    for package in packages:
        for i, read in enumerate(seen(package)):
            try: got.append((package, i, repr(read())))
            except Exception: pass
    return got
"""


def test_X6_only_the_standard_library_can_be_read_outside_a_virtual_environment(tmp_path, monkeypatch):
    python, packages = installation(tmp_path)
    told = subprocess.run(
        [python, "-c", "import sys, site; print(sys.prefix, site.getsitepackages())"], capture_output=True, text=True
    ).stdout
    assert told == f"{tmp_path} {[str(packages[0].parent.parent)]}\n"  # the layout is taken for an installation
    monkeypatch.setattr(sys, "executable", python)
    outside.check_available()
    test = f"def check(f):\n    got = f({[str(package) for package in packages]})\n    if got: raise ValueError(got)\n"
    assert judge(Program(READERS, "f", "", test)) == outside.Verdict(True, "", "")
    # And what is there by right: modules in one file and in folders, of Python and of C, with their shared libraries.
    modules = "import bz2, concurrent.futures, decimal, hashlib, json.tool, lzma, sqlite3, statistics, xml.dom, zlib"
    assert run(body(modules + "\nhashlib.sha1(b'x').hexdigest()\nsqlite3.connect(':memory:')")).passed


def test_X6_nothing_else_of_the_system_libraries_folder_can_be_read():
    files = [path for path in ("/usr/lib/os-release", "/usr/lib/locale", "/usr/lib", "/lib") if os.path.exists(path)]
    attempt = f"import os\nfor p in {files}:\n    try: os.open(p, 0)\n    except PermissionError: pass\n    else: 1 / 0"
    assert run(body(attempt)).passed


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
        (body("return lambda: 1"), "wrong answer"),
        (body("a = []\na.append(a)\nreturn a"), "wrong answer"),
        (body("class E(Exception):\n    def __str__(self): return 1 / 0\nraise E"), "E"),
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
