"""Diagnostics: plain data out of a model, tables made from it.

parameters.py  what is trained and what is active
routing.py     how the routers choose, over given rows
live.py        the same in short, for one training step
tables.py      Rich tables of both
"""
