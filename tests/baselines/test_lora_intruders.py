"""Intruder dimensions: one worked out by hand, all of an adapter as PEFT damps them, and whole runs within the budget."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from cl_graft import plugins
from cl_graft.budget import Budget
from cl_graft.models.load import load
from cl_graft.training.adapters import Adapter, adapted_layers
from tests.baselines.methods import learn, module

PLAIN = (10, 0.5, 0.75)  # top_k, epsilon, scale


def reduced(*given):
    return module("lora_intruders").reduced(*given)


def test_an_intruder_loses_a_quarter_of_its_singular_value():
    """I + 10 u u^T with u at cosine 1/3 to all axes: s = 11, so what is left of the adapter is 10 - 11 / 4."""
    u = torch.full((9, 1), 1 / 3)
    pair = 10 * u, u.T
    up, down = reduced(pair, torch.eye(9), 1, 0.5, 0.75)
    torch.testing.assert_close(up @ down, 7.25 * u @ u.T)
    assert up.shape == (9, 1) and down.shape == (1, 9)
    assert reduced(pair, torch.eye(9), 1, 0.33, 0.75) is pair, "more like an axis than .33"
    up, down = reduced(pair, torch.eye(9), 1, 0.5, 0.0)
    torch.testing.assert_close(up @ down, -u @ u.T), "W has nothing left in its direction"


def test_of_a_stack_each_expert_is_looked_at_alone():
    torch.manual_seed(0)
    up, down = torch.randn(3, 40, 4), torch.randn(3, 4, 24)
    up[1] *= 1e-4  # too weak to be among the first directions
    below = torch.randn(3, 40, 24)
    left, right = reduced((up, down), below, *PLAIN)
    for i in range(3):
        a, b = reduced((up[i], down[i]), below[i], *PLAIN)
        torch.testing.assert_close(left[i] @ right[i], a @ b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scale", [0.75, 0.0])
def test_an_adapter_is_damped_as_peft_damps_it(scale):
    """Every matrix of nano-llama, some with intruders and some without, at a rank that the result exceeds."""
    theirs = pytest.importorskip("peft.tuners.lora.intruders").reduce_intruder_dimension
    model, _ = load("nano-llama")
    torch.manual_seed(0)
    with Adapter(model, 4, 2.0, 0.0) as adapter:
        for number, layer in enumerate(adapted_layers(adapter.model).values()):
            layer.lora_B["default"].weight.data.normal_(std=0.02 * (number % 7))
        factors, start = adapter.factors(), {n: p.clone() for n, p in model.named_parameters()}
        said = []
        theirs(adapter.model, mitigation_lambda=scale, logging_sink=said.append)
        damped = {
            name: layer.get_delta_weight("intruder_reduced").detach()
            for name, layer in adapted_layers(adapter.model).items()
        }
    names = {n.replace("base_model.model.", "").replace(".base_layer", ""): n for n in start}
    same = 0
    for name, pair in factors.items():
        left, right = reduced(pair, start[names[name]], 10, 0.5, scale)
        torch.testing.assert_close(left @ right, damped[name], rtol=1e-3, atol=1e-5)
        same += left is pair[0]
    assert same == sum("No intruders" in line for line in said) and 0 < same < len(factors)


def gpt2(tokenizer):
    """Its layers store their matrices (in, out)."""
    torch.manual_seed(0)
    sizes = {"n_embd": 48, "n_layer": 1, "n_head": 2, "n_positions": 128}
    return GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes))


@pytest.mark.parametrize("make", [None, gpt2], ids=["nano-llama", "gpt2"])
def test_what_is_kept_has_the_intruders_of_the_plain_adapter_at_three_quarters(
    nano, tiny_scenario, make
):
    """By brute force: W of the plain adapter less a quarter of what its intruders hold, but for bf16 and the cut to the
    rank; packs of this rank within the budget; all of them answer."""
    model, tokenizer = nano
    model = make(tokenizer) if make else model

    def build(name, **options):
        found = plugins.load("strategy", name)
        return found(
            model=model,
            tokenizer=tokenizer,
            scenario=tiny_scenario,
            budget=Budget("40%", sum(p.numel() for p in model.parameters())),
            seed=0,
            options=plugins.check_options("strategy", name, found, options),
        )

    how = {"rank": 2, "learning_rate_scale": 30.0}
    strategy = learn(build("lora_intruders", **how), tiny_scenario)
    plain = learn(build("lora", convention="summed", **how), tiny_scenario, 1)
    assert strategy.compose(0) == strategy.packs and len(strategy.packs) == 2
    for pack in strategy.packs:
        assert {e.meta["rank"] for e in pack.tensors.values()} == {2}
        assert pack.nbytes <= strategy.budget.bytes
    ours, theirs = strategy.packs[0].decode(), plain.packs[0].decode()
    moved = compared = 0
    for name, delta in theirs.items():
        turned = make and "h.0" in name
        base = strategy.base[name].T if turned else strategy.base[name]
        whole = base + (delta.T if turned else delta)
        basis, (u, s, v) = torch.linalg.svd(base).U, torch.linalg.svd(whole, full_matrices=False)
        wanted, near = whole - base, (u[:, :10].T @ basis[:, : min(base.shape)]).abs().amax(1)
        if ((near - 0.5).abs() < 0.02).any():
            continue  # bf16 decides whether it is one
        for i in range(len(near)):
            if near[i] < 0.5:
                wanted = wanted - 0.25 * s[i] * torch.outer(u[:, i], v[i])
        moved, compared = moved + (not torch.equal(wanted, whole - base)), compared + 1
        a, b, c = torch.linalg.svd(wanted, full_matrices=False)
        wanted = a[:, :2] * b[:2] @ c[:2]
        torch.testing.assert_close(
            ours[name].T if turned else ours[name], wanted, rtol=0.02, atol=2e-3
        )
    assert moved and compared > len(theirs) / 2
