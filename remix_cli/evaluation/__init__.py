"""Evaluation with routed top-k inference. See docs/evaluation.md.

nll.py         the loss of rows
generate.py    batched generation with the KV cache
decoding_graphs.py  decoding by CUDA graph
converse.py    `remix generate` and `remix chat`: answers as they are written
headroom.py    `remix route-stats --headroom`: what routing is worth, and what is left to gain
answers.py     the per-example files, which an interrupted evaluation continues
score_folder.py  `remix eval` from its flags to scores
request.py     what the flags ask for
evaluator.py   scores the tasks, keeps every answer, stamps the report
harness.py     `--lm-eval`: tasks of lm-evaluation-harness on the loaded model
harness_model.py    the model as the harness asks it
harness_scores.py   what the harness found, as results of our own
crew.py        several processes that score together
report.py      what it writes: scores, and the stamp of how they were made
evaluated.py   that read back, with the lines of every item
statistics.py  intervals and paired differences
compare.py     `remix compare`
score_tables.py  Rich tables of both
"""
