"""`remix chat`."""

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from remix_cli.cli.answers import router_named, show_routing, typed, write
from remix_cli.cli.common import AnyBase, Best, MaxNewTokens, RunPath, Temperature, TopP, TrustCode, check_top_p
from remix_cli.errors import DataError, RecipeError
from remix_cli.terminal import Console

if TYPE_CHECKING:
    from remix_cli.evaluation.converse import Conversation

HELP = """\
/new           begin a new conversation
/again         another answer to the last message (with a temperature)
/base          the base model's answer beside the adapter's: on, off
/routing       the LoRAs behind every token of an answer: on, off
/system TEXT   begin anew with this system prompt; without TEXT with none
/temperature X, /top-p X   how answers are drawn; temperature 0 is greedy
/help, /quit   this list; the end (or Ctrl-D)"""


def chat(
    run: RunPath,
    system: Annotated[str | None, typer.Option("--system", metavar="TEXT", help="A system prompt.")] = None,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Of the first answer; it grows.")] = 0,
    block: Annotated[int | None, typer.Option(min=0, help="The router of /routing; by default the middle.")] = None,
    best: Best = False,
    any_base: AnyBase = False,
    trust_code: TrustCode = False,
) -> None:
    """Talk to a run, a model or a PEFT folder: it remembers the conversation; /help lists what else can be typed.

    Lines piped in are one turn each.
    """
    from remix_cli.folders import check_subject

    folder = check_subject(run, best=best)
    check_top_p(top_p, temperature)
    routed = folder.load_recipe().adapter_config().routed
    if block is not None and not routed:
        raise RecipeError("--block: there is no router here")
    from remix_cli.evaluation.converse import NO_TEMPLATE, Conversation
    from remix_cli.evaluation.generate import Decoding
    from remix_cli.runs import load_subject

    loaded = load_subject(run, best=best, any_base=any_base, trust_code=trust_code)
    router = router_named(loaded, block) if routed else None
    decoding = Decoding(max_new_tokens, temperature, top_p=top_p)
    conversation = Conversation(loaded, decoding, system, seed=seed)
    conversation.check()
    interactive = sys.stdin.isatty()
    if not loaded.encoder.chat:
        print(NO_TEMPLATE, file=sys.stderr)
    if interactive:
        print("/help lists what else can be typed.")
    talk = _Talk(conversation, router, interactive)
    for line in typed(interactive):
        if line in ("/quit", "/exit"):
            break
        talk.hear(line)


class _Talk:
    """One person at it: what is shown beside the answers."""

    def __init__(self, conversation: "Conversation", router: str | None, interactive: bool):
        self.conversation, self.router, self.interactive = conversation, router, interactive
        self.beside_base, self.routing = False, False
        self.commands: dict[str, Callable[[str], None]] = {
            "/new": self._new,
            "/again": self._again,
            "/base": self._base,
            "/routing": self._routing,
            "/system": self._system,
            "/temperature": self._temperature,
            "/top-p": self._top_p,
            "/help": lambda _: print(HELP),
        }

    def hear(self, line: str) -> None:
        """A message or a command. Raises DataError where nobody is there to mend it."""
        name, _, rest = line.partition(" ")
        try:
            if name in self.commands:
                self.commands[name](rest.strip())
            elif line.startswith("/"):
                raise DataError(f"{name}: no such command; /help lists them")
            else:
                self.conversation.ask(line)
                self._answer()
        except DataError as error:
            if not self.interactive:
                raise
            print(f"error: {error}", file=sys.stderr)

    def _answer(self) -> None:
        """Ctrl-C ends the answer, not the conversation; it is as if it had not been asked for."""
        conversation = self.conversation
        try:
            if self.beside_base:
                found, base = conversation.reply(_nowhere), conversation.reply(_nowhere, base=True)
                self._show_both(found.text, base.text)
            else:
                found = conversation.reply(write)
                print()
        except KeyboardInterrupt:
            if not self.interactive:
                raise
            print("\n(stopped; /again asks for it anew)")
            return
        conversation.keep(found)
        if self.routing and self.router is not None:
            show_routing(conversation.run, found, self.router)

    def _show_both(self, adapter: str, base: str) -> None:
        table = Table("adapter", "base model", box=None, expand=True, padding=(0, 2, 0, 0))
        table.columns[0].ratio = table.columns[1].ratio = 1
        table.add_row(adapter.strip(), base.strip())
        Console().print(table)

    def _new(self, _: str) -> None:
        self.conversation.begin(self.conversation.system)
        self._say("a new conversation")

    def _again(self, _: str) -> None:
        if not self.conversation.reopen():
            raise DataError("/again: nothing was asked yet")
        if not self.conversation.decoding.temperature:
            self._say("at temperature 0 the answer is the same; /temperature 0.7 draws others")
        self._answer()

    def _base(self, _: str) -> None:
        self.beside_base = not self.beside_base
        self._say(f"the base model's answer beside the adapter's: {_on(self.beside_base)}")

    def _routing(self, _: str) -> None:
        if self.router is None:
            raise DataError("/routing: there is no router here")
        self.routing = not self.routing
        self._say(f"the LoRAs behind every token: {_on(self.routing)}")

    def _system(self, text: str) -> None:
        before = self.conversation.system, self.conversation.turns
        self.conversation.begin(text or None)
        try:
            self.conversation.check()
        except DataError:
            self.conversation.system, self.conversation.turns = before
            raise
        self._say(f"a new conversation, {'with this' if text else 'without a'} system prompt")

    def _temperature(self, text: str) -> None:
        self._decode(temperature=_number("/temperature", text, 0, 5))

    def _top_p(self, text: str) -> None:
        self._decode(top_p=_number("/top-p", text, 0.01, 1))

    def _decode(self, **changed: float) -> None:
        self.conversation.decoding = replace(self.conversation.decoding, **changed)  # type: ignore[arg-type]
        now = self.conversation.decoding
        self._say(f"temperature {now.temperature:g}, top-p {now.top_p:g}" if now.temperature else "greedy")

    def _say(self, text: str) -> None:
        """About the talk, which is no part of it."""
        print(f"({text})", file=sys.stdout if self.interactive else sys.stderr)


def _on(value: bool) -> str:
    return "on" if value else "off"


def _number(command: str, text: str, low: float, high: float) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not low <= value <= high:
        raise DataError(f"{command}: give a number from {low:g} to {high:g}")
    return value


def _nowhere(text: str) -> None:
    """For an answer that is shown when it is whole."""
