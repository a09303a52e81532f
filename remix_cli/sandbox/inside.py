"""The two confined processes: `solver` holds the program a model wrote, `judge` the problem's test.

The judge calls the program's function through pipes, where only plain values cross, so nothing the program defines
ever runs where the verdict is made. Standard library only; started as `python -I -S -B inside.py ROLE FD ...` with
the payload on standard input.
"""

import json
import os
import sys
from contextlib import suppress
from typing import Any

# A script knows no package: its two neighbours are found beside it, and nothing else is.
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from confine import NotConfined, confine, readable_paths
from crossing import BUILTIN, HARMLESS, Peer, text_of

sys.path.pop(0)


def _is_error(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, BaseException)


def _solve(payload: dict[str, Any], requests: int, answers: int) -> None:
    """Define the program, say which errors are its own, then answer calls of its function."""
    namespace: dict[str, Any] = {"__name__": "__solution__"}
    reader, writer = os.fdopen(requests, encoding="utf-8"), os.fdopen(answers, "w", encoding="utf-8")
    peer = Peer(reader, writer, HARMLESS, BUILTIN)
    printed = sys.stdout  # the program may put something else in its place
    try:
        exec(compile(payload["program"], "<program>", "exec"), namespace)
        peer.given.append(namespace[payload["entry_point"]])
        peer.errors = {name: value for name, value in namespace.items() if _is_error(value)}
        errors = [
            [name, [[base.__module__, base.__qualname__] for base in kind.__mro__]]
            for name, kind in peer.errors.items()
            if kind.__module__ == "__solution__"
        ]
        hello = {"errors": errors}
    except BaseException as error:
        hello = {"broken": text_of(error)}
    _flush(printed)
    peer.write(hello)
    if "broken" in hello:
        return
    while line := reader.readline():
        answer = peer.answer(json.loads(line))
        _flush(printed)
        peer.write(answer)


def _flush(printed: Any) -> None:
    """Hand over what was printed before the answer goes out: after the last one, this process is soon killed."""
    with suppress(OSError, ValueError):  # the program may have closed it
        printed.flush()


def _judge(payload: dict[str, Any], requests: int, answers: int, verdict: int) -> None:
    """Run the problem's own test against the program behind the pipes, and say with the nonce how it went."""
    reader, writer = os.fdopen(answers, encoding="utf-8"), os.fdopen(requests, "w", encoding="utf-8")
    peer = Peer(reader, writer, BUILTIN, HARMLESS)
    namespace: dict[str, Any] = {"__name__": "__test__"}
    passed, reason = False, ""
    try:
        exec(compile(payload["prompt"], "<prompt>", "exec"), namespace)  # its imports and helper functions
        hello = peer.read()
        if "broken" in hello:
            raise RuntimeError(str(hello["broken"]))
        test = compile(payload["test"], "<test>", "exec")
        _adopt_errors(peer, namespace, hello["errors"], _names(test))
        candidate = peer.function(0)
        namespace[payload["entry_point"]] = candidate  # some tests call it by name, too
        exec(test, namespace)
        namespace["check"](candidate)
        passed = peer.broken is None
    except BaseException as error:
        raised, text = peer.raised
        if error is raised:
            reason = text
        elif isinstance(error, AssertionError):
            reason = "wrong answer"
        else:
            reason = str(error) if type(error) is RuntimeError else text_of(error)
    if peer.broken is not None:
        reason = peer.broken
    os.write(verdict, json.dumps({"nonce": payload["nonce"], "passed": passed, "reason": reason[:500]}).encode())


def _names(code: Any) -> set[str]:
    """Every global name and attribute that a code object and those within it use."""
    inner = [constant for constant in code.co_consts if isinstance(constant, type(code))]
    return set(code.co_names).union(*map(_names, inner))


def _adopt_errors(peer: Peer, namespace: dict[str, Any], told: list[Any], expected: set[str]) -> None:
    """Classes for the errors that the test names: the prompt's own, and stand-ins for the program's.

    A stand-in takes no name that means something already: a test's words keep their meaning. What the test does not
    name (`unittest.SkipTest`) comes as its nearest base.
    """
    peer.expected = expected
    peer.errors = {name: value for name, value in namespace.items() if _is_error(value)}
    for name, bases in told:
        if name in expected and name not in namespace and name not in BUILTIN:
            base = peer.error_class(bases[1:])
            namespace[name] = peer.errors[name] = type(name, (base,), {"__module__": "__test__"})


def main() -> None:
    role, *descriptors = sys.argv[1:]
    payload = json.loads(sys.stdin.buffer.read())
    sys.setrecursionlimit(5000)
    try:
        if role == "readable":
            print(json.dumps(readable_paths()))
            return
        confine(payload["cpu_seconds"], payload["parent"], payload["readable"])
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
