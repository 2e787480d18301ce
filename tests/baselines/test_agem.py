"""A-GEM: the projection is exact, acts only against the memory, and is drawn anew for each step."""

from __future__ import annotations

import pytest
import torch

from cl_graft.strategy.memory import MEMORY, Memory, some, tokens
from tests.baselines.methods import learn, module, spied

ROWS = [{"prompt": f"Q: Copy {w}.\nA: ", "completion": w} for w in ("ab", "cd", "abcdef")]


@pytest.fixture
def remembered(nano):
    """A model, a memory's tokens, and the gradient of its mean loss over the answers."""
    model, tokenizer = nano
    state = tokens(tokenizer, ROWS, 64)
    model.zero_grad()
    model(**state).loss.backward()
    return model, state, {n: p.grad.clone() for n, p in model.named_parameters()}


def dot(a, b):
    return sum((a[n] * b[n]).sum() for n in b)


def project(model, gradients, state, step=0, batch=3, seed=0):
    module("agem").project(model, gradients, state, step, batch=batch, seed=seed)


def random_gradient(like, seed):
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(x.shape, generator=generator) for n, x in like.items()}


def test_a_gradient_against_the_memory_is_projected_onto_its_half_space(remembered):
    """g - (g.r / r.r) r: what is left is at right angles to r, and nothing else of g is lost."""
    model, state, r = remembered
    noise = random_gradient(r, 1)
    g = {n: noise[n] - 2 * r[n] for n in r}
    assert dot(g, r) < 0
    taken = {n: x.clone() for n, x in g.items()}
    project(model, taken, state)
    scale = dot(g, r) / dot(r, r)
    for n in r:
        torch.testing.assert_close(taken[n], g[n] - scale * r[n], rtol=1e-4, atol=1e-5)
    assert abs(dot(taken, r)) < 1e-4 * dot(g, g).sqrt() * dot(r, r).sqrt()


def test_a_gradient_that_helps_the_memory_is_left_alone(remembered):
    model, state, r = remembered
    noise = random_gradient(r, 2)
    g = {n: 0.01 * noise[n] + 2 * r[n] for n in r}
    assert dot(g, r) > 0
    taken = {n: x.clone() for n, x in g.items()}
    project(model, taken, state)
    assert all(torch.equal(taken[n], g[n]) for n in g)
    assert all(
        p.grad is not None and torch.equal(p.grad, r[n]) for n, p in model.named_parameters()
    )


@torch.no_grad()
def loss_after(model, state, step):
    weights = {n: p.clone() for n, p in model.named_parameters()}
    for n, p in model.named_parameters():
        p.sub_(step[n])
    found = model.double()(**state).loss.item()
    model.float()
    for n, p in model.named_parameters():
        p.copy_(weights[n])
    return found


def test_the_memorys_loss_does_not_rise_to_first_order(remembered):
    """A step of SGD along the gradient raises it, along what is left of it not: only by its square."""
    model, state, r = remembered
    g = {n: x - 2 * r[n] for n, x in random_gradient(r, 3).items()}
    taken = {n: x.clone() for n, x in g.items()}
    project(model, taken, state)
    norm, rate = dot(g, g).sqrt(), 1e-3
    here = loss_after(model, state, {n: 0 * x for n, x in g.items()})
    slope = [
        (loss_after(model, state, {n: rate * x / norm for n, x in way.items()}) - here) / rate
        for way in (g, taken)
    ]
    assert slope[0] == pytest.approx((-dot(g, r) / norm).item(), rel=0.1) and slope[0] > 0
    assert slope[1] < 0.05 * slope[0]


def test_each_step_compares_with_rows_of_its_own_and_the_same_when_resumed(remembered):
    model, state, r = remembered
    g = {n: -x for n, x in r.items()}

    def taken(step, **options):
        found = {n: x.clone() for n, x in g.items()}
        project(model, found, state, step, **options)
        return torch.cat([x.flatten() for x in found.values()])

    steps = [taken(step, batch=1) for step in range(12)]
    assert len({x.sum().item() for x in steps}) == 3, "one of three rows, each at some step"
    assert torch.equal(taken(4, batch=1), steps[4])


def test_a_batch_is_as_long_as_its_longest_row(remembered):
    _, state, _ = remembered
    short = some(state, [0, 1])
    assert short["input_ids"].shape[1] < state["input_ids"].shape[1]
    assert short["attention_mask"].all() and (short["labels"] != -100).any(1).all()


def test_what_is_learned_is_another_model_than_sequential_by_stages_of_its_own(
    build, tiny_scenario
):
    packs, folders, memory = [], [], None
    for name, options in (("sequential", {}), ("agem", {"size": 12, "batch": 8})):
        strategy = build(name, **options)
        asked = spied(strategy)
        packs.append(learn(strategy, tiny_scenario).packs)
        folders.append({a["folder"].name for a in asked})
        memory = strategy.shared.get(MEMORY)
    assert not folders[0] & folders[1]
    assert [len(a["terms"]) for a in asked] == [0, 1], "the first task is plain"
    assert len(asked[1]["terms"][0].state["input_ids"]) == 12
    assert Memory(12, 0, memory.tensors)["sft"].seen == 96
    plain, other = (p[1].decode() for p in packs)
    assert any((plain[n] - other[n]).abs().max() > 1e-4 for n in plain)
