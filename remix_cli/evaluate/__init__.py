"""Evaluation with routed top-k inference.

nll.py      token-weighted loss and perplexity of held-out rows
gsm8k.py    greedy generation, exact match of the final number
generate.py batched generation with the KV cache
run.py      the tasks of `remix eval`, their files and their stamp
"""
