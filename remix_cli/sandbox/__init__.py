"""Running programs that a model wrote, so that they can neither harm nor deceive us. See docs/sandbox.md.

outside.py   the parent: starts the two processes, waits, kills, and keeps the verdict
inside.py    what runs in them: the program, and its test
confine.py   what they may do: limits, Landlock, seccomp
crossing.py  what they say to each other: plain values, calls, errors
"""
