"""`remix sweep`: search, choose on held-out rows, repeat under all seeds, test once, tabulate.

runner.py   the plan, carried out by worker processes; everything already done is kept
work.py     what a worker process does: train one run, score one run
record.py   sweep.json
report.py   sweep.json and the scores of the chosen runs -> one row for each arm
sweep_tables.py  that as a Rich table
"""
