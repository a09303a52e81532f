"""Which routers get local credit: told by what a model computes, whatever its parts are called."""

from types import SimpleNamespace

import pytest
import torch
from helpers.tiny import FAMILIES, tiny_model
from torch import nn

from remix_cli.core import locality
from remix_cli.core.config import AdapterConfig
from remix_cli.core.patch import apply_adapter
from remix_cli.models import skeleton
from remix_cli.recipe.schema import Model

WIDTH, VOCABULARY = 8, 5


class Mean(nn.Module):
    """Mixes: each position gets the mean over itself and all earlier ones."""

    def forward(self, x):
        return x.cumsum(1) / torch.arange(1, x.shape[1] + 1, device=x.device).view(1, -1, 1)


class Convolution(nn.Conv1d):
    """Mixes with the position before."""

    def __init__(self):
        super().__init__(WIDTH, WIDTH, 2, padding=1)

    def forward(self, x):
        return super().forward(x.mT)[..., :-1].mT


class Recurrence(nn.Module):
    """Mixes: carries a decaying state on."""

    def forward(self, x):
        state, states = torch.zeros_like(x[:, 0]), []
        for position in x.unbind(1):
            state = 0.5 * state + position
            states.append(state)
        return torch.stack(states, 1)


class Backwards(nn.Module):
    """Mixes as an encoder's block does: the first position reads the last."""

    def forward(self, x):
        return x.flip(1)


class Experts(nn.Module):
    """Does not mix: every position goes through the best of three experts, in one list of all rows."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(WIDTH, 3)
        self.up = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x):
        flat = x.flatten(0, 1)
        best = self.gate(flat).softmax(-1).max(-1)
        y = torch.zeros_like(flat)
        for i, expert in enumerate(self.up):
            (mine,) = (best.indices == i).nonzero(as_tuple=True)
            y = y.index_add(0, mine, expert(flat[mine]) * best.values[mine, None])
        return y.view_as(x)


class FeedForward(nn.Module):
    def __init__(self, inner):
        super().__init__()
        setattr(self, inner, nn.Linear(WIDTH, WIDTH))
        self.inner = inner

    def forward(self, x):
        return torch.tanh(getattr(self, self.inner)(x))


class Layer(nn.Module):
    def __init__(self, parts):
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x):
        for part in self.children():
            x = x + part(x)
        return x


class Decoder(nn.Module):
    """Two layers of the same parts, in their order; after the layers, perhaps, something else."""

    def __init__(self, parts, after=None):
        super().__init__()
        torch.manual_seed(0)
        depth = SimpleNamespace(num_hidden_layers=2, hidden_size=WIDTH)
        self.config = SimpleNamespace(get_text_config=lambda: depth)
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Layer({name: make() for name, make in parts.items()}) for _ in range(2))
        self.after = after or nn.Identity()
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, input_ids, **_):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return SimpleNamespace(logits=self.head(self.after(x)))


def mlp():
    return FeedForward("up_proj")


def local(model, *targets, scope="block"):
    config = AdapterConfig(pool_size=4, active=2, rank=2, target_modules=targets, scope=scope)
    return apply_adapter(model, config, seed=0).find_local()


@pytest.mark.parametrize("mixer", [Mean, Convolution, Recurrence, Backwards])
def test_a_feed_forward_is_local_where_nothing_mixes_after_it(mixer):
    """By the same names in another order it is not, nor with the mixer after all layers."""
    assert local(Decoder({"mixer": mixer, "mlp": mlp}), "up_proj") == {"layers.1.mlp"}
    assert local(Decoder({"mlp": mlp, "mixer": mixer}), "up_proj") == set()
    assert local(Decoder({"mixer": mixer, "mlp": mlp}, after=mixer()), "up_proj") == set()


def test_a_feed_forward_of_any_name_is_local():
    assert local(Decoder({"attention": Mean, "ffn": lambda: FeedForward("w1")}), "w1") == {"layers.1.ffn"}


def test_experts_after_it_do_not_mix():
    model = Decoder({"mixer": Mean, "mlp": mlp, "experts": Experts})
    assert local(model, "mlp.up_proj") == {"layers.1.mlp"}


def test_a_block_is_local_if_all_of_its_linears_are():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.early, self.late, self.mean = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), Mean()

        def forward(self, x):
            return self.late(self.mean(self.early(x)))

    parts = {"block": Block}
    assert local(Decoder(parts), "early", "late") == set()
    assert local(Decoder(parts), "late") == {"layers.1.block"}
    assert local(Decoder(parts), "early", "late", scope="module") == {"layers.1.block.late"}


def test_a_linear_that_runs_twice_is_not_local():
    class Twice(FeedForward):
        def __init__(self):
            super().__init__("up_proj")

        def forward(self, x):
            return super().forward(super().forward(x).cumsum(1))

    assert local(Decoder({"twice": Twice, "mlp": mlp}), "up_proj") == {"layers.1.mlp"}


@pytest.mark.parametrize("family", FAMILIES)
def test_after_the_last_attention_of_known_families(family):
    assert local(tiny_model(family), "gate_proj", "down_proj") == {"model.layers.1.mlp"}
    assert local(tiny_model(family), "q_proj", "k_proj", "o_proj") == set()
    last = "model.layers.1.self_attn"
    found = local(tiny_model(family), "q_proj", "k_proj", "v_proj", "o_proj", scope="module")
    assert found == {f"{last}.q_proj", f"{last}.o_proj"}  # a query is read where it stands, keys and values later on


def test_looking_changes_nothing():
    model = tiny_model().train()
    model.model.layers[0].eval()
    adapter = apply_adapter(model, AdapterConfig(pool_size=4, active=2, rank=2), seed=0)
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    assert adapter.local.tolist() == [False, True]
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules() if isinstance(module, nn.Linear))


@pytest.mark.parametrize("broken", ["meta", "arguments", "constant"])
def test_nothing_is_local_where_nothing_can_be_seen(broken, tmp_path):
    model = Decoder({"mixer": Mean, "mlp": mlp})
    if broken == "meta":
        tiny_model().save_pretrained(tmp_path)
        model = skeleton(Model(name_or_path=str(tmp_path)))
    if broken == "arguments":
        model.forward = lambda embeddings: embeddings
    if broken == "constant":
        nn.init.zeros_(model.head.weight)
    assert local(model, "up_proj") == set()


def test_derivatives_that_are_no_numbers_count_as_read():
    gradient = torch.zeros(1, 4, 2)
    gradient[0, 0, 0] = 1
    assert locality._is_local(gradient, (0,))
    gradient[0, 2, 1] = float("nan")
    assert not locality._is_local(gradient, (0,))


def test_it_is_the_base_model_that_is_looked_at():
    """Routers that read a prompt's mean would mix, and there is no prompt."""
    config = AdapterConfig(pool_size=4, active=2, rank=2, level="sequence")
    assert apply_adapter(tiny_model(), config, seed=0).find_local() == {"model.layers.1.mlp"}
