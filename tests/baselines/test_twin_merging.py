"""Twin-Merging by hand: the shared vector, private parts of a rank, and what a router's weights make of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cl_graft.errors import OverBudget
from cl_graft.skillpack.format.file import packed_size
from tests.baselines.drawn import NAME, entries, learn, taught
from tests.baselines.methods import learn as train

MATRIX = "model.layers.0.self_attn.q_proj.weight"


def diagonals(*deltas: list[float]) -> Any:
    """Deltas that are 0 but for the first entries of one matrix's diagonal, given for each task."""

    def make(base: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        made = [{n: torch.zeros(x.shape) for n, x in base.items()} for _ in deltas]
        for whole, values in zip(made, deltas, strict=True):
            for n, value in enumerate(values):
                whole[MATRIX][n, n] = value
        return made

    return make


def diagonal(strategy: Any, task: int, count: int = 3) -> list[float]:
    (answer,) = strategy.compose(task)
    found = answer.delta(MATRIX)
    assert not (found - torch.diag(found.diagonal())).any()
    return found.diagonal()[:count].tolist()


def test_of_what_is_not_shared_the_largest_directions_are_a_tasks_own(build: Any) -> None:
    """Half the sum of 4 2 0 and 0 2 8 is 2 2 4; what is left is 2 0 -4 and -2 0 4, of which one direction is the last."""
    given = diagonals([4.0, 2.0, 0.0], [0.0, 2.0, 8.0])
    one = taught(build, "twin_merging", given, scale=0.5, rank=1)
    assert one.shared["vector"].delta(MATRIX).diagonal()[:3].tolist() == [2, 2, 4]
    assert [diagonal(one, task) for task in (0, 1)] == [[2, 2, 0], [2, 2, 8]]
    two = taught(build, "twin_merging", given, scale=0.5, rank=2)
    assert [diagonal(two, task) for task in (0, 1)] == [[4, 2, 0], [0, 2, 8]]
    assert one.compose(None) == [] == one.compose(2)


def test_a_new_task_changes_what_answers_for_the_old_ones(build: Any) -> None:
    """Of three tasks half the sum is 5 2 4; what is left is -1 0 -4, -5 0 4 and 1 -2 -4."""
    given = diagonals([4.0, 2.0, 0.0], [0.0, 2.0, 8.0], [6.0, 0.0, 0.0])
    three = taught(build, "twin_merging", given, scale=0.5, rank=1)
    assert [diagonal(three, task) for task in range(3)] == [[5, 2, 0], [0, 2, 4], [5, 2, 0]]


def test_vectors_are_left_whole(build: Any) -> None:
    deltas = [[4.0, 2.0, 1.0, 0.0], [0.5, 2.0, -1.0, 0.0]]
    twins = learn(build, "twin_merging", deltas, rank=1, scale=0.5)
    assert entries(twins.shared["vector"], 4) == [2.25, 2, 0, 0]
    assert [entries(twins.compose(task)[0], 4) for task in (0, 1)] == deltas


@pytest.fixture
def drawn(build: Any) -> Any:
    """Three tasks of random deltas, in bf16."""
    return learn(build, "twin_merging", [[1.0], [2.0], [3.0]], rank=3, budget="20%")


def test_what_answers_is_the_definition_in_every_parameter(drawn: Any) -> None:
    for number, pack in enumerate(drawn.packs):
        (answer,) = drawn.compose(number)
        for name in drawn.base:
            deltas = [p.delta(name).double() for p in drawn.packs]
            wanted = 0.3 * sum(deltas)
            rest = deltas[number] - wanted
            if rest.ndim == 2:
                u, s, v = torch.linalg.svd(rest, full_matrices=False)
                rest = (u[:, :3] * s[:3]) @ v[:3]
            size = deltas[number].norm() + 1e-9
            assert (answer.delta(name) - wanted - rest).norm() < 0.01 * size, (pack.task, name)


def test_weighed_by_a_router_the_answers_are_shared_plus_the_weighed_private_parts(
    drawn: Any,
) -> None:
    weights = [0.5, 0.25, 0.25]
    vector, private = drawn.shared["vector"], drawn.shared["private"]
    for name in drawn.base:
        answers = [drawn.compose(task)[0].delta(name) for task in range(3)]
        found = sum(w * x for w, x in zip(weights, answers, strict=True))
        parts = [private.delta(f"{pack.task}/{name}") for pack in drawn.packs]
        wanted = vector.delta(name) + sum(w * x for w, x in zip(weights, parts, strict=True))
        assert torch.allclose(found, wanted, atol=1e-5), name


def test_one_task_alone_is_itself(build: Any) -> None:
    alone = learn(build, "twin_merging", [[4.0, 2.0]])
    assert alone.compose(0) == alone.packs and not alone.shared


def test_a_private_part_takes_at_most_the_budget_and_one_rank_more_would_not_fit(
    build: Any,
) -> None:
    twins = learn(build, "twin_merging", [[1.0], [2.0]])
    private, budget = twins.shared["private"].tensors, twins.budget.bytes
    for pack in twins.packs:
        own = {n: private[f"{pack.task}/{n}"].spec for n in twins.base}
        (rank,) = {meta["rank"] for codec, _, meta in own.values() if codec == "low_rank"}
        size = packed_size(
            own,
            task=pack.task,
            method=pack.method,
            options=pack.options,
            base=pack.base,
            versions=pack.versions,
        )
        more = sum(2 * sum(shape) for codec, shape, _ in own.values() if codec == "low_rank")
        assert size <= budget < size + more and rank > 0
    assert twins.alive == [*twins.packs, twins.shared["vector"], twins.shared["private"]]
    with pytest.raises(
        OverBudget, match=rf"twin_merging.rank=9 .* the largest that fits is {rank}"
    ):
        build("twin_merging", rank=9).require_possible()
    build("twin_merging", rank=rank).require_possible()


def test_it_trains_as_individual_does_and_the_model_answers_with_both_parts(
    build: Any, tiny_scenario: Any
) -> None:
    twins, same = build("twin_merging", rank=2), build("individual")
    same.stages = twins.stages
    for strategy in (twins, same):
        train(strategy, tiny_scenario)
    for mine, theirs in zip(twins.packs, same.packs, strict=True):
        assert torch.equal(mine.delta(NAME), theirs.delta(NAME))
    vector, private = twins.shared["vector"], twins.shared["private"]
    twins.grafted.activate(twins.compose(1))
    for name, weight in twins.model.named_parameters():
        own = private.delta(f"{twins.packs[1].task}/{name}")
        assert torch.equal(weight, twins.base[name] + (vector.delta(name) + own))
    twins.restore_base()
