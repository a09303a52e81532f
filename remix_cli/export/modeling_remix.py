"""A causal language model with a routed pool of LoRAs on its linear layers (ReMix, arXiv 2603.10160), for inference.

Self-contained: needs torch, transformers and safetensors. Written by `remix export --format hf`; load it with

    AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)

For each token every block's router takes the k LoRAs with the largest P x and adds omega B_i A_i x for each of them.
Routing depends on the input, so the LoRAs cannot be merged into the weights.
"""

import functools
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaForCausalLM as Base  # the base model's own class


class RemixRouter(nn.Module):
    """gates (..., n r) for x (..., D): omega for the r columns of each chosen LoRA, 0 for the others; P in float32."""

    def __init__(self, width, c):
        super().__init__()
        self.c = c
        self.weight = nn.Parameter(torch.empty(c["pool_size"], width, dtype=torch.float32))
        if c["clusters"]:  # then x is the mean over a prompt, and P reads the nearest of these centres instead
            self.common = nn.Parameter(torch.empty(width, dtype=torch.float32))
            self.centres = nn.Parameter(torch.empty(c["clusters"], width, dtype=torch.float32))
        self.gates = None

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
    """y = W x + sum over the chosen i of omega B_i A_i x, the pool stored stacked: A (n r, D_in), B (D_out, n r).

    W is (1, D_out, D_in), a shape that the base model's own class refuses to load, for it would leave the pool out;
    and this is no nn.Linear, which libraries that quantise would replace, pool and all.
    """

    def __init__(self, base, c, router):
        super().__init__()
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight = nn.Parameter(torch.empty(1, base.out_features, base.in_features))
        self.bias = None if base.bias is None else nn.Parameter(torch.empty(base.out_features))
        stacked = c["pool_size"] * c["rank"]
        self.lora_A = nn.Parameter(torch.empty(stacked, base.in_features))
        self.lora_B = nn.Parameter(torch.empty(base.out_features, stacked))
        self.routes_itself = c["scope"] == "module"
        if self.routes_itself:
            self.remix_router = router
        else:
            object.__setattr__(self, "remix_router", router)  # the block's own

    def forward(self, x):
        router = self.remix_router
        gates = _route(router, x) if self.routes_itself else router.gates
        down = F.linear(x, self.lora_A.to(x.dtype)) * gates.to(x.dtype)
        return F.linear(x, self.weight[0], self.bias) + F.linear(down, self.lora_B.to(x.dtype))


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


def _install(model, c):
    """Put pools and routers in place of the targets, without values."""
    state = _Selection() if c["level"] == "sequence" else None
    routers = {}
    for name in c["linears"]:
        parent, _, child = name.rpartition(".")
        base = model.get_submodule(name)
        owner = name if c["scope"] == "module" else parent
        if c["scope"] == "model":  # the first block's, for all
            owner = next(iter(routers), owner)
        if owner not in routers:
            width = base.in_features if c["scope"] == "module" else model.config.get_text_config().hidden_size
            routers[owner] = RemixRouter(width, c)
            object.__setattr__(routers[owner], "state", state)
            if c["scope"] != "module":
                _attach(model.get_submodule(owner), routers[owner], c["scope"] == "block")
        setattr(model.get_submodule(parent), child, RemixLinear(base, c, routers[owner]))
    return state


def _attach(block, router, forgets):
    def before(_, args, kwargs):
        router.gates = _route(router, args[0] if args else kwargs["hidden_states"])

    def after(_, args, output):
        router.gates = None

    block.add_module("remix_router", router)
    block.register_forward_pre_hook(before, with_kwargs=True)
    if forgets:
        block.register_forward_hook(after, always_call=True)


class RemixConfig(Base.config_class):
    """The base model's, under a type of its own: transformers without this code must not take the folder for that."""

    model_type = f"remix_{Base.config_class.model_type}"


class RemixForCausalLM(Base):
    config_class = RemixConfig
    # Routers decide in float32 whatever type the model is loaded in.
    _keep_in_fp32_modules_strict = sorted(
        {*(getattr(Base, "_keep_in_fp32_modules_strict", None) or ()), "remix_router"}
    )

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        self._selection = _install(self, config.remix)

    def _init_weights(self, module):
        if not isinstance(module, RemixRouter):  # all values come from the files
            super()._init_weights(module)

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
        dtype, values = model.dtype, dict(model.state_dict())
        model._selection = _install(model, config.remix)
        for name, parameter in model.named_parameters():
            if name in tensors:  # to where the block's own weights are
                block = name.rsplit(".", 2)[0] + "."
                device = next(value.device for other, value in values.items() if other.startswith(block))
                parameter.data = tensors[name].to(device, torch.float32 if "remix_router" in name else dtype)
            else:
                parameter.data = values[name].view(parameter.shape)
        return model.eval()
