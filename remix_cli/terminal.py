"""The console of every command: text that others wrote is shown, never obeyed.

Keys, paths, prompts, rows and answers may hold escape sequences, square brackets that look like Rich's markup, or
`:names:` of emoji. `streams.Output` makes the first visible in everything that is printed; here Rich's own sequences
(colours, a bar that moves) find their way past it.
"""

from collections.abc import Iterable
from typing import IO, Any

import rich.console
from rich.console import ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from remix_cli.streams import visible


class Console(rich.console.Console):
    """Rich's, without markup and emoji, and with nothing but Rich's own control sequences."""

    def __init__(self, **options: Any):
        super().__init__(markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Of whatever is printed or stands in a table; made visible before it is measured."""
        return super().render_str(visible(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Of texts that were made elsewhere, too."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=visible(segment.text))

    def _past_the_filter(self) -> IO[str]:
        file = rich.console.Console.file.fget(self)  # type: ignore[attr-defined]
        return getattr(file, "as_it_is", file)

    file = property(_past_the_filter, rich.console.Console.file.fset)  # type: ignore[attr-defined]
