"""Taking a trained adapter elsewhere.

peft_experts.py   n stock PEFT LoRA folders and the router beside them
"""
