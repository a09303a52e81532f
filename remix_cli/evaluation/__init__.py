"""Evaluation with routed top-k inference. See docs/evaluation.md.

nll.py         the loss of rows
generate.py    batched generation with the KV cache
decoding_graphs.py  decoding by CUDA graph
converse.py    `remix generate`: one prompt, answered as it is written
headroom.py    `remix route-stats --headroom`: what routing is worth, and what is left to gain
answers.py     the per-example files, which an interrupted evaluation continues
evaluator.py   `remix eval` from start to end, and the stamp
request.py     what its flags ask for
statistics.py  intervals and paired differences
compare.py     `remix compare`
score_tables.py  Rich tables of both
"""
