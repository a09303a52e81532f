"""Every finetuning method behind one interface: our pools, and PEFT's adapters as baselines.

apply.py         config -> adapter in place on a model
peft_adapter.py  what `peft` provides: DoRA, (IA)^3, VB-LoRA, prefix and prompt tuning, P-tuning
"""
