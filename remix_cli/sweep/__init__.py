"""`remix sweep`: search, choose on held-out rows, repeat under all seeds, test once, tabulate.

runner.py   the plan, carried out by worker processes; everything already done is kept
pool.py     those processes
work.py     what a worker process does: train one run, score one run
size.py     how many steps and tokens the runs have
forecast.py  how long they will take
record.py   sweep.json
report.py   sweep.json and the scores of the chosen runs -> one row for each arm
differences.py  how far arms are apart, with intervals and in words
decision.py  which arm to take
words.py        what scores are called
sweep_tables.py  all that as Rich tables and sentences
outcome.py  the recipe of that arm, and the file that a plain recipe stands for
"""
