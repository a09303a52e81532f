"""Training.

prepare.py      refusals that cost nothing
preview.py      what `remix validate` shows
step.py         the gradients of one micro-batch: M sampled forward passes, LoRA and router gradients
cluster_prompts.py  the prompts' clusters, found before the first step
loop.py         steps, evaluation, checkpoints, signals
optim.py        parameter groups, schedule, clipping, the one all-reduce of a step
held_out.py     the held-out loss and tasks between steps
step_graphs.py  steps by CUDA graph
shard.py        the base model shared out over the processes
resume.py       may this run go on from what another process left?
budget.py       `remix budget`: how large each method is for equal parameters
checkpoints.py  durable training state
record.py       metrics.jsonl, tracker, summary.json
signals.py      SIGTERM and Ctrl-C
console.py      what a person sees while it runs
"""
