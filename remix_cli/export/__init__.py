"""Taking a trained adapter elsewhere.

hf.py             the routed model as a Hugging Face folder; modeling_remix.py is the code that goes with it
merged.py         one LoRA in place of the pool, as a PEFT folder or in the weights; merge.py fits and prices it
peft_experts.py   n stock PEFT LoRA folders and the router beside them
card.py           the README of what was exported
"""
