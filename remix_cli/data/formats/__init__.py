"""Formats: from a row to a conversation. One file each.

registry.py           name -> reader; a new format is a file here and a line there
base.py               the conversation, and what readers have in common
prompt_completion.py  two templates over the columns, or two columns of messages
messages.py           chats
sharegpt.py           chats as {from, value}
alpaca.py             instruction, input and output
text.py               plain text
gsm8k.py, arc.py      data sets with columns of their own
"""

from remix_cli.data.formats.base import (
    ANSWER,
    Example,
    Message,
    Origin,
    Row,
    RowError,
    question,
    to_example,
    without_mark,
)

__all__ = ["ANSWER", "Example", "Message", "Origin", "Row", "RowError", "question", "to_example", "without_mark"]
