"""Taking a trained adapter elsewhere.

request.py        what the flags of `remix export` ask for
export_run.py     `remix export` from start to end
holds.py          which format can hold which method
hf.py             the routed model as a Hugging Face folder; modeling_remix.py is the code that goes with it
merged_formats.py  one LoRA in place of the pool, as a PEFT folder or in the weights
nearest_lora.py   that LoRA: fitted on training rows, priced on held-out ones
selected.py       the exact merge for one prompt, where a sequence has one selection
peft_folder.py    what PEFT knows, as its own folder
peft_experts.py   n stock PEFT LoRA folders and the router beside them
readback.py       what was written, loaded again, gives the run's logits
hub.py            the upload, if asked for
card.py           the README of what was exported
"""
