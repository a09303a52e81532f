"""Lines that fit the screen: broken between words, what follows indented below what it belongs to."""

import re
import textwrap

from rich.console import Console

# A label of one or two words and the spaces behind it, as in `held out  10 rows`.
_LABEL = re.compile(r" *\S+(?: \S+)? {2,}")
_WIDEST_LABEL = 20


def fitted(text: str, width: int) -> str:
    """The text in lines of at most `width` columns; a word that is longer, such as a path, stays whole."""
    return "\n".join(_fitted(line, width) for line in text.split("\n"))


def _fitted(line: str, width: int) -> str:
    if len(line) <= width:
        return line
    label = _LABEL.match(line)
    inset = len(line) - len(line.lstrip()) + 2
    if label and label.end() <= _WIDEST_LABEL:
        inset = label.end()
    wrapper = textwrap.TextWrapper(
        width, subsequent_indent=" " * inset, break_long_words=False, break_on_hyphens=False, expand_tabs=False
    )
    return wrapper.fill(line)


def say(console: Console, text: str) -> None:
    """Print it so, at once: a log that is a file shows it as soon as it is said."""
    console.print(fitted(text, console.width), highlight=False, soft_wrap=True)
    console.file.flush()


def shows_progress(console: Console) -> bool:
    """Can a bar move there? On a terminal and in a notebook; a file would hold every state of it."""
    return console.is_terminal or console.is_jupyter
