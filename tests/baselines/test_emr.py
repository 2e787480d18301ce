"""EMR-Merging by hand: the elected vector, masks and scales, and that they alone are what answers."""

from __future__ import annotations

import sys

import pytest
import torch

from cl_graft.skillpack.codecs import original
from tests.baselines.drawn import NAME, counted, entries, learn

# Signs of the sums: + - + and, for a sum of zero, -.
DELTAS = [[4.0, 2.0, 1.0, 1.0], [0.5, -4.0, -1.0, -1.0], [-0.5, -1.0, 4.0, 0.0]]
VECTOR = [4.0, -4.0, 4.0, -1.0]
MASKS = [[1, 0, 1, 0], [1, 1, 0, 1], [0, 1, 1, 0]]


@pytest.fixture
def learned(build):
    return learn(build, "emr", DELTAS)


def test_vector_and_masks_are_as_worked_out_by_hand(learned):
    masks = learned.shared["masks"]
    assert entries(learned.shared["vector"], 4) == VECTOR
    assert [entries(masks, 4, f"{p.task}/{NAME}") for p in learned.packs] == MASKS
    assert [entries(pack, 4) for pack in learned.packs] == DELTAS


def test_scales_are_those_of_all_entries_together(build, monkeypatch):
    """With no other parameter: sum |D| is 8, 6.5, 5.5 and sum |m u| is 8, 9, 8."""
    learned = learn(build, "emr", DELTAS, alone=True)
    scales = [original(learned.shared["scales"].tensors[p.task]).item() for p in learned.packs]
    assert scales == [torch.tensor(x).item() for x in (8 / 8, 6.5 / 9, 5.5 / 8)]
    for number, scale in enumerate(scales):
        both = zip(MASKS[number], VECTOR, strict=True)
        wanted = [torch.tensor(m * u).mul(scale).item() for m, u in both]
        assert entries(learned.compose(number)[0], 4) == wanted


def test_what_answers_is_the_formula_bit_for_bit(learned):
    for number, pack in enumerate(learned.packs):
        (answer,) = learned.compose(number)
        scale = original(learned.shared["scales"].tensors[pack.task])
        wholes = {name: [p.delta(name) for p in learned.packs] for name in learned.base}
        unified = {name: elected(deltas) for name, deltas in wholes.items()}
        masks = {n: (wholes[n][number] * u > 0).float() for n, u in unified.items()}
        sizes = sum(wholes[n][number].double().abs().sum() for n in wholes)
        masked = sum((masks[n] * u).double().abs().sum() for n, u in unified.items())
        assert scale == pytest.approx((sizes / masked).item(), rel=1e-6)
        for name, u in unified.items():
            assert torch.equal(answer.delta(name), scale * (masks[name] * u)), name
    assert learned.compose(None) == [] == learned.compose(3)


def elected(deltas):
    """By the paper's words: the sign of the mean, and the largest magnitude among those that have it."""
    stacked = torch.stack(deltas)
    sign = torch.where(stacked.mean(0) > 0, 1.0, -1.0)
    return sign * (stacked.abs() * (stacked.sign() == sign)).max(0).values


def test_a_single_task_is_answered_by_its_own_delta(build):
    strategy = learn(build, "emr", DELTAS[:1])
    assert original(strategy.shared["scales"].tensors["task-0"]) == 1
    for name in strategy.base:
        assert torch.equal(strategy.compose(0)[0].delta(name), strategy.packs[0].delta(name))


def test_the_task_that_is_on_is_not_composed_again(learned, monkeypatch):
    asked: list[str] = []
    module = sys.modules[type(learned).__module__]
    monkeypatch.setattr(module, "rescaled", counted(module.rescaled, asked))
    for number in (1, 1, 2, 1):
        learned.grafted.activate(learned.compose(number))
    assert len(asked) == 3 * len(learned.base)
    learned.restore_base()
