"""Layer, router, patching and traces on tiny models of three families."""

import contextlib

import pytest
import torch
from helpers.common import close
from helpers.tiny import FAMILIES, fill_adapter, tiny_model

from remix_cli.core.config import AdapterConfig
from remix_cli.core.patch import TargetError, apply_adapter, find_targets
from remix_cli.core.product import gates_of, pool_linear
from remix_cli.core.trace import RoutingState, Trace, Weighting
from remix_cli.models import is_causal

SMALL = AdapterConfig(pool_size=4, active=2, rank=2)
BY_SEQUENCE = AdapterConfig(pool_size=4, active=2, rank=2, level="sequence")
IDS = torch.tensor([[5, 9, 3, 11, 7, 2, 30], [8, 1, 4, 4, 60, 12, 33]])


def adapted(family="llama", config=SMALL, dtype=torch.float32, **changes):
    model = tiny_model(family, dtype, **changes)
    adapter = apply_adapter(model, config, seed=0)
    fill_adapter(adapter)
    return model, adapter


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("scope", "routers"), [("block", 2), ("module", 6), ("model", 1)])
def test_starts_at_the_base_model_and_leaves_it_untouched(family, scope, routers):
    model = tiny_model(family)
    before = {name: p.clone() for name, p in model.named_parameters()}
    expected = model(IDS).logits
    config = AdapterConfig(pool_size=4, active=2, rank=2, scope=scope)
    adapter = apply_adapter(model, config, seed=0)
    assert len(adapter.routers) == routers
    assert torch.equal(model(IDS).logits, expected)
    fill_adapter(adapter)
    assert not torch.equal(model(IDS).logits, expected)
    with adapter.disabled():
        assert torch.equal(model(IDS).logits, expected)
    adapter.remove()
    assert torch.equal(model(IDS).logits, expected)
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_one_router_of_the_model_chooses_for_every_block(level):
    """As if the routers of all blocks had drawn what it draws, at the input of the first."""
    outputs = {}
    for scope in ("model", "block"):
        config = AdapterConfig(pool_size=4, active=2, rank=2, level=level, scope=scope)
        model, adapter = adapted(config=config)
        drawn = torch.randn(1, *IDS.shape, 4, generator=torch.Generator().manual_seed(0)) * 1e6
        noise = (drawn if level == "token" else drawn[:, :, :1]).repeat(len(adapter.routers), 1, 1, 1)
        with adapter.tracing(Trace(noise=noise, prompt=torch.ones_like(IDS, dtype=torch.bool))) as trace:
            outputs[scope] = model(IDS).logits
        assert len(trace.decisions) == (1 if scope == "model" else 2)
    assert close(outputs["model"], outputs["block"], 1e-6)


def test_one_router_of_the_model_is_for_constant_weights():
    with pytest.raises(ValueError, match="constant weights"):
        AdapterConfig(method="mixlora", scope="model")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("positions", [5, 1], ids=["by token", "by sequence"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_product_by_hand_is_the_product_by_autograd(bias, positions, dtype):
    """Values and every gradient, odd shapes, in exact and in rounded arithmetic."""
    n, r, d_in, d_out = 3, 2, 7, 11
    base = torch.nn.Linear(d_in, d_out, bias=bias).to(dtype).requires_grad_(False)
    wide = torch.promote_types(dtype, torch.float32)
    inputs = [torch.randn(2, 5, d_in, dtype=dtype), torch.rand(2, positions, n, dtype=wide)]
    pool = [
        torch.nn.Parameter(torch.randn(n * r, d_in, dtype=wide)),
        torch.nn.Parameter(torch.randn(d_out, n * r, dtype=wide)),
    ]

    def by_hand(x, w, a, b):
        weighting = Weighting(gates_of(w, a.shape[0] // w.shape[-1], x.dtype), w)
        return pool_linear(x, base, a, b, weighting, RoutingState())

    def by_autograd(x, w, a, b):
        down = torch.nn.functional.linear(x, a.to(dtype)).unflatten(-1, (n, r))
        return base(x) + torch.nn.functional.linear((down * w.to(dtype)[..., None]).flatten(-2), b.to(dtype))

    results = []
    for product in (by_hand, by_autograd):
        leaves = [t.detach().clone().requires_grad_() for t in (*inputs, *pool)]
        y = product(*leaves)
        gradients = torch.autograd.grad((y * torch.linspace(-1, 1, y.numel()).view(y.shape).to(dtype)).sum(), leaves)
        with torch.no_grad():
            assert close(product(*leaves), y, 1e-9 if dtype == torch.float64 else 9e-3)
        results.append([y, *gradients])
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype
        assert close(ours, theirs, 1e-12 if dtype == torch.float64 else 9e-3)


def test_autocast_takes_the_way_by_autograd():
    model, adapter = adapted()
    exact = model(IDS).logits
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(IDS, labels=IDS)
    loss.loss.backward()
    difference = (loss.logits.float() - exact).norm() / exact.norm()
    assert 0 < difference < 0.02
    assert all(torch.isfinite(p.grad).all() for p in adapter.lora_parameters().values())


def test_casts_are_shared_inside_a_scope_and_fresh_outside():
    """Fused AdamW changes a parameter without autograd's version counter seeing it, so a scope must end the sharing."""
    parameter, state = torch.nn.Parameter(torch.ones(3)), RoutingState()
    with state.unchanging():
        first = state.cast(parameter, torch.bfloat16)
        with state.unchanging():
            assert state.cast(parameter, torch.bfloat16) is first
        assert state.cast(parameter, torch.bfloat16) is first
    parameter.grad = torch.ones(3)
    torch.optim.AdamW([parameter], lr=1.0, weight_decay=0.0, fused=True).step()
    for scope in (state.unchanging, contextlib.nullcontext):
        with scope():
            assert state.cast(parameter, torch.bfloat16).float().abs().max() < 0.01
            assert state.cast(parameter, torch.float32).abs().max() < 0.01


def test_only_loras_get_gradients_from_the_token_loss():
    model, adapter = adapted()
    with adapter.tracing(Trace(noise=adapter.noise((0,), torch.arange(2), 7))):
        model(IDS, labels=IDS).loss.backward()
    own = {id(p) for p in adapter.lora_parameters().values()}
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (id(parameter) in own), name


def test_the_forward_is_the_sum_over_chosen_loras():
    """RoutedLinear against the definition, LoRA by LoRA."""
    model, adapter = adapted()
    name = "model.layers.0.mlp.gate_proj"
    linear = adapter.linears[name]
    seen = {}
    hook = linear.register_forward_hook(lambda m, args, out: seen.update(x=args[0], y=out))
    with adapter.tracing(Trace(noise=adapter.noise((0,), torch.arange(2), 7))) as trace:
        model(IDS)
    hook.remove()
    decision = trace.decisions["model.layers.0.mlp"]
    expected = linear.base_layer(seen["x"])
    r = SMALL.rank
    for b in range(2):
        for t in range(7):
            for i in decision.chosen[b, t].tolist():
                a, up = linear.lora_A[i * r : (i + 1) * r], linear.lora_B[:, i * r : (i + 1) * r]
                expected[b, t] += SMALL.scale * (up @ (a @ seen["x"][b, t]))
    assert close(seen["y"], expected, 1e-6)
    active = decision.weights[decision.weights != 0]
    assert torch.equal(active, torch.full_like(active, SMALL.scale))
    assert (decision.weights != 0).sum(-1).eq(SMALL.active).all()


def test_inference_takes_the_top_k_and_a_row_ignores_its_neighbours_and_padding():
    model, adapter = adapted()
    with adapter.tracing(Trace()) as trace:
        together = model(IDS).logits
    decision = trace.decisions["model.layers.1.mlp"]
    assert torch.equal(decision.chosen, decision.logits.topk(2, dim=-1).indices)
    alone = model(IDS[1:]).logits
    assert close(alone[0], together[1], 1e-6)
    padded = torch.cat([IDS[1:], torch.full((1, 5), 63)], dim=1)
    assert close(model(padded).logits[0, :7], together[1], 1e-6)
    left = torch.cat([torch.full((1, 3), 63), IDS[1:]], dim=1)
    mask = torch.tensor([[0] * 3 + [1] * 7])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    assert close(model(left, attention_mask=mask, position_ids=positions).logits[0, 3:], together[1], 1e-5)


def test_routing_by_sequence_chooses_once_from_the_prompt():
    """Completion, padding on either side and neighbours do not change a row's selection; another prompt does."""
    model, adapter = adapted(config=BY_SEQUENCE)
    prompt = torch.arange(7) < 4

    def route(ids, prompt, **more):
        with adapter.tracing(Trace(prompt=prompt)) as trace:
            logits = model(ids, **more).logits
        return [trace.decisions[name] for name in adapter.routers], logits

    together, logits = route(IDS, prompt.expand(2, 7))
    assert together[0].chosen.shape == (2, 1, SMALL.active)
    completion = IDS[1:].clone()
    completion[0, 4:] = 5
    padded = torch.cat([completion, torch.full((1, 3), 63)], dim=1)
    left = torch.cat([torch.full((1, 3), 63), IDS[1:]], dim=1)
    mask = torch.tensor([[0] * 3 + [1] * 7])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    off = torch.zeros(1, 3, dtype=torch.bool)
    others = [
        route(padded, torch.cat([prompt[None], off], 1)),
        route(left, torch.cat([off, prompt[None]], 1), attention_mask=mask, position_ids=positions),
    ]
    assert close(others[1][1][0, 3:], logits[1], 1e-5)
    for decisions, _ in others:
        assert all(close(a.logits[0], b.logits[1], 1e-5) for a, b in zip(decisions, together, strict=True))
    changed = IDS[1:].clone()
    changed[0, 3] = (changed[0, 3] + 1) % 60
    assert not close(route(changed, prompt[None])[0][0].logits[0], together[0].logits[1], 1e-3)


def test_routing_by_sequence_keeps_its_selection_while_generating():
    model, adapter = adapted(config=BY_SEQUENCE)
    mask = torch.tensor([[0] * 3 + [1] * 4, [1] * 7])
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    with adapter.tracing(Trace(prompt=mask.bool(), record=False)) as trace:
        cached = model.generate(IDS, use_cache=True, **options)
    assert not trace.decisions
    assert {w.gates.shape for w in trace.kept.values()} == {(2, 1, SMALL.pool_size * SMALL.rank)}
    with adapter.tracing(Trace(prompt=mask.bool(), record=False)):
        assert torch.equal(cached, model.generate(IDS, use_cache=False, **options))
    whole = torch.cat([mask, torch.ones(2, 8, dtype=torch.long)], dim=1)
    with adapter.tracing(Trace(prompt=torch.nn.functional.pad(mask, (0, 8)).bool())), torch.no_grad():
        logits = model(cached, attention_mask=whole, position_ids=(whole.cumsum(-1) - 1).clamp(min=0)).logits
    assert torch.equal(logits[:, 6:-1].argmax(-1), cached[:, 7:])  # one pass over all tokens chooses the same words


def test_routing_by_sequence_needs_the_prompt():
    model, _ = adapted(config=BY_SEQUENCE)
    with pytest.raises(RuntimeError, match="prompt=mask"):
        model(IDS)


def test_generation_with_the_cache_equals_generation_without():
    model, _ = adapted()
    ids, mask = IDS[:1], torch.ones(1, 7, dtype=torch.long)
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(ids, use_cache=True, **options)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **options))


def test_checkpointing_replays_the_selections():
    model, adapter = adapted()
    model.train()

    def gradients(checkpointing):
        model.zero_grad()
        if checkpointing:
            context = adapter.state.checkpoint_contexts
            model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": context})
        noise = adapter.noise((0,), torch.arange(2), 7)
        with adapter.tracing(Trace(noise=noise)):
            loss = model(IDS, labels=IDS).loss
        loss.backward()
        return [p.grad.clone() for p in adapter.lora_parameters().values()]

    plain, replayed = gradients(False), gradients(True)
    assert all(close(b, a, 1e-6) for a, b in zip(plain, replayed, strict=True))


def test_draws_do_not_depend_on_batch_or_padding():
    _, adapter = adapted()
    together = adapter.noise((3, 1), torch.tensor([0, 1, 2]), 9)
    alone = adapter.noise((3, 1), torch.tensor([2]), 5)
    assert torch.equal(together[:, 2:, :5], alone)
    assert not torch.equal(together, adapter.noise((3, 2), torch.tensor([0, 1, 2]), 9))


def test_unknown_targets_name_what_there_is():
    with pytest.raises(TargetError, match=r"up_projj.*gate_proj"):
        find_targets(tiny_model(), ("gate_proj", "up_projj"))
    with pytest.raises(TargetError, match="regular expression"):
        find_targets(tiny_model(), ("[",))
    picked = find_targets(tiny_model(), (r"model\.layers\.0\..*_proj",))
    assert len(picked) == 7
    assert "lm_head" not in find_targets(tiny_model(), (r".*",))


def test_all_linear_layers_are_those_of_every_block_and_not_the_head():
    ends = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert find_targets(tiny_model(), ("all-linear",)) == find_targets(tiny_model(), ends)
    assert len(find_targets(tiny_model(), ("all-linear",))) == 14


def test_the_causality_check_sees_a_model_that_looks_ahead():
    model = tiny_model()
    assert is_causal(model, 64)
    looks_ahead = lambda m, args, out: out + out.mean(1, keepdim=True)  # noqa: E731
    model.model.layers[0].mlp.register_forward_hook(looks_ahead)
    assert not is_causal(model, 64)


def test_peft_with_all_loras_active_is_the_pool_with_k_equal_n():
    """Oracle: rank n r LoRA of PEFT, alpha = omega r', is our pool with k = n."""
    peft = pytest.importorskip("peft")
    config = AdapterConfig(pool_size=4, active=4, rank=2)
    model, adapter = adapted(config=config)
    ours = model(IDS).logits
    tensors = {name: p.detach().clone() for name, p in adapter.lora_parameters().items()}
    adapter.remove()
    alpha = config.scale * 8
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(r=8, lora_alpha=alpha, target_modules=["gate_proj", "up_proj", "down_proj"])
    )
    state = {f"base_model.model.{n}.default.weight": t for n, t in tensors.items()}
    assert not wrapped.load_state_dict(state, strict=False).unexpected_keys
    assert close(wrapped.eval()(IDS).logits, ours, 1e-5)
