"""Chat templates come with models, and are programs: each runs in a process of its own, which the system bounds.

A template can fill the memory with one multiplication, or spend a day in one comparison of long lists, which nothing
in the same process could stop. So a child is forked, which has the tokenizer already, and renders one conversation
after another within a limit of memory and of processor time. A child that dies takes nothing along.
"""

import contextlib
import json
import math
import os
import resource
import signal
import warnings
import weakref
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

from remix_cli.data.formats import Message, RowError
from remix_cli.errors import shortened

Parts = list[tuple[str, bool]]
Render = Callable[[list[Message], bool], str]
# A rendering takes well under a millisecond; the first one compiles the template, in a few hundredths of a second.
SECONDS, SECONDS_EACH = 1, 0.05
BYTES = 64_000_000
WAIT = 120  # seconds, for a machine that is busy with other things


class Template:
    """Renders a tokenizer's chat template."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.pipe: Connection | None = None
        self._end: Callable[[], str | None] = lambda: None
        self.refusal = ""  # what it died of

    def turns(self, messages: list[Message]) -> Parts:
        """The conversation's text in order, each stretch with whether it is an assistant's turn. Raises RowError."""
        return [(text, learnt) for text, learnt in self._ask({"messages": messages})]

    def scaffold(self) -> str:
        """What is written around a user's turn, as far as the template takes one alone."""
        try:
            return self._ask({"messages": [{"role": "user", "content": ""}], "alone": True})
        except RowError:
            return ""

    def _ask(self, question: dict[str, Any]) -> Any:
        if self.refusal:
            raise RowError(self.refusal)
        pipe = self.pipe or self._start()
        try:
            pipe.send_bytes(json.dumps(question).encode())
            if not pipe.poll(WAIT):
                raise EOFError
            answer = json.loads(pipe.recv_bytes())
        except (EOFError, OSError):
            self.refusal = f"the chat template {self._end()}"
            raise RowError(self.refusal) from None
        except BaseException:  # an interruption: the answer would be taken for the next one
            self._end()
            self.pipe = None
            raise
        if "error" in answer:
            raise RowError(answer["error"])
        return answer["text"]

    def _start(self) -> Connection:
        here, there = Pipe()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of threads: the child uses none, and no lock that one could hold
                child = os.fork()
        except OSError as error:
            raise RowError(f"the chat template cannot be rendered: no process for it ({error.strerror})") from None
        if not child:
            _serve(self.tokenizer, there)
        there.close()
        self.pipe = here
        self._end = weakref.finalize(self, _end, child, os.getpid(), here)
        return here


def _end(child: int, parent: int, pipe: Connection) -> str:
    """End the child; says what it ended of, if it had done so by itself."""
    if os.getpid() != parent:  # another fork's copy
        return ""
    with contextlib.suppress(OSError):
        pipe.close()
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return "takes too long" if status == -signal.SIGXCPU else f"ended its process ({status})"


def _serve(tokenizer: Any, pipe: Connection) -> NoReturn:
    """The child: answer until the parent has gone."""
    try:
        _leave_the_parent(pipe.fileno())
        count = 0

        def render(messages: list[Message], generate: bool) -> str:
            nonlocal count
            count += 1
            _limit(resource.RLIMIT_CPU, SECONDS + math.ceil(SECONDS_EACH * count))
            return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)

        while True:
            pipe.send_bytes(_answer(render, pipe.recv_bytes()))
    finally:
        os._exit(0)


def _leave_the_parent(keep: int) -> None:
    """Its signals, files and locks are none of the child's business, which ends when the pipe does."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # they go to a whole group; the parent decides
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGXCPU, signal.SIG_DFL)
    nothing = os.open(os.devnull, os.O_RDWR)
    for name in os.listdir("/dev/fd"):
        if int(name) not in (keep, nothing):
            with contextlib.suppress(OSError):  # that of the listing itself
                os.close(int(name))
    for standard in {0, 1, 2} - {keep}:
        os.dup2(nothing, standard)
    _limit(resource.RLIMIT_CORE, 0)


def _answer(render: Render, question: bytes) -> bytes:
    before = resource.getrlimit(resource.RLIMIT_AS)[0]
    try:
        used = Path("/proc/self/statm")  # Linux; elsewhere the time alone is bounded
        if used.exists():
            now = int(used.read_text().split()[0]) * resource.getpagesize()
            _limit(resource.RLIMIT_AS, now + BYTES + 16 * len(question))
        asked = json.loads(question)
        messages = asked["messages"]
        text = render(messages, False) if asked.get("alone") else _turns(render, messages)
        return json.dumps({"text": text}).encode()
    except RowError as error:
        reason = str(error)
    except MemoryError:
        reason = f"the chat template takes more than {BYTES / 1e6:.0f} MB of memory"
    except Exception as error:  # whatever the template's own code raises
        reason = f"the chat template refuses the conversation: {shortened(str(error))}"
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (before, resource.getrlimit(resource.RLIMIT_AS)[1]))
    return json.dumps({"error": reason}).encode()


def _limit(what: int, value: int) -> None:
    hard = resource.getrlimit(what)[1]
    resource.setrlimit(what, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def _turns(render: Render, messages: list[Message]) -> Parts:
    parts: Parts = []
    done, seen = "", 0
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        given, whole = render(messages[:i], True), render(messages[: i + 1], False)
        if not given.startswith(done) or not whole.startswith(given):
            raise RowError("the chat template renders earlier turns differently once later ones follow")
        turns = [(given[len(done) :], False), (whole[len(given) :], True)]
        for j in range(seen, i + 1):
            if not _holds(turns[j == i][0], messages[j]["content"]):
                raise RowError(f"the chat template leaves out what message {j + 1} ({messages[j]['role']}) says")
        parts += turns
        done, seen = whole, i + 1
    return parts


def _holds(rendered: str, content: str) -> bool:
    """Is the content in the text? Templates may trim and wrap it, and some write a tool's results as JSON."""
    text = _without_space(rendered)
    return any(_without_space(form) in text for form in (content, json.dumps(content, ensure_ascii=False)[1:-1]))


def _without_space(text: str) -> str:
    return "".join(text.split())
