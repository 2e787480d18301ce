"""Model Grafting's mask moves, and what it loses on validation falls; both of its forms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cl_graft import plugins
from cl_graft.training.stages import Stages
from tests.baselines.methods import learn, module


@pytest.fixture(scope="module")
def scenario() -> Any:
    """One task whose delta is large enough for a mask of it to matter."""
    make = plugins.load("scenario", "mini")
    sizes = {"train_size": 400, "test_size": 4, "steps": 40, "batch": 8, "learning_rate": 1e-2}
    return make(seed=0, tasks="cipher", **sizes)


def test_the_mask_moves_and_loses_less(build: Any, scenario: Any) -> None:
    """By a rate that the method chose itself, on examples that it was not trained on, within the bytes it started with."""
    strategy, grafts = build("model_grafting", scenario=scenario, epochs=16, batches=1), []
    graft_class = module("model_grafting").Graft
    optimised = graft_class.optimised

    class Spy(graft_class):  # type: ignore[misc, valid-type]
        def optimised(self, rate: float, epochs: int, batches: int) -> Any:
            found = optimised(self, rate, epochs, batches)
            grafts.append((self, rate, epochs, found))
            return found

    module("model_grafting").Graft = Spy
    try:
        learn(strategy, scenario, 1)
    finally:
        module("model_grafting").Graft = graft_class
    assert [epochs for _, _, epochs, _ in grafts] == [2] * 5 + [16] * 2
    early = sorted(grafts[:5], key=lambda g: g[3][0])
    assert [rate for _, rate, _, _ in grafts[5:]] == [rate for _, rate, _, _ in early[:2]]
    graft, _, _, (loss, scores) = min(grafts[5:], key=lambda g: g[3][0])
    start, top = graft.start, graft.top(scores)
    moved = sum(int((top[n] & ~start[n]).sum()) for n in top)
    assert moved > 0.01 * graft.count == 0.01 * sum(int(m.sum()) for m in start.values())
    assert loss == pytest.approx(graft.loss(top)) and loss < 0.97 * graft.loss(start)
    (pack,) = strategy.packs
    assert pack.nbytes <= strategy.budget.bytes
    assert not {"embedding", "head"} & {graft.context.roles[n] for n in pack.tensors}


def test_a_step_is_plain_gradient_descent_on_the_soft_mask(build: Any, scenario: Any) -> None:
    """Against autograd through the sigmoids: g = g0 (1 - sigmoid(S)) + (1 - g0) sigmoid(S)."""
    strategy = build("model_grafting", scenario=scenario)
    context = strategy.context(scenario.tasks[0])
    generator = torch.Generator().manual_seed(1)
    delta = {
        n: 1e-2 * torch.randn(p.shape, generator=generator)
        for n, p in context.start.items()
        if n not in context.frozen
    }
    graft = module("model_grafting").Graft(context, delta, 4)
    after = {n: 20 * torch.rand(d.shape, generator=generator) - 10 for n, d in delta.items()}
    logits = {n: x.clone().requires_grad_() for n, x in after.items()}
    batch = next(context.batches(4))
    graft.step(after, 1e3, [batch])
    weights = dict(context.start)
    for n, s in logits.items():
        g0 = graft.start[n].float()
        soft = g0 * (1 - s.sigmoid()) + (1 - g0) * s.sigmoid()
        weights[n] = context.start[n] + soft * delta[n]
    torch.func.functional_call(strategy.model, weights, kwargs=batch).loss.backward()
    for n, s in logits.items():
        torch.testing.assert_close(after[n], s.detach() - 1e3 * s.grad, rtol=1e-4, atol=1e-4)
        assert not after[n].equal(s.detach())


@pytest.mark.parametrize("name", ["model_grafting", "model_tailor"])
def test_each_tunes_from_the_base_and_summed_from_the_model_so_far(
    name: str, build: Any, tiny_scenario: Any, tmp_path: Path
) -> None:
    quick = {"epochs": 1, "batches": 1, "rate": 1e8} if name == "model_grafting" else {}
    learned = []
    for convention in ("each", "summed"):
        strategy = build(name, convention=convention, **quick)
        strategy.stages = Stages(tmp_path)
        learned.append(learn(strategy, tiny_scenario))
    each, summed = learned
    assert [*each.compose(0)] == [each.packs[0]] and [*each.compose(None)] == []
    assert [*summed.compose(0)] == [*summed.compose(None)] == summed.packs
    first, second = ([s.packs[task].decode() for s in learned] for task in (0, 1))
    # from the base, both; the longer name of a form in the header may cost an entry of the budget
    unlike = sum(int((first[0][n] != x).sum()) for n, x in first[1].items())
    assert unlike <= 4 and first[0].keys() == first[1].keys()
    assert any(not second[0][n].equal(second[1][n]) for n in second[0].keys() & second[1].keys())
    assert len([*tmp_path.glob("stages/*/stage.json")]) == 3
