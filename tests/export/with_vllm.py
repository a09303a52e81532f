"""Run by a Python that has vLLM: its own code builds, fills and runs an exported folder, on a CPU.

with_vllm.py FOLDER SCRATCH DTYPE reads SCRATCH/expected.pt and writes SCRATCH/found.pt. Only attention is not vLLM's,
for that is kernels for a GPU. Seen with vLLM 0.33.0.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
import vllm.model_executor.models.transformers.base as backend
from torch import nn
from vllm.config import DeviceConfig, LoadConfig, ModelConfig, VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.forward_context import set_forward_context
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.utils import initialize_model, process_weights_after_loading
from vllm.utils.torch_utils import set_default_torch_dtype

folder, scratch, dtype = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
asked = torch.load(scratch / "expected.pt")
sequence = (asked["positions"] == 0).cumsum(0)


class Attention(nn.Module):
    """Causal within each sequence; (tokens, heads x width) in and out."""

    def __init__(self, *, num_heads, head_size, scale, **_):
        super().__init__()
        self.heads, self.width, self.scale = num_heads, head_size, scale

    def forward(self, query, key, value):
        query, key, value = (x.unflatten(-1, (-1, self.width)).transpose(0, 1) for x in (query, key, value))
        key, value = (x.repeat_interleave(self.heads // len(x), 0) for x in (key, value))
        seen = (sequence[:, None] == sequence[None]).tril()
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=self.scale)
        return mixed.transpose(0, 1).flatten(1)


backend.Attention = Attention
model_config = ModelConfig(
    folder,
    trust_remote_code=True,
    dtype=dtype,
    enforce_eager=True,
    hf_overrides={"architectures": ["RemixForCausalLM"]},
)
config = VllmConfig(model_config=model_config, device_config=DeviceConfig(device="cpu"), load_config=LoadConfig())
with set_current_vllm_config(config):
    init_distributed_environment(1, 0, f"file://{scratch / 'rendezvous'}", 0, "gloo")
    initialize_model_parallel(1)
    with set_default_torch_dtype(model_config.dtype):
        model = initialize_model(vllm_config=config)
    assert type(model).__name__ == "TransformersForCausalLM"
    DefaultModelLoader(LoadConfig()).load_weights(model, model_config)
    process_weights_after_loading(model, model_config, torch.device("cpu"))
    with torch.no_grad(), set_forward_context(None, config):
        hidden = model(asked["ids"], asked["positions"])
    head = model.lm_head.weight[: asked["logits"].shape[-1]]
    routers = [str(p.dtype) for name, p in model.named_parameters() if "remix_router" in name]
    torch.save({"logits": F.linear(hidden, head).detach().float(), "routers": routers}, scratch / "found.pt")
