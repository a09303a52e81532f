"""Running programs that a model wrote, so that they can neither harm nor deceive us. See docs/sandbox.md.

inside.py   what runs in the two confined processes: limits, Landlock, seccomp, then the program or its test
outside.py  the parent: starts the two, waits, kills, and keeps the verdict
"""
