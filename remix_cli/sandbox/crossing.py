"""What the test and the program of two processes say to each other: plain values, calls, errors.

Standard library only; nothing that a message holds is run.
"""

import builtins
import collections
import collections.abc
import importlib
import json
import sys
from typing import Any

# Values that are told by themselves: [tag, text or numbers]. What a message holds besides stands in its table.
_CONTAINERS: tuple[tuple[str, type], ...] = (
    # The first whose instance a value is: a subclass crosses as its base.
    ("o", collections.OrderedDict),
    ("n", collections.Counter),
    ("f", collections.defaultdict),
    ("d", dict),
    ("l", list),
    ("q", collections.deque),
    ("s", set),
    ("y", bytearray),
    ("t", tuple),
    ("z", frozenset),
    ("keys", type({}.keys())),
    ("values", type({}.values())),
    ("items", type({}.items())),
)
_MUTABLE = frozenset("onfdlqsy")
_EMPTY = {
    "o": collections.OrderedDict,
    "n": collections.Counter,
    "f": collections.defaultdict,
    "d": dict,
    "l": list,
    "s": set,
    "y": bytearray,
}
# Functions and classes that cross by name. The test's may be any; calling one of the program's must be harmless
# whatever the test calls it with (`eval` is not).
BUILTIN = vars(builtins) | {"NoneType": type(None)}
HARMLESS = {
    name: value
    for name, value in BUILTIN.items()
    if isinstance(value, type)
    and (
        issubclass(value, BaseException | int | float | complex | str | bytes | bytearray)
        or value in (list, tuple, set, frozenset, dict, range, object, type(None))
    )
}
# What a loop, a comprehension or `map` takes for its end, so that a test would skip what it checks.
_ENDS = (StopIteration, StopAsyncIteration, GeneratorExit)
_END = object()
ENDED = "the program's process ended"


def text_of(error: BaseException) -> str:
    """`Type: message` for a reader, whatever the foreign class does in `__str__`."""
    try:
        return f"{type(error).__name__}: {error}"[:500]
    except BaseException:
        return str(type(error).__name__)[:500]


def _tag(item: Any) -> str | None:
    for tag, kind in _CONTAINERS:
        if isinstance(item, kind):
            return tag
    return None


def _fill(tag: str, item: Any, parts: list[Any]) -> None:
    """Give a mutable container its content."""
    if tag == "y":
        item[:] = parts[0]
        return
    item.clear()
    if tag in "lq":
        item.extend(parts)
    elif tag == "s":
        item.update(parts)
    else:
        if tag == "f":
            item.default_factory = parts[0]
            parts = parts[1:]
        for key, value in zip(parts[::2], parts[1::2], strict=True):
            item[key] = value


class Peer:
    """One end of the two pipes between the test and the program. Either side calls the other's functions.

    What crosses is a copy. A message holds a table of its containers, which are told apart by identity and refer to
    each other by number, so nothing is too deep, and what is one object here is one object there. A call's answer
    says which of its arguments' containers have changed, and the caller changes its own. Functions stay where they
    are and are called from afar; so are iterators, one item at a time.

    reader, writer: text files, one JSON object a line
    sends, accepts: functions and classes that cross by name, out and in
    errors:         exception classes of the prompt and the program, by name
    expected:       names of the only classes, besides Python's own, that an error may come as; None: of any
    """

    def __init__(self, reader: Any, writer: Any, sends: dict[str, Any], accepts: dict[str, Any]) -> None:
        self.reader, self.writer = reader, writer
        self.sends = {id(value): name for name, value in sends.items()}
        self.accepts = accepts
        self.errors: dict[str, type[BaseException]] = {}
        self.expected: set[str] | None = None
        self.given: list[Any] = []  # what the other side may call, by number
        self.broken: str | None = None  # why this pair cannot be judged, whatever the test makes of it
        self.raised: tuple[BaseException | None, str] = (None, "")  # the other side's last error, and its text

    def write(self, message: dict[str, Any]) -> None:
        self.writer.write(json.dumps(message) + "\n")
        self.writer.flush()

    def read(self) -> dict[str, Any]:
        line = self.reader.readline()
        if not line.endswith("\n"):
            raise RuntimeError(ENDED)
        return json.loads(line)

    def call(self, number: int, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Call the other side's function of this number. Returns _END where that raised StopIteration."""
        try:
            coded, objects = self.flatten([args, kwargs])
            self.write({"call": number} | coded)
            reply = self.read()
            while "call" in reply:  # it calls one of ours first
                self.write(self.answer(reply))
                reply = self.read()
            if "broken" in reply:
                raise RuntimeError(str(reply["broken"]))
            value, _ = self.unflatten(reply, objects)
            if "end" in reply:
                return _END
            if "raise" in reply:
                args, attributes = value
                error = self._error(reply["raise"], args, attributes, reply["text"])
                self.raised = (error, str(reply["text"]))
            else:
                error = None
        except Exception as failure:
            if self.broken is None:
                self.broken = str(failure) if type(failure) is RuntimeError else text_of(failure)
            raise
        if error is not None:
            raise error
        return value

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Make the call that the other side asks for; what to say about it."""
        try:
            (args, kwargs), objects = self.unflatten(request)
            before, _ = self.flatten(None, objects)
            reply: dict[str, Any] = {}
            try:
                value = self.given[request["call"]](*args, **kwargs)
            except StopIteration:
                reply, value = {"end": True}, None
            except BaseException as error:
                names = [[kind.__module__, kind.__qualname__] for kind in type(error).__mro__]
                reply, value = {"raise": names, "text": text_of(error)}, self._plain_parts(error)
            coded, _ = self.flatten(value, objects)
            for i in range(len(objects)):
                if coded["table"][i] == before["table"][i]:
                    coded["table"][i] = None
            return reply | coded
        except BaseException as error:
            self.broken = self.broken or text_of(error)
            return {"broken": text_of(error)}

    def _plain_parts(self, error: BaseException) -> list[Any]:
        """[arguments, attributes] of an error, as far as they are plain."""
        for parts in ([error.args, dict(vars(error))], [error.args, {}]):
            try:
                self.flatten(parts)
                return parts
            except TypeError:
                continue
        return [(text_of(error),), {}]

    def _error(self, names: list[Any], args: tuple, attributes: dict[str, Any], text: str) -> BaseException:
        """The other side's error as one of this side's classes; a RuntimeError where none is like it."""
        kind = self.error_class(names)
        try:
            if kind.__module__ == "builtins":
                made = kind(*args)
            else:  # its __init__ may want other arguments than those the error kept
                made = kind.__new__(kind, *args)
            vars(made).update(attributes)
            return made
        except Exception:
            return RuntimeError(text)

    def error_class(self, names: list[Any]) -> type[BaseException]:
        """The nearest class known here of an error's bases [[module, name], ...]."""
        for module, name in names:
            if module in ("__solution__", "__test__"):
                found = self.errors.get(name)
            elif module != "builtins" and self.expected is not None and name not in self.expected:
                continue
            else:
                found = getattr(sys.modules.get(module), name, None)
            if isinstance(found, type) and issubclass(found, BaseException):
                return RuntimeError if issubclass(found, _ENDS) else found
        return RuntimeError

    def function(self, number: int) -> Any:
        """Stands for the other side's function of this number."""

        def stand_in(*args: Any, **kwargs: Any) -> Any:
            value = self.call(number, args, kwargs)
            if value is _END:
                error = RuntimeError("StopIteration")
                self.raised = (error, "StopIteration")
                raise error
            return value

        return stand_in

    def stream(self, number: int) -> Any:
        """Stands for the other side's iterator, whose next item the function of this number gives."""
        while (value := self.call(number, (), {})) is not _END:
            yield value

    def flatten(self, value: Any, known: Any = ()) -> tuple[dict[str, Any], list[Any]]:
        """({"root": value, "table": its containers} for JSON, the containers). Raises TypeError for what is not plain.

        known: objects that the other side has, too: the first in the table, where the immutable ones are None.
        """
        objects = list(known)
        numbers = {id(item): i for i, item in enumerate(objects)}

        def code(value: Any) -> Any:
            single = self._single(value)
            if single is not _END:
                return single
            if id(value) not in numbers:
                numbers[id(value)] = len(objects)
                objects.append(value)  # also keeps it alive, so that no other object gets its id
            return numbers[id(value)]

        root = code(value)
        table: list[Any] = []
        for i, item in enumerate(objects):  # which grows meanwhile
            tag = _tag(item)
            if i < len(known) and tag not in _MUTABLE:
                table.append(None)
            elif tag is not None:
                table.append([tag, [code(part) for part in _parts(tag, item)]])
            elif isinstance(item, collections.abc.Iterator):
                table.append(["stream", self._give(item.__next__)])
            elif callable(item):
                table.append(["function", self._give(item)])
            else:
                raise TypeError(f"a {type(item).__name__} is not plain data")
        return {"root": root, "table": table}, objects

    def _give(self, function: Any) -> int:
        self.given.append(function)
        return len(self.given) - 1

    def _single(self, value: Any) -> Any:
        """JSON for a value without parts, types kept; _END for any other."""
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, str):
            return str.__str__(value)
        if isinstance(value, int):
            return ["i", hex(int.__int__(value))]
        if isinstance(value, float):
            return ["f", float.hex(value)]
        if isinstance(value, complex):
            return ["c", [value.real.hex(), value.imag.hex()]]
        if isinstance(value, bytes):
            return ["b", bytes.hex(value)]
        if isinstance(value, range):
            return ["r", [hex(value.start), hex(value.stop), hex(value.step)]]
        # No value is of a class whose module nobody has imported.
        if "fractions" in sys.modules and isinstance(value, sys.modules["fractions"].Fraction):
            return ["fraction", [hex(value.numerator), hex(value.denominator)]]
        if "decimal" in sys.modules and isinstance(value, sys.modules["decimal"].Decimal):
            return ["decimal", str(value)]
        if isinstance(value, type) or callable(value):
            name = self.sends.get(id(value))
            if name is not None:
                return ["name", name]
        return _END

    def _value(self, single: Any) -> Any:
        """Inverse of `_single`. Raises on anything else."""
        if single is None or isinstance(single, bool | str):
            return single
        tag, content = single
        if tag == "i":
            return int(content, 16)
        if tag == "f":
            return float.fromhex(content)
        if tag == "c":
            return complex(*map(float.fromhex, content))
        if tag == "b":
            return bytes.fromhex(content)
        if tag == "r":
            return range(*(int(number, 16) for number in content))
        if tag == "fraction":
            return importlib.import_module("fractions").Fraction(*(int(number, 16) for number in content))
        if tag == "decimal":
            return importlib.import_module("decimal").Decimal(content)
        if tag == "name":
            return self.accepts[content]
        raise ValueError(f"no value is called {tag!r}")

    def unflatten(self, coded: dict[str, Any], known: Any = ()) -> tuple[Any, list[Any]]:
        """(value, the containers) of what `flatten` made. Changes those of the containers `known` that have changed.

        Raises on anything that `flatten` does not make.
        """
        table, objects = coded["table"], list(known)
        for tag, content in table[len(objects) :]:
            if tag == "stream":
                objects.append(self.stream(int(content)))
            elif tag == "function":
                objects.append(self.function(int(content)))
            elif tag == "q":
                objects.append(collections.deque(maxlen=self._value(content[0])))
            else:
                objects.append(_EMPTY[tag]() if tag in _MUTABLE else _END)  # a tuple waits for its parts

        def part(code: Any) -> Any:
            return objects[code] if type(code) is int else self._value(code)

        for i, item in enumerate(objects):
            if item is _END:
                _build(i, table, objects, part)
        # All tuples and frozensets exist now, and with them every key.
        for item, entry in zip(objects, table, strict=True):
            if entry is None or entry[0] not in _MUTABLE:
                continue
            tag, content = entry
            if _tag(item) != tag:
                raise ValueError("a value has become another")
            _fill(tag, item, [part(code) for code in (content[1:] if tag == "q" else content)])
        return part(coded["root"]), objects


def _parts(tag: str, item: Any) -> list[Any]:
    """A container's parts in a row, read past what a subclass may have overridden."""
    if tag == "y":
        return [bytes(item)]
    if tag == "q":
        return [item.maxlen, *collections.deque.__iter__(item)]
    if tag in ("keys", "values", "items"):
        return [dict(item.mapping)]
    kind: Any = dict(_CONTAINERS)[tag]
    if not issubclass(kind, dict):
        return list(kind.__iter__(item))
    pairs = [part for pair in kind.items(item) for part in pair]
    return [item.default_factory, *pairs] if tag == "f" else pairs


def _build(start: int, table: list[Any], objects: list[Any], part: Any) -> None:
    """Make the immutable container of this number, its parts first. Raises ValueError if it is part of itself."""
    stack, entered = [start], set()
    while stack:
        i = stack[-1]
        tag, content = table[i]
        missing = [code for code in content if type(code) is int and objects[code] is _END]
        if objects[i] is not _END:
            stack.pop()
        elif not missing:
            parts = [part(code) for code in content]
            if tag == "t":
                objects[i] = tuple(parts)
            elif tag == "z":
                objects[i] = frozenset(parts)
            else:
                objects[i] = {"keys": dict.keys, "values": dict.values, "items": dict.items}[tag](parts[0])
        elif i in entered:
            raise ValueError("a tuple is part of itself")
        else:
            entered.add(i)
            stack += missing
