"""SLAO: the orthonormal start, the merge by hand over three tasks, and the bytes of what it keeps."""

from __future__ import annotations

from math import sqrt

import pytest
import torch

from cl_graft.strategy.storage import alive
from cl_graft.stream import benchmark
from cl_graft.task import Example, Scenario, Task
from cl_graft.training.adapters import adapted_layers, down
from tests.baselines.methods import learn, module

NAME = "model.layers.0.self_attn.q_proj.weight"


def test_a_hand_worked_start():
    """Rows (3 4 0) and (0 0 -2) are at right angles: each is divided by its length, and its sign stays."""
    found = module("slao").orthonormal(torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.0, -2.0]]))
    torch.testing.assert_close(found, torch.tensor([[0.6, 0.8, 0.0], [0.0, 0.0, -1.0]]))


def test_the_start_is_orthonormal_of_the_same_rows_and_the_only_one_with_a_positive_diagonal():
    a = torch.randn(4, 3, 7, generator=torch.Generator().manual_seed(0))  # of four experts
    q = module("slao").orthonormal(a)
    torch.testing.assert_close(q @ q.mT, torch.eye(3).expand(4, 3, 3), atol=1e-5, rtol=0)
    r = q @ a.mT  # A^T = Q R
    torch.testing.assert_close(q.mT @ r, a.mT, atol=1e-5, rtol=1e-4)
    assert (r.diagonal(dim1=-2, dim2=-1) > 0).all() and r.tril(-1).abs().max() < 1e-5


@pytest.fixture
def played(build, monkeypatch):
    """Three tasks of which training makes given A and B, and where it started each time."""
    rows = (Example("1+1=", "2"),)
    tasks = tuple(Task(f"task-{n}", rows, rows, "exact") for n in range(3))
    strategy = build("slao", "50%", Scenario("drawn", tasks), rank=2)
    starts, ends = [], []

    def teach(model, task, terms=()):
        layer = adapted_layers(model)[NAME]
        b = layer.lora_B["default"].weight
        starts.append((down(layer).detach().clone(), b.detach().clone()))
        seed = torch.Generator().manual_seed(len(starts))
        with torch.no_grad():
            for x in (down(layer), b):
                x.copy_(torch.randn(x.shape, generator=seed).bfloat16().float())
        ends.append((down(layer).detach().clone(), b.detach().clone()))

    monkeypatch.setattr(strategy, "teach", teach)
    packs = []
    for experience in benchmark(strategy.scenario).train_stream:
        strategy.train(experience, eval_streams=[])
        packs.append(strategy.packs[-1].decode()[NAME])
    return strategy, starts, ends, packs


def test_each_task_starts_from_the_last_ones_tuning_and_not_from_what_was_merged(played):
    _, starts, ends, _ = played
    assert starts[0][1].abs().max() == 0, "of the first task B is zero, as in LoRA"
    for (a, b), (last_a, last_b) in zip(starts[1:], ends, strict=False):
        torch.testing.assert_close(a, module("slao").orthonormal(last_a))
        assert torch.equal(b, last_b)


def test_what_answers_has_the_newest_a_and_the_average_of_every_b(played):
    """B_2 = B_1 + (B_ft - B_1) / sqrt 2, then / sqrt 3; the delta is 2 B A, kept in bf16."""
    strategy, _, ends, packs = played
    merged = ends[0][1]
    for number, (pack, (a, b)) in enumerate(zip(packs, ends, strict=True), 1):
        merged = merged + (b - merged) / sqrt(number)
        torch.testing.assert_close(pack, 2 * merged @ a, rtol=0.05, atol=0.05)
    assert strategy.compose(0) == [strategy.packs[-1]], "one adapter, for every task"


def test_both_adapters_fit_the_budget_and_the_rank_stays(build, tiny_scenario):
    """A run of real training; without a rank the largest of which two fit."""
    strategy = learn(build("slao"), tiny_scenario)
    ranks = [{e.meta["rank"] for e in pack.tensors.values()} for pack in strategy.packs]
    assert ranks[0] == ranks[1] and len(ranks[0]) == 1
    kept = alive(strategy.packs, strategy.shared, newest=True)
    assert sum(pack.nbytes for pack in kept) <= strategy.budget.bytes
    (rank,) = ranks[0]
    with pytest.raises(Exception, match=f"slao.rank={rank + 1} takes .* that fits is {rank}"):
        build("slao", rank=rank + 1).require_possible()
    for name, b in strategy.shared["tuned"].tensors.items():
        assert b.parts["values"].dtype == torch.bfloat16
        assert b.parts["values"].shape[-1] == rank, name
