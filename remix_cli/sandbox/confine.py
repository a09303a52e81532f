"""How a process gives up everything but computing: rlimits, Landlock, seccomp. Standard library only."""

import ctypes
import importlib
import importlib.machinery
import os
import platform
import resource
import struct
import sys
from typing import Any

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


def confine(cpu_seconds: int, parent: int, readable: list[str]) -> None:
    """Give up, for good, everything but computing, reading the files and folders `readable` and the open pipes.

    And end when the process `parent` does, however that ends.
    """
    # The standard library's folder cannot be listed later (a right to list would hold for what is installed in it,
    # too). Looking once for what does not exist makes the import system keep a listing.
    importlib.machinery.PathFinder.find_spec("no_such_module")
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
    _landlock(libc, readable)
    _seccomp(libc)


def _landlock(libc: Any, readable: list[str]) -> None:
    abi = libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), 1)
    if abi < 1:
        raise NotConfined("no Landlock (Linux 5.13 or newer with CONFIG_SECURITY_LANDLOCK, enabled at boot)")
    rights = (1 << _RIGHTS_BY_ABI.get(abi, 16)) - 1
    fields = [rights] + ([_NET_BIND_CONNECT] if abi >= 4 else []) + ([_SCOPES] if abi >= 6 else [])
    attributes = struct.pack(f"{len(fields)}Q", *fields)
    ruleset = libc.syscall(_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), 0)
    if ruleset < 0:
        raise NotConfined(f"Landlock refused: {os.strerror(ctypes.get_errno())}")
    for path in readable:
        where = os.open(path, os.O_PATH | os.O_CLOEXEC)
        allowed = _READ_FILE | _EXECUTE | (_READ_DIR if os.path.isdir(path) else 0)
        if libc.syscall(_ADD_RULE, ruleset, 1, struct.pack("=Qi", allowed, where), 0):
            raise NotConfined(f"Landlock refused {path}: {os.strerror(ctypes.get_errno())}")
        os.close(where)
    if libc.syscall(_RESTRICT_SELF, ruleset, 0):
        raise NotConfined(f"Landlock refused: {os.strerror(ctypes.get_errno())}")
    os.close(ruleset)


def readable_paths() -> list[str]:
    """The standard library and the shared libraries that its extension modules load; nothing else.

    Run in a fresh process. Both are found by what they are, not by where an installation keeps them: other packages
    may lie inside the standard library's folder (site-packages) or between the shared libraries (dist-packages).
    """
    paths = ["/etc/ld.so.cache"]  # where the loader looks up a library's name
    for entry in sys.path:  # the isolated interpreter's: the standard library, whole or in parts, perhaps as an archive
        if os.path.isfile(entry):
            paths.append(entry)
        elif os.path.isdir(entry):
            paths += _standard_library(entry)
    # Load every extension module; what is mapped then is what they need.
    for name in sorted(sys.stdlib_module_names):
        if isinstance(_loader_of(name), importlib.machinery.ExtensionFileLoader):
            try:
                importlib.import_module(name)
            except Exception:  # its library is not installed: no program can import it either
                continue
    with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as file:
        fields = [line.rstrip("\n").split(maxsplit=5) for line in file]
    paths += [entry[5] for entry in fields if len(entry) == 6 and "x" in entry[1] and entry[5].startswith("/")]
    return sorted({os.path.realpath(path) for path in paths if os.path.exists(path)})


def _standard_library(folder: str) -> list[str]:
    """What of a folder of sys.path is the standard library's."""
    if os.path.basename(folder) == "lib-dynload":
        return [folder]
    found = []
    for entry in os.listdir(folder):
        module = entry.split(".")[0]
        if module in sys.stdlib_module_names or module.startswith("_sysconfigdata") or module == "__pycache__":
            found.append(os.path.join(folder, entry))
    return found


def _loader_of(name: str) -> Any:
    spec = importlib.machinery.PathFinder.find_spec(name)
    return spec and spec.loader


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
