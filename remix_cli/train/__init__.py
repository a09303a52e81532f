"""Training.

    prepare.py      recipe -> checked data, model, adapter; the refusals that cost nothing come first
    step.py         the gradients of one micro-batch: M sampled forward passes, LoRA and router gradients
    loop.py         steps, evaluation, checkpoints, signals
    optim.py        parameter groups, schedule, clipping, the one all-reduce of a step
    checkpoints.py  durable training state
    console.py      what a person sees while it runs
"""
