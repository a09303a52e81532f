"""Taking a trained adapter elsewhere.

holds.py          which format can hold which method
hf.py             the routed model as a Hugging Face folder; modeling_remix.py is the code that goes with it
merged.py         one LoRA in place of the pool, as a PEFT folder or in the weights; merge.py fits and prices it
selected.py       the exact merge for one prompt, where a sequence has one selection
peft_folder.py    what PEFT knows, as its own folder
readback.py       what was written, loaded again, gives the run's logits
hub.py            the upload, if asked for
peft_experts.py   n stock PEFT LoRA folders and the router beside them
card.py           the README of what was exported
"""
