"""A causal language model with a routed pool of LoRAs on its linear layers (ReMix, arXiv 2603.10160), for inference.

Self-contained: needs torch, transformers and safetensors. Written by `remix export --format hf`; load it with

    AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)

For each token every block's router takes the k LoRAs with the largest P x and adds omega B_i A_i x for each of them.
Routing depends on the input, so the LoRAs cannot be merged into the weights.

What an inference engine that builds on transformers' models needs is kept here: AutoModel is the network without its
head; all matrices but the routers' are plain nn.Linear modules under names of their own; routers decide inside the
forward pass of the block that they belong to, without hooks, and keep float32.
"""

import functools
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaForCausalLM as Base  # the base model's own classes
from transformers import LlamaModel as BaseModel


class RemixRouter(nn.Module):
    """gates (..., n r) for x (..., D): omega for the r columns of each chosen LoRA, 0 for the others.

    P stays in float32 whatever type the model is loaded in or moved to: rounded, it would choose other LoRAs.
    """

    def __init__(self, width, c, device=None):
        super().__init__()
        self.c = c
        new = functools.partial(torch.empty, dtype=torch.float32, device=device)
        self.weight = nn.Parameter(new(c["pool_size"], width))
        if c["clusters"]:  # then x is the mean over a prompt, and P reads the nearest of these centres instead
            self.common = nn.Parameter(new(width))
            self.centres = nn.Parameter(new(c["clusters"], width))
        self.gates = None

    def _apply(self, fn, recurse=True):
        exact = {name: parameter.data for name, parameter in self.named_parameters()}
        super()._apply(fn, recurse)
        for name, parameter in self.named_parameters():
            if parameter.dtype != torch.float32:
                parameter.data = exact[name].to(parameter.device, torch.float32)
        return self

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            x = self.nearest_centre(x.float()) if self.c["clusters"] else x.float()
            logits = F.linear(x, self.weight.float())  # |x| > 0 changes no order, so it is left out
        chosen = logits.topk(self.c["active"], dim=-1).indices
        weights = torch.zeros_like(logits).scatter_(-1, chosen, self.c["scale"])
        return weights.repeat_interleave(self.c["rank"], -1)

    def nearest_centre(self, x):
        prompts = F.normalize(x, dim=-1) - self.common.float()  # whose length changes no order either
        return self.centres.float()[(prompts @ self.centres.float().T).argmax(-1)]


class RemixLinear(nn.Module):
    """y = W x + sum over the chosen i of omega B_i A_i x, the pool stacked: lora_A is (n r, D_in), lora_B (D_out, n r).

    Under the base layer's own name, `weight`, lies a single number that nothing reads. By its shape the base model's
    class refuses the folder, which it would otherwise load without the pool.
    """

    def __init__(self, base, c, router):
        super().__init__()
        device, stacked = base.weight.device, c["pool_size"] * c["rank"]
        self.weight = nn.Parameter(torch.zeros(1, device=device), requires_grad=False)
        self.base = base
        self.lora_A = nn.utils.skip_init(nn.Linear, base.in_features, stacked, bias=False, device=device)
        self.lora_B = nn.utils.skip_init(nn.Linear, stacked, base.out_features, bias=False, device=device)
        self.routes_itself = c["scope"] == "module"
        if self.routes_itself:
            self.remix_router = router
        else:
            object.__setattr__(self, "remix_router", router)  # the block's own

    def forward(self, x):
        router = self.remix_router
        gates = _route(router, x) if self.routes_itself else router.gates
        return self.base(x) + self.lora_B(self.lora_A(x) * gates.to(x.dtype))


class _RoutedBlock:
    """Before the block's own class: its router decides, then the block computes."""

    def forward(self, *args, **kwargs):
        router = self.remix_router
        router.gates = _route(router, args[0] if args else kwargs["hidden_states"])
        output = super().forward(*args, **kwargs)
        if router.c["scope"] == "block":  # a router of the whole model serves the blocks that follow, too
            router.gates = None
        return output


@functools.cache
def _routed(block):
    return type(f"Remix{block.__name__}", (_RoutedBlock, block), {})


def _route(router, x):
    state = router.state
    if state is None:
        return router(x)
    if state.prompt is not None:  # the first pass: one selection for the sequence, from the mean over its prompt
        share = state.prompt / state.prompt.sum(-1, keepdim=True)
        state.kept[router] = router(share.to(x.device).unsqueeze(1) @ x.float())
    return state.kept[router]


class _Selection:
    """With one selection for a sequence: what the prompt chose, until the next prompt."""

    def __init__(self):
        self.prompt, self.kept = None, {}


def _install(model, c, prefix=""):
    """Put pools and routers in place of the targets, without values; `prefix` is missing from the names of `model`."""
    state = _Selection() if c["level"] == "sequence" else None
    routers = {}
    for name in (name.removeprefix(prefix) for name in c["linears"]):
        parent, _, child = name.rpartition(".")
        block = model.get_submodule(parent)
        base = block.get_submodule(child)
        owner = name if c["scope"] == "module" else parent
        if c["scope"] == "model":  # the first block's, for all
            owner = next(iter(routers), owner)
        if owner not in routers:
            width = base.in_features if c["scope"] == "module" else model.config.get_text_config().hidden_size
            routers[owner] = RemixRouter(width, c, base.weight.device)
            object.__setattr__(routers[owner], "state", state)
            if c["scope"] != "module":
                block.add_module("remix_router", routers[owner])
                block.__class__ = _routed(type(block))
        setattr(block, child, RemixLinear(base, c, routers[owner]))
    return state


class RemixConfig(Base.config_class):
    """The base model's, under a type of its own: transformers without this code must not take the folder for that."""

    model_type = f"remix_{Base.config_class.model_type}"


class _Remix:
    """What the network with its head and without it have in common."""

    config_class = RemixConfig
    # Read by transformers, and by engines that make the parameters themselves
    _keep_in_fp32_modules_strict = sorted(
        {*(getattr(Base, "_keep_in_fp32_modules_strict", None) or ()), "remix_router"}
    )

    def __init__(self, config, *args, **kwargs):
        if config.remix.get("base_model"):
            raise ValueError(
                "this folder names its base model and does not hold its weights: load it with "
                "AutoModelForCausalLM.from_pretrained, or export it again without --reference-base"
            )
        super().__init__(config, *args, **kwargs)

    def _init_weights(self, module):
        if not isinstance(module, RemixRouter):  # all values come from the files
            super()._init_weights(module)


class RemixModel(_Remix, BaseModel):
    """Hidden states instead of logits: from this class engines build the model, around attention and head of theirs."""

    def __init__(self, config, *args, **kwargs):
        if config.remix["level"] == "sequence":
            raise ValueError(
                "this model routes by sequence, for which it must know the prompt's end, and nothing tells it here: "
                "serve it with `transformers serve`, or as one LoRA (remix export RUN --format peft-merged)"
            )
        super().__init__(config, *args, **kwargs)
        _install(self, config.remix, f"{Base.base_model_prefix}.")


class RemixForCausalLM(_Remix, Base):
    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        self._selection = _install(self, config.remix)

    @functools.wraps(Base.forward)
    def forward(self, *args, **kwargs):
        if self._selection is None:
            return super().forward(*args, **kwargs)
        if kwargs.get("cu_seq_lens_q") is not None:
            raise ValueError(
                "this model routes by sequence, and cannot tell sequences apart that are laid end to end; serve it "
                "without continuous batching"
            )
        cache = kwargs.get("cache", kwargs.get("past_key_values"))  # its name since transformers 5.24, and before
        ids = kwargs.get("input_ids", args[0] if args else None)
        self._selection.prompt = None
        if cache is None or int(cache.get_seq_length()) == 0:
            mask = kwargs.get("attention_mask")
            known = mask is not None and mask.dim() == 2
            self._selection.prompt = mask.float() if known else torch.ones(ids.shape, device=ids.device)
        return super().forward(*args, **kwargs)

    @classmethod
    def from_pretrained(cls, path, *args, config=None, **kwargs):
        """As always; where the folder names its base model instead of holding its weights, those are fetched first."""
        if config is None or not config.remix.get("base_model"):
            return super().from_pretrained(path, *args, config=config, **kwargs)
        if not Path(path).is_dir():
            raise ValueError(f"{path}: an adapter that refers to its base model must be a local folder")
        for name in ("trust_remote_code", "code_revision", "_commit_hash", "_from_auto"):
            kwargs.pop(name, None)
        tensors = load_file(Path(path) / "remix.safetensors")
        model = Base.from_pretrained(config.remix["base_model"], *args, **kwargs)
        if any(parameter.is_meta for parameter in model.parameters()):
            raise ValueError(f"{path}: to keep layers on the host or on disk, export with the base model's weights")
        model.__class__, model.config.remix = cls, config.remix
        dtype = model.dtype
        model._selection = _install(model, config.remix)  # each part where its base layer is
        parameters = dict(model.named_parameters())
        for name, tensor in tensors.items():
            own = torch.float32 if "remix_router" in name else dtype
            parameters[name].data = tensor.to(parameters[name].device, own)
        return model.eval()
