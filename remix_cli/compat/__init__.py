"""What other libraries do that we cannot live with, and nothing else: each workaround is one function here.

Its docstring says what is wrong, where (the library's own file and function, or its public issue), what happens
without it, and the versions it was seen with. tests/test_compat.py shows each twice: the library alone, and with the
workaround. A test that fails says that the workaround is needed no more, or works no more. A file imports its library
when a function is called, for a command imports what it uses and nothing else.

hub_kernels.py    native code that is fetched from the hub and run
transformers.py   masks, forward passes, GGUF files, experts, chatter
bitsandbytes.py   4-bit weights on a CPU, chatter
peft.py           bitsandbytes imported unasked, draws from global generators, chatter
accelerate.py     state that outlives a run
torch.py          numbers of a model that has none
tokenizers.py     control tokens that are read as such where they should be text
lm_eval.py        chatter
datasets.py       errors that are told twice
reasoning_gym.py  seeds whose rows overlap
trackio.py        the last step of a run, a run that ends twice
"""
