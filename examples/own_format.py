"""A format of one's own: `ask`, `reply`, and perhaps `context` in front of the question.

Put the file into remix_cli/data/formats and the line

    "ask_reply": FormatFacts("remix_cli.data.formats.ask_reply:read"),

into registry.py there. Then `{path: rows.jsonl, format: ask_reply}` is a source like any other.
"""

from remix_cli.data.formats.base import text_of, turns


def read(row, source):
    """Raises RowError for a row without the columns."""
    ask, reply = text_of(row, "ask"), text_of(row, "reply")
    context = text_of(row, "context") if row.get("context") is not None else ""
    return turns(f"{context}\n\n{ask}" if context else ask, reply)
