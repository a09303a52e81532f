"""Recipes: YAML -> a frozen, complete, checked `Recipe`. Imports nothing heavy.

schema.py    the keys, their types, limits and defaults
sources.py   those of the `data` group
rules.py     what the method makes of the other keys: defaults, and which are not read
sweep_grammar.py  one file that stands for many recipes
obvious.py   the sweep that a recipe without lists stands for
machine.py   what a default depends on besides the recipe
other_names.py  keys of other tools, and what does the same here
loader.py    reads YAML and overrides; every problem at once, with line and nearest valid name
"""

from remix_cli.recipe.loader import load_recipe
from remix_cli.recipe.schema import Recipe, Task
from remix_cli.recipe.sources import Source

__all__ = ["Recipe", "Source", "Task", "load_recipe"]
