"""O-LoRA's two terms by brute force on small matrices, their gradients, and what the log and the packs say."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from cl_graft import plugins
from cl_graft.stream import benchmark

OLD = {"q.weight": torch.tensor([[1.0, -2.0, 0.0], [0.0, 1.0, 1.0], [3.0, 0.0, 0.0]])}
COLUMNS = ("orthogonal", "norms", "norm_a", "norm_b")


@pytest.fixture
def penalty():
    return sys.modules[plugins.load("strategy", "o_lora").__module__].penalty


class Layer(nn.Module):
    """What PEFT leaves of a layer that has an adapter, as far as a penalty looks at it."""

    def __init__(self, a, b):
        super().__init__()
        self.lora_A, self.lora_B = nn.ModuleDict(), nn.ModuleDict()
        for of, value in ((self.lora_A, a), (self.lora_B, b)):
            of["default"] = nn.Linear(len(value[0]), len(value), bias=False)
            of["default"].weight = nn.Parameter(torch.tensor(value))


def model_of(**layers):
    inner = nn.Module()
    for name, layer in layers.items():
        inner.add_module(name, layer)
    model = nn.Module()
    model.base_model = nn.Module()
    model.base_model.model = inner
    return model


@pytest.fixture
def two():
    """Layers q (rank 2, 3 -> 1) and v (rank 1, 2 -> 2); only q was adapted before."""
    q = Layer([[1.0, 1.0, 0.0], [0.0, 0.0, -2.0]], [[3.0, 4.0]])
    v = Layer([[0.0, 2.0]], [[0.0], [0.0]])
    return model_of(q=q, v=v)


def test_the_overlap_is_the_sum_of_magnitudes_of_every_pair_of_rows(penalty, two):
    """Rows of old A: (1 -2 0), (0 1 1), (3 0 0); of the new: (1 1 0), (0 0 -2). Products: -1 0, 1 -2, 3 0."""
    found = penalty(two, {}, None, OLD, lambda_1=0.5, lambda_2=0.0)
    assert tuple(found) == COLUMNS
    new = two.base_model.model.q.lora_A["default"].weight
    brute = sum(
        abs(sum(float(o) * float(n) for o, n in zip(row, other, strict=True)))
        for row in OLD["q.weight"]
        for other in new
    )
    assert brute == 7
    assert found["orthogonal"].item() == 0.5 * 7
    found["orthogonal"].backward()
    # d/dA_new = 0.5 sign(A_old A_new^T)^T A_old; magnitudes at zero have no slope
    wanted = 0.5 * torch.tensor([[-1.0 + 3, 2 + 1, 1], [0, -1, -1]])
    assert torch.equal(new.grad, wanted)
    assert two.base_model.model.v.lora_A["default"].weight.grad is None


def test_a_step_down_the_gradient_lowers_the_overlap(penalty, two):
    new = two.base_model.model.q.lora_A["default"].weight

    def overlap():
        return penalty(two, {}, None, OLD, lambda_1=1.0, lambda_2=0.0)["orthogonal"]

    before = overlap()
    before.backward()
    with torch.no_grad():
        new -= 0.01 * new.grad
    assert overlap() < before


def test_norms_are_frobenius_norms_of_both_factors_of_every_layer(penalty, two):
    """||A||: sqrt 6 and 2; ||B||: 5 and 0, where there is no slope."""
    found = penalty(two, {}, None, OLD, lambda_1=0.5, lambda_2=0.3)
    assert found["norms"].item() == pytest.approx(0.3 * (6**0.5 + 2 + 5))
    assert found["norm_a"].item() == pytest.approx((6**0.5 + 2) / 2)
    assert found["norm_b"].item() == pytest.approx(5 / 2)
    assert not found["norm_a"].requires_grad and not found["norm_b"].requires_grad
    found["norms"].backward()
    q, v = two.base_model.model.q, two.base_model.model.v
    assert torch.allclose(q.lora_B["default"].weight.grad, 0.3 * torch.tensor([[0.6, 0.8]]))
    assert torch.equal(v.lora_B["default"].weight.grad, torch.zeros(2, 1))


@pytest.fixture(scope="module")
def learned():
    return {}


@pytest.fixture
def played(learned, build, tiny_scenario):
    """One strategy, which has learned both tasks with a rank of 2, for all that is asked of it."""
    if not learned:
        strategy = build("o_lora", rank=2, lambda_2=0.01)
        for experience in benchmark(tiny_scenario).train_stream:
            strategy.train(experience, eval_streams=[])
        learned["it"] = SimpleNamespace(strategy=strategy, losses=strategy.log.losses)
    return learned["it"]


def test_every_term_has_a_column_of_its_own_and_the_first_task_no_overlap(played):
    first, second = played.losses[: len(played.losses) // 2], played.losses[-1:]
    for line in played.losses:
        assert {f"o_lora.{name}" for name in COLUMNS} <= set(line)
    assert all(line["o_lora.orthogonal"] == 0 for line in first)
    assert second[0]["o_lora.orthogonal"] > 0 and second[0]["o_lora.norms"] > 0


def test_all_adapters_are_active_and_the_old_one_is_what_it_was(played):
    strategy = played.strategy
    assert strategy.keeps == "sum" and strategy.compose(0) == strategy.packs
    assert strategy.compose(None) == strategy.packs
    for pack in strategy.packs:
        assert {e.meta["rank"] for e in pack.tensors.values()} == {2}
        assert pack.nbytes <= strategy.budget.bytes


def test_a_large_weight_keeps_the_new_rows_off_the_old_ones(build, played, tiny_scenario):
    """From the same first adapter, the overlap that is left after a task falls with lambda_1."""
    left = []
    for weight in (0.0, 5.0):
        strategy = build("o_lora", rank=2, lambda_1=weight)
        strategy.packs = played.strategy.packs[:1]
        strategy.train(benchmark(tiny_scenario).train_stream[1], eval_streams=[])
        old, new = (p.tensors for p in strategy.packs)
        left.append(
            sum(
                (old[n].parts["right"].float() @ new[n].parts["right"].float().T).abs().sum().item()
                for n in old
            )
        )
    assert left[1] < left[0]
