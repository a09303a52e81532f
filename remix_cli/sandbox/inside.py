"""The two confined processes: `solver` holds the program a model wrote, `judge` the problem's test.

The judge calls the program's function through pipes: arguments and results cross as plain values (numbers, text,
lists, tuples, dicts, sets), so nothing the program defines ever runs where the verdict is made. Standard library
only; started as `python -I -S -B inside.py ROLE FD ...` with the payload on standard input.
"""

import ctypes
import json
import os
import platform
import resource
import struct
import sys
import sysconfig
from typing import Any

CPU_SECONDS = 5
MEMORY_BYTES = 1 << 30

# Landlock (Linux 5.13): the same system call numbers on every architecture.
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_EXECUTE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 2, 1 << 3
_RIGHTS_BY_ABI = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}  # how many file system rights each version knows
# Linux 6.7 adds TCP, 6.12 signals and abstract sockets; seccomp denies those on older kernels, too.
_NET_BIND_CONNECT, _SCOPES = 3, 3

_PARENT_DEATH_SIGNAL, _NO_NEW_PRIVILEGES, _SET_SECCOMP, _FILTER_MODE = 1, 38, 22, 2
_ALLOW, _KILL, _REFUSE = 0x7FFF0000, 0x80000000, 0x00050000 | 1  # the last with EPERM
# fcntl may duplicate a descriptor and read or set its flags, not ask for signals: F_DUPFD .. F_GETFL, F_DUPFD_CLOEXEC.
_FCNTL = (0, 1, 2, 3, 1030)
# BPF: load a word of seccomp_data, jump if equal, return.
_LOAD, _EQUAL, _RETURN = 0x20, 0x15, 0x06

# What a computation needs of the kernel: name, number on x86_64, number on aarch64. No process, thread, signal,
# socket, or change to any file; Landlock says which files may be opened.
_CALLS = """
    mmap 9 222, mprotect 10 226, munmap 11 215, brk 12 214, mremap 25 216, madvise 28 233,
    read 0 63, write 1 64, open 2 -, close 3 57, stat 4 -, fstat 5 80, lstat 6 -, poll 7 -, lseek 8 62,
    pread64 17 67, readv 19 65, writev 20 66, access 21 -, select 23 -, dup 32 23, dup2 33 -, getcwd 79 17,
    readlink 89 -, getdents64 217 61, openat 257 56, newfstatat 262 79, readlinkat 267 78, faccessat 269 48,
    pselect6 270 72, ppoll 271 73, statx 332 291, faccessat2 439 439, dup3 - 24,
    rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139, sched_yield 24 124, nanosleep 35 101,
    getpid 39 172, uname 63 160, gettimeofday 96 169, getrlimit 97 163, getrusage 98 165, sysinfo 99 179,
    times 100 153, getuid 102 174, getgid 104 176, geteuid 107 175, getegid 108 177, sigaltstack 131 132,
    gettid 186 178, time 201 -, futex 202 98, sched_getaffinity 204 123, set_tid_address 218 96,
    restart_syscall 219 128, clock_gettime 228 113, clock_getres 229 114, clock_nanosleep 230 115,
    exit_group 231 94, exit 60 93, set_robust_list 273 99, getrandom 318 278, membarrier 324 283, rseq 334 293
"""
# Audit architecture, and the numbers of the two calls that are allowed with some arguments only.
_MACHINES = {
    "x86_64": (0xC000003E, {"fcntl": 72, "prlimit64": 302}),
    "aarch64": (0xC00000B7, {"fcntl": 25, "prlimit64": 261}),
}


class NotConfined(Exception):
    """The kernel lacks a mechanism, or refused it."""


def confine(cpu_seconds: int, parent: int) -> None:
    """Give up, for good, everything but computing, reading the standard library and the open pipes.

    And end when the process `parent` does, however that ends.
    """
    for limit, value in (
        (resource.RLIMIT_CPU, cpu_seconds),
        (resource.RLIMIT_AS, MEMORY_BYTES),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 64),
    ):
        resource.setrlimit(limit, (value, value))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PARENT_DEATH_SIGNAL, 9, 0, 0, 0) or os.getppid() != parent:
        raise NotConfined("the parent is gone")
    if libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0):
        raise NotConfined("PR_SET_NO_NEW_PRIVS refused")
    _landlock(libc)
    _seccomp(libc)


def _landlock(libc: Any) -> None:
    abi = libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), 1)
    if abi < 1:
        raise NotConfined("no Landlock (Linux 5.13 or newer with CONFIG_SECURITY_LANDLOCK, enabled at boot)")
    rights = (1 << _RIGHTS_BY_ABI.get(abi, 16)) - 1
    fields = [rights] + ([_NET_BIND_CONNECT] if abi >= 4 else []) + ([_SCOPES] if abi >= 6 else [])
    attributes = struct.pack(f"{len(fields)}Q", *fields)
    ruleset = libc.syscall(_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), 0)
    if ruleset < 0:
        raise NotConfined(f"Landlock refused: {os.strerror(ctypes.get_errno())}")
    for path in _readable():
        where = os.open(path, os.O_PATH | os.O_CLOEXEC)
        allowed = _READ_FILE | _EXECUTE | (_READ_DIR if os.path.isdir(path) else 0)
        if libc.syscall(_ADD_RULE, ruleset, 1, struct.pack("=Qi", allowed, where), 0):
            raise NotConfined(f"Landlock refused {path}: {os.strerror(ctypes.get_errno())}")
        os.close(where)
    if libc.syscall(_RESTRICT_SELF, ruleset, 0):
        raise NotConfined(f"Landlock refused: {os.strerror(ctypes.get_errno())}")
    os.close(ruleset)


def _readable() -> list[str]:
    """The standard library and the shared libraries its extension modules load."""
    libraries = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache"]
    paths = [sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"), *libraries]
    return sorted({os.path.realpath(path) for path in paths if os.path.exists(path)})


def _seccomp(libc: Any) -> None:
    machine = platform.machine()
    if machine not in _MACHINES:
        raise NotConfined(f"no system call list for {machine}")
    architecture, partly = _MACHINES[machine]
    column = 1 if machine == "x86_64" else 2
    numbers = [entry.split()[column] for entry in _CALLS.split(",")]
    program = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, architecture), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, 0)]
    for number in (int(text) for text in numbers if text != "-"):
        program += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ALLOW)]
    chosen = [line for command in _FCNTL for line in ((_EQUAL, 0, 1, command), (_RETURN, 0, 0, _ALLOW))]
    only = [(_LOAD, 0, 0, 24), *chosen, (_RETURN, 0, 0, _REFUSE)]
    program += [(_EQUAL, 0, len(only), partly["fcntl"]), *only]
    # prlimit64 may read limits but not set them: its third argument, both halves, must be null.
    program += [(_EQUAL, 0, 5, partly["prlimit64"]), (_LOAD, 0, 0, 32), (_EQUAL, 0, 3, 0)]
    program += [(_LOAD, 0, 0, 36), (_EQUAL, 0, 1, 0), (_RETURN, 0, 0, _ALLOW)]
    program += [(_RETURN, 0, 0, _REFUSE)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in program))
    header = struct.pack("HxxxxxxP", len(program), ctypes.addressof(code))
    if libc.prctl(_SET_SECCOMP, _FILTER_MODE, header, 0, 0):
        raise NotConfined(f"seccomp refused: {os.strerror(ctypes.get_errno())}")


def to_plain(value: Any, depth: int = 0) -> Any:
    """JSON for a plain value, types kept: [tag, content]. Raises TypeError for anything else."""
    if depth > 200:
        raise TypeError("nested too deeply")
    if value is None or isinstance(value, bool | str):
        return ["", bool(value) if isinstance(value, bool) else value and str.__str__(value)]
    if isinstance(value, int):
        return ["i", hex(int.__int__(value))]
    if isinstance(value, float):
        return ["f", float.hex(value)]
    if isinstance(value, complex):
        return ["c", [value.real.hex(), value.imag.hex()]]
    for tag, kind in (("l", list), ("t", tuple), ("s", set), ("z", frozenset)):
        if isinstance(value, kind):
            return [tag, [to_plain(item, depth + 1) for item in value]]
    if isinstance(value, dict):
        return ["d", [[to_plain(k, depth + 1), to_plain(v, depth + 1)] for k, v in dict.items(value)]]
    if isinstance(value, bytes):
        return ["b", value.hex()]
    raise TypeError(f"a {type(value).__name__} is not plain data")


def from_plain(coded: Any) -> Any:
    """Inverse of `to_plain`; a subclass comes back as its base. Raises on anything else."""
    tag, content = coded
    if tag == "" and (content is None or isinstance(content, bool | str)):
        return content
    if tag == "d":
        return {from_plain(k): from_plain(v) for k, v in content}
    if tag in ("l", "t", "s", "z"):
        return {"l": list, "t": tuple, "s": set, "z": frozenset}[tag](from_plain(item) for item in content)
    if tag == "c":
        return complex(*map(float.fromhex, content))
    return {"i": lambda x: int(x, 16), "f": float.fromhex, "b": bytes.fromhex}[tag](content)


def _solve(payload: dict[str, Any], requests: int, answers: int) -> None:
    """Define the program, then answer calls of its function, one JSON line each."""
    namespace: dict[str, Any] = {"__name__": "__solution__"}
    failed = None
    try:
        exec(compile(payload["program"], "<program>", "exec"), namespace)
        function = namespace[payload["entry_point"]]
    except BaseException as error:
        failed = f"{type(error).__name__}: {error}"[:500]
    with os.fdopen(requests, encoding="utf-8") as calls, os.fdopen(answers, "w", encoding="utf-8") as out:
        for line in calls:
            try:
                if failed is not None:
                    raise RuntimeError(failed)
                args, kwargs = (from_plain(part) for part in json.loads(line))
                reply = {"value": to_plain(function(*args, **kwargs))}
            except BaseException as error:
                reply = {"error": failed or f"{type(error).__name__}: {error}"[:500]}
            out.write(json.dumps(reply) + "\n")
            out.flush()


def _judge(payload: dict[str, Any], requests: int, answers: int, verdict: int) -> None:
    """Run the problem's own test against the program behind the pipes, and say with the nonce how it went."""
    out = os.fdopen(requests, "w", encoding="utf-8")
    replies = os.fdopen(answers, encoding="utf-8")

    def candidate(*args: Any, **kwargs: Any) -> Any:
        out.write(json.dumps([to_plain(args), to_plain(kwargs)]) + "\n")
        out.flush()
        line = replies.readline()
        if not line.endswith("\n"):
            raise RuntimeError("the program's process ended")
        reply = json.loads(line)
        if "error" in reply:
            raise RuntimeError(str(reply["error"]))
        return from_plain(reply["value"])

    namespace: dict[str, Any] = {"__name__": "__test__"}
    passed, reason = False, ""
    try:
        exec(compile(payload["prompt"], "<prompt>", "exec"), namespace)  # its imports and helper functions
        namespace[payload["entry_point"]] = candidate  # some tests call it by name, too
        exec(compile(payload["test"], "<test>", "exec"), namespace)
        namespace["check"](candidate)
        passed = True
    except AssertionError:
        reason = "wrong answer"
    except BaseException as error:
        reason = str(error) if type(error) is RuntimeError else f"{type(error).__name__}: {error}"
    os.write(verdict, json.dumps({"nonce": payload["nonce"], "passed": passed, "reason": reason[:500]}).encode())


def main() -> None:
    role, *descriptors = sys.argv[1:]
    payload = json.loads(sys.stdin.buffer.read())
    sys.setrecursionlimit(5000)
    try:
        confine(payload.get("cpu_seconds", CPU_SECONDS), payload["parent"])
    except (NotConfined, OSError, ValueError) as error:
        print(f"not confined: {error}", file=sys.stderr)
        sys.exit(7)
    if role == "solver":
        _solve(payload, *map(int, descriptors))
    elif role == "judge":
        _judge(payload, *map(int, descriptors))
    else:  # `probe`: being able to get here is the answer
        print("confined")


if __name__ == "__main__":
    main()
