"""Training. `trainer.train` is the way in; from there on the files are in the order of a run.

told_formats.py the formats that a recipe leaves out
prepare.py      refusals that cost nothing
preview.py      what `remix validate` shows
memory.py       what a step takes, by formula
by_shape.py     and of a base that is out of reach, by its published shape
setup.py        from a recipe to everything a run needs, one frozen value
resume.py       may this run go on from what another process left?
shard.py        the base model shared out over the processes
begin.py        what a run begins from: adapter.init_from
trainer.py      the run: steps, held-out loss, checkpoints, signals
rate_range.py   a short run whose learning rate grows, to suggest one
run_size.py     how large a run will be
cluster_prompts.py  the prompts' clusters, found before the first step
micro_batch.py  a recipe's words to the library's step; the gradients of one micro-batch
step_graphs.py  the same by CUDA graph
sums.py         what a step's micro-batches add up to, over all processes
gradient_sums.py  the gradients added up over the processes, while the last backward pass runs
optim.py        parameter groups, schedule, clipping
pace.py         how fast
held_out.py     the held-out loss and tasks between steps
checkpoints.py  durable training state
stopping.py     when a run has waited long enough for something better
record.py       metrics.jsonl, the same for trackers, summary.json
trackers.py     every step to every tracker, once
tracker_tools.py  the trackers: how each is opened, and what it holds already
signals.py      SIGTERM and Ctrl-C
console.py      what a person sees while it runs
lines.py        lines that fit the screen
budget.py       `remix budget`: how large each method is for equal parameters
"""
