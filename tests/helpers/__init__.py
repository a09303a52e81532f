"""What tests share: nothing here is a test.

common.py   where things lie, the one comparison of tensors, a process of its own
tiny.py     tiny models, tokenizers and recipes
recipes.py  the least recipe, changed key by key
methods.py  every method at a size for tiny models
steps.py    one training step, cut into micro-batches
runs.py     training runs, in one process or several
"""
