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
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from datetime import date, datetime
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

from remix_cli.data.formats import Message, RowError, without_mark
from remix_cli.data.formats.base import Conversation
from remix_cli.data.turns import Part, rows_of
from remix_cli.errors import shortened
from remix_cli.recipe.sources import Data

# A rendering takes well under a millisecond; the first one compiles the template, in a few hundredths of a second.
SECONDS, SECONDS_EACH = 1, 0.05
BYTES = 64_000_000
WAIT = 120  # seconds, for a machine that is busy with other things
AHEAD = 32_768  # bytes of questions that wait for the child: less than a pipe holds, so that asking never blocks

DIRECTIVES = [*(f"%-{one}" for one in "dmyHIMSj"), *(f"%{one}" for one in "aAwdbBmyYHIpMSfjUWcxXGuVDFTeh"), "%%"]


def writes_date(tokenizer: Any) -> bool:
    """Does the chat template ask what day it is? Those of Llama 3.2, SmolLM3 and gpt-oss do."""
    return "strftime_now" in str(tokenizer.chat_template or "")


def clock_stopped_at(day: str) -> str:
    """What to put in front of a template for `strftime_now` to be of `day`, at midnight: a macro of that name.

    transformers passes data to templates, no functions, so the format is filled in by the template's own language. The
    empty expression at the end keeps a line break that the template may begin with.
    """
    then = datetime.fromisoformat(day)
    filled = "".join(f" | replace('{one}', '{then.strftime(one)}')" for one in DIRECTIVES)
    return f"{{% macro strftime_now(format) %}}{{{{ format{filled} }}}}{{% endmacro %}}{{{{ '' }}}}"


def day_for(tokenizer: Any, data: Data) -> str | None:
    """Today, for a recipe's `data` whose rows the chat template writes the date into; else None."""
    return str(date.today()) if data.use_chat_template is not False and writes_date(tokenizer) else None


class Template:
    """Renders a tokenizer's chat template."""

    def __init__(self, tokenizer: Any, settings: dict[str, Any], day: str | None = None):
        """`settings` are passed on to the template, which may read some (`enable_thinking` of several).

        `day`, YYYY-MM-DD: what it takes for today; None: today.
        """
        self.tokenizer, self.settings, self.day = tokenizer, settings, day
        self.pipe: Connection | None = None  # to the child, once there is one
        self._end: Callable[[], str | None] = lambda: None  # ends the child
        self.refusal = ""  # what it died of

    def rows(self, conversations: Iterable[tuple[Conversation, Conversation | None]]) -> Generator[list[list[Part]]]:
        """Each one's text, in one row or in one for each learnt turn (turns.py). Raises RowError.

        Beside a conversation may stand another of its form, which is to be rendered in front of it. Takes some
        conversations ahead of the answers that it gives.
        """
        for rows in self._ask({"conversation": said, "alike": alike} for said, alike in conversations):
            yield [_parts(row) for row in rows]

    def scaffold(self) -> str:
        """What is written around a user's turn, as far as the template takes one alone."""
        try:
            (text,) = self._ask([{"messages": [{"role": "user", "content": ""}], "alone": True}])
        except RowError:
            return ""
        return text

    def _ask(self, questions: Iterable[dict[str, Any]]) -> Iterator[Any]:
        """The answers in order; some questions are sent ahead, for two processes that wait for one another are slow."""
        waiting: deque[int] = deque()  # sizes of the questions without an answer so far
        try:
            for question in questions:
                text = json.dumps(question).encode()
                while waiting and sum(waiting) + len(text) > AHEAD:
                    yield self._next_answer(waiting)
                waiting.append(len(text))
                self._send(text)
            while waiting:
                yield self._next_answer(waiting)
        finally:
            if waiting and self.pipe:  # their answers would be taken for those to the next questions
                self._end()
                self.pipe = None

    def _send(self, question: bytes) -> None:
        if self.refusal:
            raise RowError(self.refusal)
        pipe = self.pipe or self._start()
        try:
            pipe.send_bytes(question)
        except OSError:
            self._refuse()

    def _next_answer(self, waiting: deque[int]) -> Any:
        assert self.pipe is not None
        try:
            if not self.pipe.poll(WAIT):
                raise EOFError
            answer = json.loads(self.pipe.recv_bytes())
        except (EOFError, OSError):
            self._refuse()
        waiting.popleft()
        if "error" in answer:
            raise RowError(answer["error"])
        return answer["text"]

    def _refuse(self) -> NoReturn:
        self.refusal = f"the chat template {self._end()}"
        self.pipe = None
        raise RowError(self.refusal)

    def _start(self) -> Connection:
        here, there = Pipe()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of threads: the child uses none, and no lock that one could hold
                child = os.fork()
        except OSError as error:
            raise RowError(f"the chat template cannot be rendered: no process for it ({error.strerror})") from None
        if not child:
            _serve(self.tokenizer, self.settings, self.day, there)
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
    _, waited = os.waitpid(child, 0)
    status = os.waitstatus_to_exitcode(waited)
    if status == -signal.SIGXCPU:
        return "takes too long"
    return f"ended its process ({status})"


def _serve(tokenizer: Any, settings: dict[str, Any], day: str | None, pipe: Connection) -> NoReturn:
    """The child: answer until the parent has gone."""
    clock = "" if day is None else clock_stopped_at(day)
    try:
        _leave_the_parent(pipe.fileno())
        count = 0

        def render(messages: list[Message], generate: bool, tools: list[Any] | None) -> str:
            nonlocal count
            count += 1
            _limit(resource.RLIMIT_CPU, SECONDS + math.ceil(SECONDS_EACH * count))
            shown = [without_mark(message) for message in messages]
            template = clock + tokenizer.get_chat_template(None, tools) if clock else None
            return tokenizer.apply_chat_template(
                shown, tools=tools, chat_template=template, tokenize=False, add_generation_prompt=generate, **settings
            )

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


def _answer(render: Callable[..., str], question: bytes) -> bytes:
    before, _ = resource.getrlimit(resource.RLIMIT_AS)
    try:
        used = Path("/proc/self/statm")  # Linux; elsewhere the time alone is bounded
        if used.exists():
            now = int(used.read_text().split()[0]) * resource.getpagesize()
            _limit(resource.RLIMIT_AS, now + BYTES + 16 * len(question))
        asked = json.loads(question)
        text: str | list[list[Part]]
        if asked.get("alone"):
            text = render(asked["messages"], False, None)
        else:
            if asked["alike"]:
                _rows(render, *asked["alike"])
            text = _rows(render, *asked["conversation"])
        return json.dumps({"text": text}).encode()
    except RowError as error:
        reason = str(error)
    except MemoryError:
        reason = f"the chat template takes more than {BYTES / 1e6:.0f} MB of memory"
    except Exception as error:  # whatever the template's own code raises
        reason = f"the chat template refuses the conversation: {shortened(str(error))}"
    finally:
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (before, hard))
    return json.dumps({"error": reason}).encode()


def _limit(what: int, value: int) -> None:
    _, hard = resource.getrlimit(what)
    if hard != resource.RLIM_INFINITY:
        value = min(value, hard)
    resource.setrlimit(what, (value, hard))


def _parts(row: list[Any]) -> list[Part]:
    return [Part(*part) for part in row]


def _rows(render: Callable[..., str], messages: list[Message], tools: list[Any]) -> list[list[Part]]:
    """Templates want the arguments of a tool call as an object, some as JSON text."""

    def with_tools(shown: list[Message], generate: bool) -> str:
        return render(shown, generate, tools or None)

    try:
        return rows_of(with_tools, messages, tools)
    except (RowError, MemoryError):
        raise
    except Exception:
        if not any("tool_calls" in message for message in messages):
            raise
    return rows_of(lambda shown, generate: with_tools(_with_arguments_as_text(shown), generate), messages, tools)


def _with_arguments_as_text(messages: list[Message]) -> list[Message]:
    changed = []
    for message in messages:
        calls = []
        for call in message.get("tool_calls", []):
            function = call["function"]
            text = json.dumps(function["arguments"], ensure_ascii=False)
            calls.append(call | {"function": function | {"arguments": text}})
        changed.append(message | {"tool_calls": calls} if calls else message)
    return changed
