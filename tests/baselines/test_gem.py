"""GEM's quadratic program by brute force and by other solvers, and what it makes of real gradients."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from cl_graft.strategy.memory import MEMORY, Memory, tokens
from tests.baselines.methods import learn, module, spied

TASKS = (("ab", "cd"), ("zz", "yyy", "x"), ("Hello",))
ROWS = [[{"prompt": f"Q: Copy {w}.\nA: ", "completion": w} for w in words] for words in TASKS]
COUNTS = [len(rows) for rows in ROWS]


def by_active_sets(products, against, strength):
    """The program solved by trying every set of v that stay at their bound; exact where P is regular."""
    best, found = np.inf, None
    for free in itertools.product([False, True], repeat=len(against)):
        free = np.array(free)
        v = np.full(len(against), strength)
        if free.any():
            held = products[np.ix_(free, ~free)] @ v[~free]
            v[free] = np.linalg.solve(products[np.ix_(free, free)], -against[free] - held)
        value = 0.5 * v @ products @ v + against @ v
        if (v >= strength - 1e-12).all() and value < best:
            best, found = value, v
    return found


def drawn(seed, tasks, width=9):
    rng = np.random.default_rng(seed)
    old, g = rng.normal(size=(tasks, width)), rng.normal(size=width)
    return old, g, old @ old.T, old @ g


def test_one_memory_is_worked_out_by_hand():
    """v = max(strength, -c / P): with c = -6 and P = 4 the projection takes 1.5 of r, at least the strength."""
    multipliers = module("gem").multipliers
    for strength, wanted in ((0.0, 1.5), (0.5, 1.5), (2.0, 2.0)):
        found = multipliers(np.array([[4.0]]), np.array([-6.0]), strength)
        assert found == pytest.approx([wanted])
    assert multipliers(np.array([[4.0]]), np.array([6.0]), 0.0) == pytest.approx([0.0])


@pytest.mark.parametrize("strength", [0.0, 0.5])
@pytest.mark.parametrize("tasks", [2, 4, 6])
def test_the_solution_is_that_of_brute_force_and_of_another_solver(tasks, strength):
    for seed in range(10):
        _, _, products, against = drawn(seed, tasks)
        found = module("gem").multipliers(products, against, strength)
        np.testing.assert_allclose(found, by_active_sets(products, against, strength), atol=1e-8)

        def value(v, products=products, against=against):
            return 0.5 * v @ products @ v + against @ v

        bounds = [(strength, None)] * tasks
        other = minimize(value, np.full(tasks, strength + 1), bounds=bounds, tol=1e-12)
        assert value(found) <= other.fun + 1e-6


def test_the_new_gradient_is_the_nearest_that_loses_nowhere():
    """Without a strength; none of 2,000 points that lose nowhere, drawn around it, is nearer."""
    old, g, products, against = drawn(3, 4)
    assert (against < 0).any()
    taken = g + module("gem").multipliers(products, against, 0.0) @ old
    assert (old @ taken >= -1e-9).all()
    rng = np.random.default_rng(0)
    others = taken + rng.normal(size=(2000, len(g))) * 0.3
    others = others[(others @ old.T >= 0).all(1)]
    assert len(others) > 50
    assert (np.linalg.norm(others - g, axis=1) >= np.linalg.norm(taken - g)).all()


def test_memories_that_agree_make_no_program_without_a_solution():
    """The authors' solver wants P regular; two memories alike are one that counts twice."""
    products, against = np.array([[4.0, 4.0], [4.0, 4.0]]), np.array([-6.0, -6.0])
    found = module("gem").multipliers(products, against, 0.0)
    assert found.sum() == pytest.approx(1.5) and (found >= 0).all()


@pytest.mark.parametrize("strength", [0.0, 0.5])
def test_avalanches_plug_in_finds_the_same(strength):
    """Its ridge of .001 on P is the whole difference."""
    qpsolvers = pytest.importorskip("qpsolvers")
    if "quadprog" not in qpsolvers.available_solvers:
        pytest.skip("avalanche asks qpsolvers for quadprog, which is not installed")
    from avalanche.training.plugins import GEMPlugin

    for seed in range(5):
        old, g, products, against = drawn(seed, 4)
        plugin = GEMPlugin(1, strength)
        plugin.G = torch.tensor(old)
        theirs = plugin.solve_quadprog(torch.tensor(g)).numpy()
        ours = g + module("gem").multipliers(products + 1e-3 * np.eye(4), against, strength) @ old
        np.testing.assert_allclose(theirs, ours, rtol=1e-4, atol=1e-5)


@pytest.fixture
def remembered(nano):
    """A model, its memories' tokens, and the gradient of each one's mean loss over the answers."""
    model, tokenizer = nano
    old = []
    for rows in ROWS:
        model.zero_grad()
        model(**tokens(tokenizer, rows, 64)).loss.backward()
        old.append({n: p.grad.clone() for n, p in model.named_parameters()})
    return model, tokens(tokenizer, [row for rows in ROWS for row in rows], 64), old


def flat(gradients):
    return torch.cat([x.flatten().double() for x in gradients.values()])


def taken(model, given, state, counts=COUNTS, strength=0.5):
    found = {n: x.clone() for n, x in given.items()}
    module("gem").project(model, found, state, 0, counts=counts, strength=strength)
    return found


@pytest.mark.parametrize("strength", [0.0, 0.5])
def test_a_real_gradient_is_held_by_every_memory(remembered, strength):
    model, state, old = remembered
    noise = torch.Generator().manual_seed(0)
    g = {
        n: 0.1 * torch.randn(x.shape, generator=noise) - 2 * x + old[1][n]
        for n, x in old[0].items()
    }
    rows = torch.stack([flat(x) for x in old])
    assert (rows @ flat(g) < 0).any()
    found = flat(taken(model, g, state, strength=strength))
    v = by_active_sets((rows @ rows.T).numpy(), (rows @ flat(g)).numpy(), strength)
    torch.testing.assert_close(found, flat(g) + torch.tensor(v) @ rows, rtol=1e-3, atol=1e-4)
    slack = 1e-4 * found.norm() * rows.norm(dim=1)
    assert (rows @ found >= -slack).all()


def test_a_gradient_that_no_memory_loses_by_is_left_alone(remembered):
    model, state, old = remembered
    g = {n: sum(x[n] for x in old) for n in old[0]}
    assert (torch.stack([flat(x) for x in old]) @ flat(g) > 0).all()
    assert all(torch.equal(x, g[n]) for n, x in taken(model, g, state).items())


def test_with_one_memory_and_no_strength_it_is_a_gem(remembered):
    model, state, old = remembered
    first = {name: x[: COUNTS[0]] for name, x in state.items()}
    g = {n: 1.0 - 3 * x for n, x in old[0].items()}
    one = taken(model, g, first, COUNTS[:1], 0.0)
    other = {n: x.clone() for n, x in g.items()}
    module("agem").project(model, other, first, 0, batch=99, seed=0)
    for n in g:
        torch.testing.assert_close(one[n], other[n])


def test_every_earlier_task_has_a_memory_of_its_own(build, tiny_scenario):
    strategy = build("gem", size=5)
    asked = spied(strategy)
    learn(strategy, tiny_scenario)
    assert [len(a["terms"]) for a in asked] == [0, 1], "the first task is plain"
    (term,) = asked[1]["terms"]
    assert term.options == {"counts": [5], "strength": 0.5} and len(term.state["input_ids"]) == 5
    memory = Memory(5, 0, strategy.shared[MEMORY].tensors)
    for number, task in enumerate(tiny_scenario.tasks):
        kept = memory[str(number)]
        assert kept.seen == 48 and len(kept.rows) == 5
        assert {r["prompt"] for r in kept.rows} <= {e.prompt for e in task.train}
