"""Diagnostics: plain data out of a model, tables made from it.

parameters.py  what is trained and what is active
route_stats.py  how the routers choose, over given rows
health.py      does the mixture work, and a watch over a run
history.py     routing over the steps of a run, from its metrics.jsonl
view.py        what `remix route-stats` collects and shows
plots.py       figures
page.py        one page for a browser
routing_tables.py  Rich tables of both
"""
