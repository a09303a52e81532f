"""A method of one's own: BitFit (arXiv 2106.10199), which trains nothing but biases.

The linear layers of today's models have none, so each target gets one: y = W x + b, with b zero at first. Put the file
into remix_cli/methods and the line `"bitfit": "remix_cli.methods.bitfit:BitFit",` into registry.py there. Then
`adapter: {method: bitfit}` trains it; `eval`, `compare`, `sweep` and `budget` know it.
"""

from typing import ClassVar

from remix_cli.methods.base import Method


class BitFit(Method):
    summary = "a bias for every target (arXiv 2106.10199)"
    settings = ("target_modules",)
    learning_rate = 1e-2
    unexported = "has biases where the base model has none"
    not_with: ClassVar = {"shard_base": "sharding was tried with LoRAs alone"}

    def build(self, model, config, seed):
        import torch

        from remix_cli.core.patch import Adapter, find_targets

        targets = find_targets(model, config.target_modules)
        model.requires_grad_(False)
        adapter = Adapter(model, config)

        def add_bias(linear, _, y):
            return y if adapter.state.off else y + linear.trained_bias.to(y.dtype)

        for name in targets:
            linear = model.get_submodule(name)
            zeros = torch.zeros(linear.out_features, device=linear.weight.device)  # (D_out,) float32
            linear.trained_bias = torch.nn.Parameter(zeros)
            adapter.others[f"{name}.bias"] = linear.trained_bias
            adapter.hooks.append(linear.register_forward_hook(add_bias))
        return adapter

    def tensor_sizes(self, config):
        return {".bias": (None,)}
