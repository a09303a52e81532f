"""Data: the only room that knows prompts.

sources.py   rows from the hub, local files or reasoning-gym
files.py     rows from one file
formats/     a row -> a conversation whose assistant turns are to be learnt
control.py   control tokens that a text spells out stay text
template.py  a conversation -> text, by a chat template that is bounded
turns.py     which stretches of that text are the assistant's
prompts.py   a file of prompts -> conversations to be answered
encode.py    a conversation -> token ids and which of them are supervised
rows.py      encoded rows as long arrays
cache.py     encoded rows kept on disk
said.py      whether two conversations say the same
splits.py    what is trained on and what is held out
chunks.py    many rows, as many at a time as memory holds
batches.py   which rows make up which step, on which rank; padding
"""
