"""Every path through the forward pass chooses the same LoRAs, weights them alike and gives the same output.

The definition is written out below in float64, LoRA by LoRA, and shares no code with the package. Choices and weights
must be those of the recorded eager path to the bit, outputs the definition's up to rounding.
"""

import copy
import importlib.util
import re
from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from helpers.common import close
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from remix_cli.core import kernel, router
from remix_cli.core.config import AdapterConfig, Rule
from remix_cli.core.layer import RoutedLinear
from remix_cli.core.router import Router
from remix_cli.core.rules import RULES
from remix_cli.core.trace import RoutingState, Trace, Weighting
from remix_cli.export import modeling_remix

N, K, R = 4, 2, 2  # omega = 2 / sqrt(k r) = 1, a number in every type
ROWS, LENGTH, WIDTH, OUT = 2, 3, 16, 12
METHODS = ["remix", "mixlora", "hydralora"]
LEVELS = {"token": {}, "sequence": {"level": "sequence"}, "clusters": {"level": "sequence", "clusters": 3}}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 9e-3}
HAS_TRITON = importlib.util.find_spec("triton") is not None
EVERY_PATH = pytest.mark.parametrize(("method", "level"), [(m, level) for m in METHODS for level in LEVELS])


@dataclass
class Setting:
    """One linear with its pool and its own router, and what they are given."""

    config: AdapterConfig
    router: Router
    linear: RoutedLinear
    x: Tensor  # (B, T, D_in)
    prompt: Tensor
    noise: Tensor | None

    @classmethod
    def make(cls, method: str, level: str, dtype: torch.dtype, sampled: bool, scope: str = "module") -> "Setting":
        active = N if method == "hydralora" else K
        config = AdapterConfig(
            pool_size=N, active=active, rank=R, method=method, scope=scope, router_init_std=1.0, **LEVELS[level]
        )
        generator = torch.Generator().manual_seed(4)
        state = RoutingState()
        made = Router("r", 0, WIDTH, config, state, torch.device("cpu"))
        base = nn.Linear(WIDTH, OUT).to(dtype).requires_grad_(False)
        linear = RoutedLinear(base, config, made, state)
        with torch.no_grad():
            for tensor in (
                base.weight,
                base.bias,
                made.weight,
                made.common,
                made.centres,
                linear.lora_A,
                linear.lora_B,
            ):
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
        x = torch.randn(ROWS, LENGTH, WIDTH, generator=generator).to(dtype)
        prompt = torch.arange(LENGTH) < torch.tensor([[1], [2]])
        choices = LENGTH if level == "token" else 1
        noise = 3 * torch.randn(1, ROWS, choices, N, generator=generator) if sampled else None
        return cls(config, made, linear, x, prompt, noise)

    def trace(self, **changes) -> Trace:
        return Trace(noise=self.noise, prompt=self.prompt, **changes)

    def run(self, trace: Trace | None, x: Tensor | None = None) -> tuple[Weighting, Tensor]:
        """What the router says and what the layer gives."""
        said: list[Weighting] = []
        hook = self.router.register_forward_hook(lambda module, args, output: said.append(output))
        with nullcontext() if trace is None else self.router.state.tracing(trace):
            y = self.linear(self.x if x is None else x)
        hook.remove()
        return said[0], y


def settings(method: str, level: str, scope: str = "module"):
    """In every type, under the top k and, for what samples, under noise."""
    for dtype in TOLERANCE:
        for sampled in (False, True) if method == "remix" else (False,):
            yield Setting.make(method, level, dtype, sampled, scope)


# The definition.


def defined_scores(s: Setting) -> Tensor:
    """(B, T or 1, n)"""
    weight, x = s.router.weight.double(), s.x.double()
    read = x
    if s.config.level == "sequence":
        means = [x[row, s.prompt[row]].mean(0) for row in range(ROWS)]
        read = torch.stack(means).unsqueeze(1)
    if s.config.clusters:
        without_common = read / read.norm(dim=-1, keepdim=True) - s.router.common.double()
        nearest = [int((s.router.centres.double() @ row[0]).argmax()) for row in without_common]
        read = s.router.centres.double()[nearest].unsqueeze(1)
    return torch.einsum("btd,nd->btn", read, weight) / read.norm(dim=-1, keepdim=True)


def defined_weights(s: Setting) -> Tensor:
    """(B, T or 1, n)"""
    scores = defined_scores(s)
    preferred = scores if s.noise is None else scores + s.noise[0].double()
    weights = torch.zeros_like(scores)
    for place in range(scores[..., 0].numel()):
        row, position = divmod(place, scores.shape[1])
        chosen = preferred[row, position].argsort(descending=True)[: s.config.active]
        if s.config.method == "remix":
            weights[row, position, chosen] = 2 / (K * R) ** 0.5
        else:
            shares = scores[row, position, chosen].exp()
            total = 2 / R**0.5 if s.config.method == "hydralora" else K * 2 / (K * R) ** 0.5
            weights[row, position, chosen] = total * shares / shares.sum()
    return weights


def defined_output(s: Setting, x: Tensor) -> Tensor:
    """(B, T, D_out): the frozen layer, and each LoRA by itself. A and B in the type that the layer computes in."""
    a, b = s.linear.lora_A.to(x.dtype).double(), s.linear.lora_B.to(x.dtype).double()
    base, weights = s.linear.base_layer, defined_weights(s)
    y = x.double() @ base.weight.double().T + base.bias.double()
    for i in range(N):
        mine = slice(i * R, (i + 1) * R)
        down = a if s.config.shares_a else a[mine]
        y = y + weights[..., i : i + 1] * (x.double() @ down.T @ b[:, mine].T)
    return y


# The paths. Each gives what the router said and what the layer gave, or None where it does not serve the setting.


def recorded(s: Setting):
    return s.run(s.trace())


def unrecorded(s: Setting):
    return s.run(s.trace(record=False))


def without_a_trace(s: Setting):
    return s.run(None) if s.config.level == "token" and s.noise is None else None


def gathering_a_gradient(s: Setting):
    """The weights stay by LoRA; each gets dL/dz."""
    if s.config.method != "remix":
        return None
    weighting, y = s.run(s.trace(selection_grad=True))
    (gradient,) = torch.autograd.grad(y.sum(), weighting.weights, retain_graph=True)
    assert gradient.shape == weighting.weights.shape
    return weighting, y


def recomputed(s: Setting):
    """Under checkpointing: the backward pass runs the layer again, which must choose and save the same."""
    said: list[Weighting] = []
    s.router.register_forward_hook(lambda module, args, output: said.append(output))
    state = s.router.state
    with state.tracing(s.trace()):
        y = checkpoint(s.linear, s.x, use_reentrant=False, context_fn=state.checkpoint_contexts)
    y.sum().backward()
    assert len(said) == 2
    return said[1], y


def kept(s: Setting):
    """From the prompt, whatever comes later."""
    if s.config.level != "sequence":
        return None
    trace = s.trace(record=False)
    s.run(trace)
    later = -s.x
    weighting, y = s.run(trace, later)
    assert close(y, defined_output(s, later).to(y.dtype), TOLERANCE[y.dtype])
    return weighting, s.run(trace)[1]


def through_the_block(s: Setting):
    """The router chose when the block began."""
    block = Setting.make(s.config.method, level_of(s), s.x.dtype, s.noise is not None, scope="block")
    with block.router.state.tracing(block.trace()):
        block.router.block.weighting = block.router(block.x)
        return block.router.block.weighting, block.linear(block.x)


def without_a_graph(s: Setting):
    with torch.no_grad():
        return s.run(s.trace())


def as_a_quantised_layer(s: Setting):
    s.linear.plain = False
    return s.run(s.trace())


def as_a_quantised_layer_gathering_a_gradient(s: Setting):
    s.linear.plain = False
    return gathering_a_gradient(s)


def exported(s: Setting):
    """The copy that travels with exported models: ReMix under the top k."""
    if s.config.method != "remix" or s.noise is not None or s.x.dtype == torch.float64:
        return None
    names = ("pool_size", "active", "rank", "scale", "scope", "level", "clusters")
    c = {name: getattr(s.config, name) for name in names}
    theirs = modeling_remix.RemixRouter(WIDTH, c)
    theirs.state = None
    if s.config.level == "sequence":
        theirs.state = SimpleNamespace(prompt=s.prompt.float(), kept={})
    base = copy.deepcopy(s.linear.base_layer)
    linear = modeling_remix.RemixLinear(base, c, theirs)
    values = {name: tensor for name, tensor in s.router.named_buffers() if s.config.clusters}
    theirs.load_state_dict(values | {"weight": s.router.weight})
    own = {"lora_A.weight": s.linear.lora_A, "lora_B.weight": s.linear.lora_B}
    linear.to(s.x.dtype).load_state_dict(own, strict=False)
    gates = modeling_remix._route(theirs, s.x)
    return Weighting(gates.to(s.x.dtype), None), linear(s.x)


def fused(s: Setting):
    return s.run(s.trace()) if s.config.method == "remix" else None


def fused_gates(s: Setting):
    return s.run(s.trace(record=False)) if s.config.method == "remix" else None


def fused_gathering_a_gradient(s: Setting):
    return gathering_a_gradient(s)


EAGER = [
    recorded,
    unrecorded,
    without_a_trace,
    gathering_a_gradient,
    recomputed,
    kept,
    through_the_block,
    without_a_graph,
    as_a_quantised_layer,
    as_a_quantised_layer_gathering_a_gradient,
    exported,
]
FUSED = [fused, fused_gates, fused_gathering_a_gradient]


def level_of(s: Setting) -> str:
    return "clusters" if s.config.clusters else s.config.level


def check(path, method: str, level: str) -> None:
    for s in settings(method, level):
        found = path(s)
        if found is None:
            continue
        weighting, y = found
        said = f"{path.__name__}, {s.x.dtype}, {'sampled' if s.noise is not None else 'top k'}"
        reference = s.trace()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernel, "serves", lambda x, n: False)
            s.run(reference)
        decision = reference.decisions["r"]
        assert torch.equal(weighting.gates, decision.gates), said
        if weighting.weights is not None:
            assert torch.equal(weighting.weights, decision.weights.to(weighting.weights.dtype)), said
        assert close(y, defined_output(s, s.x).to(y.dtype), TOLERANCE[y.dtype]), said


@EVERY_PATH
def test_the_eager_choice_is_the_definition(method, level):
    for s in settings(method, level):
        trace = s.trace()
        s.run(trace)
        decision, weights = trace.decisions["r"], defined_weights(s)
        assert torch.equal(decision.weights > 0, weights > 0)
        assert (decision.weights.gather(-1, decision.chosen) > 0).all()
        assert close(decision.weights, weights.to(decision.weights.dtype), 1e-6)
        assert close(decision.logits, defined_scores(s).to(decision.logits.dtype), 1e-6)


@EVERY_PATH
@pytest.mark.parametrize("path", EAGER, ids=lambda path: path.__name__)
def test_every_eager_path_is_the_same(path, method, level):
    check(path, method, level)


@pytest.mark.skipif(not HAS_TRITON, reason="the kernel needs triton")
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("path", FUSED, ids=lambda path: path.__name__)
def test_every_fused_path_is_the_same(path, level, monkeypatch):
    """Interpreted on the CPU (see conftest.py)."""
    calls = []
    launch = kernel._launch
    monkeypatch.setattr(kernel, "_launch", lambda *args: calls.append(1) or launch(*args))
    monkeypatch.setattr(kernel, "serves", lambda x, n: x.dtype != torch.float64)
    check(path, "remix", level)
    assert calls


# The table of router.py.


def calls_of(monkeypatch, names: list[str]) -> list[str]:
    """The names of Router's methods `names`, as they are called from now on."""
    called: list[str] = []

    def watch(name):
        method = getattr(Router, name)
        monkeypatch.setattr(Router, name, lambda *args: called.append(name) or method(*args))

    for name in names:
        watch(name)
    return called


def table(after: str) -> dict[str, str]:
    """The rows of the table in router.py's docstring that follows the words `after`."""
    lines = router.__doc__.partition(after)[2].strip().partition("\n\n")[0]
    rows = re.findall(r"^ *\| (.*?) +\| `(\w+)` +\|$", lines, flags=re.MULTILINE)
    return dict(rows)


def sends(call: str, s: Setting, monkeypatch) -> None:
    """Send `s` through the forward pass in the way that a row of the table says."""
    on_gpu = "on a GPU" in call
    monkeypatch.setattr(kernel, "serves", lambda x, n: on_gpu)
    monkeypatch.setattr(kernel, "choose", lambda x, w, *_: fake_choice(x))
    monkeypatch.setattr(kernel, "choose_gates", lambda x, w, *_: fake_choice(x).gates)
    trace = s.trace(record="not recorded" not in call)
    if "chosen now" in call:
        s.run(trace)
        return
    s.run(trace)
    s.run(Trace(replay=trace) if "replayed" in call else trace)


def fake_choice(x: Tensor) -> kernel.Choice:
    n, r = torch.zeros(*x.shape[:-1], N), torch.zeros(*x.shape[:-1], N * R)
    return kernel.Choice(n, n[..., :1], n[..., :K].long(), n, r)


@pytest.mark.parametrize("call", table("the first row that applies:"))
def test_the_path_of_each_call_is_the_tables(call, monkeypatch):
    paths = table("the first row that applies:")
    method = "mixlora" if "with a gradient" in call or "anything else" in call else "remix"
    level = "sequence" if "sequence" in call else "token"
    called = calls_of(monkeypatch, list(paths.values()))
    sends(call, Setting.make(method, level, torch.float32, sampled=False), monkeypatch)
    assert called[-1] == paths[call]
    assert len(called) == (1 if "chosen now" in call else 2)


@pytest.mark.parametrize("setting", table("that scores reads:"))
def test_what_is_read_is_what_the_table_says(setting, monkeypatch):
    readers = table("that scores reads:")
    level = "clusters" if "clusters" in setting else "sequence" if "sequence" in setting else "token"
    called = calls_of(monkeypatch, list(readers.values()))
    s = Setting.make("remix", level, torch.float32, sampled=False)
    s.run(s.trace())
    assert called[-1] == readers[setting]


def test_the_tables_name_every_path_once():
    for words, count in (("the first row that applies:", 6), ("that scores reads:", 3)):
        assert len(set(table(words).values())) == count


def test_every_rule_that_a_pool_can_name_is_there():
    assert RULES.keys() == set(get_args(Rule))
