"""Diagnostics: plain data out of a model, tables made from it.

parameters.py  what is trained and what is active
routing.py     how the routers choose, over given rows
tables.py      Rich tables of both
"""
