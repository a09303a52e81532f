"""What `remix eval` and training can score: one file a task.

registry.py       name -> class; a new task is a file here and a line there
base.py           what a task declares of itself, and what it gets for it: data, generation, likelihoods, scores
held_out_loss.py  nll: cross-entropy of any rows
exact_match.py    own rows by generation: is the answer, or what an expression finds in it, a reference?
choice.py         own rows by likelihood: which of the options in a row's columns?
options.py        what tasks have in common that compare options
gsm8k.py          arithmetic by generation, strict and flexible match
arc.py            multiple choice by likelihood, by letter and by text
humaneval.py      programs, run in the sandbox, pass@k
reasoning_gym.py  the package's tasks with their own verifiers

Whatever is heavy is imported where it is used, because recipes are checked against these classes without torch.
"""
