"""Merging methods by hand: what each makes of a few small deltas, worked out entry by entry."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from cl_graft import plugins
from cl_graft.skillpack.codecs import decode, dense
from cl_graft.stream import benchmark
from tests.baselines.drawn import entries, learn
from tests.baselines.methods import module


def function(name: str) -> Any:
    return plugins.load("strategy", name).function


def drawn(tasks: int, *shape: int) -> list[Tensor]:
    seed = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=seed).bfloat16().float() for _ in range(tasks)]


# --- magmax ---

DELTAS = [[4.0, 2.0, 1.0, -1.0], [0.5, -4.0, -1.0, 2.0], [-5.0, 3.0, 0.5, 0.0]]
# of |1| and |-1| the later one
LARGEST = [[4.0, 2.0, 1.0, -1.0], [4.0, -4.0, -1.0, 2.0], [-5.0, -4.0, -1.0, 2.0]]


@pytest.mark.parametrize("convention", ["sequential", "independent"])
def test_magmax_takes_of_each_entry_the_value_of_largest_magnitude(
    convention: str, build: Any
) -> None:
    for tasks in (1, 2, 3):
        learned = learn(build, "magmax", DELTAS[:tasks], convention=convention)
        (answer,) = learned.compose(0)
        scale = 0.5 if tasks > 1 else 1.0
        assert entries(answer, 4) == [scale * x for x in LARGEST[tasks - 1]]
        for name in learned.base:
            values = torch.stack([pack.delta(name) for pack in learned.packs])
            wanted = values.gather(0, values.abs().argmax(0, keepdim=True))[0]
            assert torch.equal(answer.delta(name).abs(), scale * wanted.abs()), name


def test_magmax_trains_on_from_the_last_tasks_weights_and_never_from_the_merged_ones(
    build: Any, tiny_scenario: Any
) -> None:
    """Its packs are those of `sequential`, and of `individual` under the other convention."""
    for convention, other in (("sequential", "sequential"), ("independent", "individual")):
        strategy, same = build("magmax", convention=convention), build(other)
        same.stages = strategy.stages
        for one in (strategy, same):
            for experience in benchmark(tiny_scenario).train_stream:
                one.train(experience, eval_streams=[])
        for mine, theirs in zip(strategy.packs, same.packs, strict=True):
            assert {n: x.tolist() for n, x in mine.decode().items()} == {
                n: x.tolist() for n, x in theirs.decode().items()
            }


def test_sequential_magmax_keeps_two_deltas_however_many_tasks_there_are(build: Any) -> None:
    for tasks in (2, 3):
        learned = learn(build, "magmax", DELTAS[:tasks])
        assert learned.alive == [learned.packs[-1], learned.shared["vector"]]
    kept = learn(build, "magmax", DELTAS, convention="independent").alive
    assert [pack.task for pack in kept] == ["task-0", "task-1", "task-2"]


# --- sce ---


def test_sce_selects_weighs_and_erases_as_worked_out_by_hand() -> None:
    """Half of twelve entries: the variances of two tasks are a quarter of the squared differences below.

    Selected are the six of difference 4 and more, in each of which one task alone has the sign of the sum.
    """
    first = torch.tensor([[4.0, -2.0, 1.0, 1.0], [4.0, 0.0, 1.0, 2.0], [-4.0, -1.0, 0.5, 0.0]])
    second = torch.tensor([[-1.0, 2.0, 1.5, 1.0], [-4.0, 1.0, 2.0, 1.0], [0.0, 3.0, 0.5, 6.0]])
    # differences: 5, 4, .5, 0; 8, 1, 1, 1; 4, 4, 0, 6. Sums: 3, 0 (positive); 0 (positive); -4, 2, 6
    wanted = [[4.0, 2.0, 0.0, 0.0], [4.0, 0.0, 0.0, 0.0], [-4.0, 3.0, 0.0, 6.0]]
    for deltas in ([first, second], [second, first]):
        assert function("sce")(deltas, density=0.5).tolist() == wanted
    # of all entries the squares are 60.25 and 75.5; both tasks are positive where they have 1 and 1.5, and 2 and 1
    both = function("sce")([first, second], density=1.0)
    assert both[0, 2].item() == pytest.approx((60.25 * 1 + 75.5 * 1.5) / (60.25 + 75.5))
    assert both[1, 3].item() == pytest.approx((60.25 * 2 + 75.5 * 1) / (60.25 + 75.5))
    assert both[0, 3].item() == pytest.approx(1.0)


def test_sce_of_three_tasks_is_its_definition_entry_by_entry() -> None:
    deltas = drawn(3, 3, 4)
    flat = [x.flatten().tolist() for x in deltas]
    columns = list(zip(*flat, strict=True))
    means = [sum(c) / 3 for c in columns]
    variances = [sum((x - m) ** 2 for x in c) / 3 for c, m in zip(columns, means, strict=True)]
    chosen = sorted(range(12), key=variances.__getitem__)[-3:]
    shares = [sum(x[n] ** 2 for n in chosen) for x in flat]
    shares = [x / sum(shares) for x in shares]
    wanted = [0.0] * 12
    for n in chosen:
        kept = [(w, x) for w, x in zip(shares, columns[n], strict=True) if x * sum(columns[n]) > 0]
        wanted[n] = sum(w * x for w, x in kept) / sum(w for w, _ in kept)
    for order in ([0, 1, 2], [2, 0, 1]):
        found = function("sce")([deltas[n] for n in order], density=0.25)
        assert found.flatten().tolist() == pytest.approx(wanted, abs=1e-6)


def test_sce_in_parts_is_sce_of_the_whole(monkeypatch: Any) -> None:
    deltas = drawn(3, 37, 53)
    whole = function("sce")(deltas, density=0.3)
    monkeypatch.setattr(module("sce"), "PART", 128)
    assert torch.allclose(function("sce")(deltas, density=0.3), whole)


def test_sce_of_tasks_that_agree_is_their_delta() -> None:
    (delta,) = drawn(1, 3, 4)
    assert torch.allclose(function("sce")([delta] * 3, density=0.1), delta)
    assert not function("sce")([torch.zeros(3, 4)] * 2, density=0.1).any()


# --- pcb ---


def balanced(deltas: list[list[float]], density: float) -> list[float]:
    """PCB-Merging of whole task vectors as the paper's code has it, entry by entry."""
    tasks, count = len(deltas), len(deltas[0])
    clipped, weights = [], []
    for mine in deltas:
        sizes = sorted(map(abs, mine))
        low, high = sizes[int(count * 1e-4)], sizes[int(count * (1 - 1e-4) - 1)]
        held = [min(max(abs(x), low), high) for x in mine]
        clipped.append([math.copysign(h, x) if x else 0.0 for h, x in zip(held, mine, strict=True)])
        balance = [
            math.exp(tasks * ((h - low) / (high - low)) ** 2)
            * math.tanh(mine[n] * sum(other[n] for other in deltas))
            for n, h in enumerate(held)
        ]
        least, most = sorted(balance)[int(count * (1 - density))], max(balance)
        weights.append([max(0.0, b - least) / (most - least) for b in balance])
    return [
        sum(c[n] * w[n] for c, w in zip(clipped, weights, strict=True))
        / max(sum(w[n] for w in weights), 1e-12)
        for n in range(count)
    ]


def encoded(deltas: list[Tensor]) -> list[dict[str, Any]]:
    """A delta of (4, 4) as two parameters, (3, 4) and (4,)."""
    return [{"a": dense(x[:3].contiguous()), "b": dense(x[3])} for x in deltas]


@pytest.mark.parametrize("tasks", [2, 3])
def test_pcb_is_its_definition_over_all_parameters_together(tasks: int) -> None:
    deltas = drawn(tasks, 4, 4)
    wanted = balanced([x.flatten().tolist() for x in deltas], 0.4)
    assert 0 < sum(x == 0 for x in wanted) < 14
    for order in (deltas, deltas[::-1]):
        found = dict(module("pcb").balanced(encoded(order), 0.4))
        assert [x.shape for x in found.values()] == [(3, 4), (4,)]
        flat = torch.cat([x.flatten() for x in found.values()])
        assert flat.tolist() == pytest.approx(wanted, abs=1e-5)


def test_pcb_by_hand() -> None:
    """Twelve entries: the largest magnitude is clipped at the second largest, and one entry a task is not dropped.

    The balance is largest where a task's own magnitude and the sum are: 9 there, which becomes 4. Where the tasks cancel
    nothing stays, however large.
    """
    first = torch.tensor([[9.0, 4.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 0.0]]) / 8
    second = torch.tensor([[1.0, -4.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0], [1.0, 1.0, -9.0, 0.0]]) / 8
    (_, found) = next(module("pcb").balanced([{"w": dense(first)}, {"w": dense(second)}], 2 / 12))
    wanted = torch.zeros(3, 4)
    wanted[0, 0], wanted[2, 2] = 0.5, -0.5
    assert torch.equal(found, wanted)


def test_pcb_goes_through_parameters_in_parts_and_counts_ranks_exactly(monkeypatch: Any) -> None:
    pcb, deltas = module("pcb"), drawn(3, 40, 41)
    whole = [dict(pcb.balanced([{"w": dense(x)} for x in deltas], 0.1))["w"]]
    monkeypatch.setattr(pcb, "PART", 128)
    whole.append(dict(pcb.balanced([{"w": dense(x)} for x in deltas], 0.1))["w"])
    assert torch.allclose(*whole, atol=1e-6)
    rows = torch.stack([x.flatten() for x in deltas])
    rows[:, :300] = rows[:, :1]
    found = pcb.ranked(lambda: iter(rows.split(128, 1)), [0, 7, 800, 1639])
    assert torch.equal(found, rows.sort(1).values[:, [0, 7, 800, 1639]])


# --- knots ---


def knotted(deltas: list[Tensor], density: float) -> dict[str, Tensor]:
    """What the file makes of deltas of (4, 4), as two parameters."""
    return dict(module("knots").tied(encoded(deltas), density))


def test_knots_by_hand() -> None:
    """Side by side the rows are orthogonal: the aligned parts are the rows themselves, but for their order and signs.

    The last row is shorter than 1e-5, and its direction left out: eight entries a task, of which a quarter is two.
    """
    first = torch.tensor([[3.0, 0.0, 0.0, 2.0], [0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 2.0**-17, 0.0]])
    second = torch.tensor([[1.0, 0.0, -4.0, -1.0], [0.0, 2.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    whole = [[2.0, 0.0, -4.0, 2.0], [0.0, 1.5, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]
    quarter = [[3.0, 0.0, -4.0, 2.0], [0.0, 2.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]
    pair = [{"w": dense(first)}, {"w": dense(second)}]
    for deltas in (pair, pair[::-1]):
        for density, wanted in ((1.0, whole), (0.25, quarter)):
            ((_, found),) = module("knots").tied(deltas, density)
            assert torch.allclose(found, torch.tensor(wanted), atol=1e-6)
            assert found[2].abs().max() < 1e-9


@pytest.mark.parametrize("density", [1.0, 0.5])
def test_knots_is_ties_of_the_aligned_parts_of_all_parameters_together(density: float) -> None:
    """Aligned by the eigenvectors of the sum of D_t D_t^T, which are the left singular vectors of [D_1 | ... | D_T]."""
    deltas = drawn(3, 4, 4)
    matrices = [x[:3].double() for x in deltas]
    _, basis = torch.linalg.eigh(sum(x @ x.T for x in matrices))
    parts = torch.stack(
        [torch.cat([basis.T @ x, y[3:]]) for x, y in zip(matrices, deltas, strict=True)]
    )
    least = parts.abs().flatten(1).sort(1).values[:, -int(16 * density)].view(3, 1, 1)
    kept = parts.where(parts.abs() >= least * (1 - 1e-6), 0.0)
    agrees = (kept * kept.sum(0)) > 0
    merged = (kept * agrees).sum(0) / agrees.sum(0).clamp_min(1)
    for order in ([0, 1, 2], [1, 2, 0]):
        found = knotted([deltas[n] for n in order], density)
        assert torch.allclose(found["a"].double(), basis @ merged[:3], atol=1e-5)
        assert torch.allclose(found["b"].double(), merged[3], atol=1e-5)


def test_knots_of_one_task_or_of_tasks_that_agree_is_their_delta() -> None:
    (delta,) = drawn(1, 4, 4)
    for tasks in (1, 3):
        found = knotted([delta] * tasks, 1.0)
        assert torch.allclose(found["a"], delta[:3], atol=1e-5)
        assert torch.equal(found["b"], delta[3])


def test_knots_aligns_stacked_matrices_each_by_itself() -> None:
    deltas = drawn(2, 2, 3, 4)
    ((_, stacked),) = module("knots").tied([{"w": dense(x)} for x in deltas], 1.0)
    for n in range(2):
        ((_, one),) = module("knots").tied([{"w": dense(x[n].contiguous())} for x in deltas], 1.0)
        assert torch.allclose(stacked[n], one, atol=1e-5)


@pytest.mark.parametrize("name", ["knots", "pcb"])
def test_what_answers_is_the_shared_vector_scaled(name: str, build: Any) -> None:
    learned = learn(build, name, DELTAS, scale=0.7)
    (answer,) = learned.compose(0)
    assert learned.alive == [*learned.packs, *learned.shared.values()]
    for parameter, vector in learned.shared["vector"].tensors.items():
        assert torch.equal(answer.delta(parameter), decode(vector) * 0.7), parameter
    alone = learn(build, name, DELTAS[:1])
    assert alone.compose(0) == alone.packs and not alone.shared
