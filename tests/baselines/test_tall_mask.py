"""TALL-masks by hand, and that what answers is made of the two shared artefacts alone, tensor by tensor."""

from __future__ import annotations

import sys

import pytest
import torch

from cl_graft.stream import benchmark
from tests.baselines.drawn import NAME, counted, entries, learn

# The first entry is the first task's alone, the second is of all, in the third they are at odds, the last is of none.
DELTAS = [[4.0, 2.0, 1.0, 0.0], [0.5, 2.0, -1.0, 0.0], [-0.5, 2.0, 4.0, 0.0]]
VECTOR = [4.0, 6.0, 4.0, 0.0]
# |D| against 0.4 |t - D|, which is 0 1.6 1.2 0, then 1.4 1.6 2 0, then 1.8 1.6 0 0
MASKS = [[1, 1, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0]]


@pytest.fixture
def learned(build):
    return learn(build, "tall_mask", DELTAS, mask_lambda=0.4)


def masks_of(strategy):
    return [entries(strategy.shared["masks"], 4, f"{p.task}/{NAME}") for p in strategy.packs]


def test_vector_and_masks_are_as_worked_out_by_hand(learned):
    assert entries(learned.shared["vector"], 4) == VECTOR
    assert masks_of(learned) == MASKS
    assert [entries(pack, 4) for pack in learned.packs] == DELTAS
    assert {e.codec for e in learned.shared["masks"].tensors.values()} == {"mask"}
    assert {e.meta["dtype"] for e in learned.shared["vector"].tensors.values()} == {"BF16"}


def test_a_new_task_changes_the_masks_of_the_old_ones(build):
    """Of the first two alone: t is 4.5 4 0 0, and 0.4 |t - D| 0.2 0.8 0.4 0, then 1.6 0.8 0.4 0."""
    assert masks_of(learn(build, "tall_mask", DELTAS[:2], mask_lambda=0.4)) == [
        [1, 1, 1, 0],
        [0, 1, 1, 0],
    ]


def test_lambda_is_an_option_and_a_larger_one_gives_a_task_less(build):
    """0.2 |t - D| is 0 0.8 0.6 0, then 0.7 0.8 1 0 (1 is not above it), then 0.9 0.8 0 0."""
    found = masks_of(learn(build, "tall_mask", DELTAS, mask_lambda=0.2))
    assert found == [[1, 1, 1, 0], [0, 1, 0, 0], [0, 1, 1, 0]]


def test_what_answers_is_the_masked_vector_bit_for_bit(learned):
    vector, masks = learned.shared["vector"], learned.shared["masks"]
    for number, pack in enumerate(learned.packs):
        (answer,) = learned.compose(number)
        both = zip(MASKS[number], VECTOR, strict=True)
        assert entries(answer, 4) == [m * t for m, t in both]
        assert set(answer.tensors) == set(learned.base)
        for name in learned.base:
            of_all = torch.stack([p.delta(name) for p in learned.packs]).sum(0).bfloat16().float()
            assert torch.equal(vector.delta(name), of_all)
            assert torch.equal(answer.delta(name), masks.delta(f"{pack.task}/{name}") * of_all)
    assert learned.compose(None) == [] == learned.compose(3)


def test_a_single_task_is_answered_by_its_own_delta(build):
    strategy = learn(build, "tall_mask", DELTAS[:1])
    for name in strategy.base:
        assert torch.equal(strategy.compose(0)[0].delta(name), strategy.packs[0].delta(name))


def test_tasks_switch_on_the_model_and_the_one_that_is_on_is_not_composed_again(
    learned, monkeypatch
):
    asked: list[str] = []
    module = sys.modules[type(learned).__module__]
    monkeypatch.setattr(module, "masked", counted(module.masked, asked))
    parameters = dict(learned.model.named_parameters())
    for number in (0, 0, 2, 2, 0):
        learned.grafted.activate(learned.compose(number))
        for name, weight in parameters.items():
            wanted = learned.base[name] + learned.compose(number)[0].delta(name)
            assert torch.equal(weight, wanted), name
            asked.pop()
    assert len(asked) == 3 * len(parameters)
    learned.restore_base()


def test_it_shares_its_training_with_all_that_start_from_the_base(build, tiny_scenario):
    first, second = build("individual"), build("tall_mask")
    second.stages = first.stages
    for strategy in (first, second):
        strategy.train(benchmark(tiny_scenario).train_stream[0], eval_streams=[])
    for name in first.base:
        assert torch.equal(first.packs[0].delta(name), second.packs[0].delta(name))
    assert len([*first.stages.folder.glob("stages/*/stage.json")]) == 1
