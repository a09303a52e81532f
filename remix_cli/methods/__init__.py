"""Every finetuning method behind one interface: our pools, and PEFT's adapters as baselines. One file a method.

base.py          what a method declares of itself; no torch
registry.py      the methods by name
apply.py         config -> adapter in place on a model
pooled.py        what pools of ours have in common: remix.py, mixlora.py, hydralora.py, lora.py, rslora.py,
                 and over the modules of a layer milora.py, remix_modules.py,
                 with paths between layers reslora.py
peft_base.py     what `peft` provides, its adapters behind our interface in peft_adapter.py: dora.py, ia3.py, vblora.py
peft_given.py    anyone's PEFT adapter, from its folder, to be evaluated
virtual.py       trained vectors in front of the sequence, by `peft`: prefix.py, prompt.py, p_tuning.py
none.py          the base model
"""
