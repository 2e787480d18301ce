"""OSF's two projections by brute force, a step of PEFT's tuner on the same matrix, and what a run leaves alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.baselines.methods import learn, module, spied

NAME = "lin.weight"


def matrix(rows=6, cols=9, seed=0):
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))


def kept(weight, k):
    left, _, right = torch.linalg.svd(weight, full_matrices=False)
    return {f"left/{NAME}": left[..., :k], f"right/{NAME}": right[..., :k, :]}


def projected(gradient, state, which):
    found = {NAME: gradient.clone(), "other": torch.ones(2)}
    module("osf").project(None, found, state, 0, which=which)
    assert torch.equal(found["other"], torch.ones(2))
    return found[NAME]


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (5, 5)])
def test_what_is_taken_out_is_what_lies_within_the_kept_directions(shape):
    """In the singular basis, completed to a square one, G is four blocks: `paper` clears one, `peft` three."""
    weight, gradient, k = matrix(*shape), matrix(*shape, seed=1), 2
    left, _, right = torch.linalg.svd(weight, full_matrices=True)
    blocks = left.mT @ gradient @ right.mT
    for which in ("paper", "peft"):
        wanted = blocks.clone()
        wanted[:k, :k] = 0
        if which == "peft":
            wanted[:k], wanted[:, :k] = 0, 0
        found = left.mT @ projected(gradient, kept(weight, k), which) @ right.mT
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def test_a_hand_worked_diagonal():
    """W = diag(3, 2, 1): the first direction is the first axis on both sides."""
    ones = torch.ones(3, 3)
    state = kept(torch.diag(torch.tensor([3.0, 2.0, 1.0])), 1)
    paper = torch.tensor([[0.0, 1, 1], [1, 1, 1], [1, 1, 1]])
    peft = torch.tensor([[0.0, 0, 0], [0, 1, 1], [0, 1, 1]])
    torch.testing.assert_close(projected(ones, state, "paper"), paper)
    torch.testing.assert_close(projected(ones, state, "peft"), peft)


def test_a_stack_of_experts_is_projected_one_by_one():
    weights, gradients = matrix(12, 5).view(3, 4, 5), matrix(12, 5, 1).view(3, 4, 5)
    for which in ("paper", "peft"):
        found = projected(gradients, kept(weights, 2), which)
        for one, weight, gradient in zip(found, weights, gradients, strict=True):
            alone = projected(gradient, kept(weight, 2), which)
            torch.testing.assert_close(one, alone, atol=1e-5, rtol=1e-4)


def peft_step(weight, optimizer, share, **settings):
    """The change of the matrix by one step of PEFT's tuner on a quadratic loss, the loss's gradient at the start, and
    the rank that PEFT keeps."""
    osf = pytest.importorskip("peft.tuners.osf")
    from peft import get_peft_model

    net = nn.Module()
    net.lin = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    net.lin.weight = nn.Parameter(weight.clone())
    net.forward = lambda x: net.lin(x)
    x, y = matrix(20, weight.shape[1], 2), matrix(20, weight.shape[0], 3)
    (net.lin(x) - y).square().mean().backward()
    gradient = net.lin.weight.grad.clone()
    config = osf.OSFConfig(target_modules=["lin"], effective_rank=share)
    model = get_peft_model(net, config)
    layer = net.lin
    step = optimizer([p for p in model.parameters() if p.requires_grad], **settings)
    (layer(x) - y).square().mean().backward()
    step.step()
    return layer.get_delta_weight("default").detach(), gradient, layer.effective_rank["default"]


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (7, 7)])
def test_pefts_first_step_is_made_of_our_projected_gradient(shape):
    """dW = -rate (P_u G V'^T S'^2 V' + U' diag(U'^T G V'^T) V' + U' S'^2 U'^T G P_v), to first order, where primes are
    beyond k; G may be what `peft` leaves of it, since PEFT's step sees nothing else. None of it is of the kept
    directions."""
    weight, share, rate = matrix(*shape), 0.5, 1e-4
    change, gradient, k = peft_step(weight, torch.optim.SGD, share, lr=rate)
    assert k == int(min(shape) * share)
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    ours = projected(gradient, kept(weight, k), "peft")
    u, s, v = left[:, k:], values[k:], right[k:]
    inner = u.mT @ ours @ v.mT
    step = ours @ v.mT @ torch.diag(s**2) @ v + u @ torch.diag(s**2) @ u.mT @ ours
    step = step + u @ torch.diag(inner.diagonal()) @ v
    torch.testing.assert_close(change / -rate, step, rtol=1e-2, atol=1e-2 * step.abs().max().item())
    assert (left[:, :k].mT @ change).norm() < 1e-3 * change.norm()
    assert (change @ right[:k].mT).norm() < 1e-3 * change.norm()


def test_with_adam_w_pefts_kept_directions_move_too():
    """Its hooks project gradients, and AdamW scales these entry by entry: what our page says of both."""
    weight = matrix(6, 9)
    change, _, k = peft_step(weight, torch.optim.AdamW, 0.5, lr=1e-3, weight_decay=0.0)
    left, _, right = torch.linalg.svd(weight, full_matrices=False)
    assert (left[:, :k].mT @ change).norm() > 0.05 * change.norm()
    assert (change @ right[:k].mT).norm() > 0.05 * change.norm()


def core(delta, weight, share):
    """Share of a delta's squares that lies within the kept directions on both sides."""
    left, _, right = torch.linalg.svd(weight, full_matrices=False)
    k = int(min(weight.shape) * share)
    inside = (left[:, :k].mT @ delta @ right[:k].mT).square().sum()
    return (inside / delta.square().sum()).item()


def test_a_run_moves_little_of_what_it_keeps_and_nothing_of_other_roles(build, tiny_scenario):
    name = "model.layers.0.mlp.up_proj.weight"
    moved = {}
    for method, options in (("sequential", {}), ("osf", {"first": 0.5})):
        strategy = build(method, **options)
        base = strategy.base[name].clone()
        asked = spied(strategy)
        (pack,) = learn(strategy, tiny_scenario, 1).packs
        moved[method] = core(pack.decode()[name], base, 0.5)
    assert moved["osf"] < 0.5 * moved["sequential"]
    roles = {strategy.context(tiny_scenario.tasks[0]).roles[n] for n in pack.tensors}
    assert roles <= {"attention", "mlp", "other"}
    assert len(asked[0]["terms"]) == 1


def test_the_share_kept_grows_from_task_to_task(build, tiny_scenario):
    """PEFT's example of three tasks keeps .3, .5, .7; of two the ends are left, each on the weights of its time."""
    strategy = build("osf")
    asked = spied(strategy)
    learn(strategy, tiny_scenario)
    name = "model.layers.0.self_attn.q_proj.weight"
    shape = strategy.base[name].shape
    ranks = [a["terms"][0].state[f"left/{name}"].shape[-1] for a in asked]
    assert ranks == [int(min(shape) * 0.3), int(min(shape) * 0.7)]
    first, second = (a["terms"][0].state[f"left/{name}"] for a in asked)
    assert not torch.allclose(first[:, 0].abs(), second[:, 0].abs(), atol=1e-6), "decomposed anew"
    assert not [n for n in asked[0]["terms"][0].state if "embed" in n or "lm_head" in n]
