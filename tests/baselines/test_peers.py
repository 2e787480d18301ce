"""What is ours beside what other libraries make of the same deltas, where they are installed.

docs/how-libraries-differ.md has what they do otherwise; here is where they agree, and by how little they do not.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cl_graft import plugins
from cl_graft.strategy.fisher import fisher
from tests.baselines.drawn import entries, learn
from tests.baselines.methods import module


def drawn(tasks: int = 3, count: int = 500) -> Tensor:
    seed = torch.Generator().manual_seed(5)
    return torch.randn(tasks, count, generator=seed) * 1e-3


def function(name: str) -> Any:
    return plugins.load("strategy", name).function


def test_ties_is_fusion_benchs_mean_which_keeps_one_entry_a_task_more() -> None:
    peer = pytest.importorskip("fusion_bench.method.ties_merging.ties_merging_utils")
    deltas = drawn()
    theirs = peer.ties_merging(deltas.clone(), 20, "mean")
    for more, same in ((0, False), (1, True)):
        thresholds = [float(x.abs().sort().values[-100 - more]) for x in deltas]
        ours = function("ties")(list(deltas), thresholds, density=0.2, scale=1.0)
        assert torch.allclose(ours, theirs, atol=1e-9) is same


def test_magmax_and_emr_elect_what_fusion_bench_elects(build: Any) -> None:
    magmax = pytest.importorskip("fusion_bench.method.magmax.magmax")
    emr = pytest.importorskip("fusion_bench.method.emr_merging.utils")
    deltas = drawn()
    largest = magmax._magmax_select([{"w": x} for x in deltas])["w"]
    assert torch.equal(module("magmax").largest(list(deltas)), largest)
    given = [[4.0, 2.0, 1.0, 1.0], [0.5, -4.0, -1.0, -1.0], [-0.5, -1.0, 4.0, 0.0]]
    vector, masks, _ = emr.emr_merge([{"w": torch.tensor(x)} for x in given])
    learned = learn(build, "emr", given)
    assert entries(learned.shared["vector"], 4) == vector["w"].tolist()
    for pack, mask in zip(learned.packs, masks["w"], strict=True):
        name = f"{pack.task}/model.norm.weight"
        assert entries(learned.shared["masks"], 4, name) == mask.float().tolist()


def test_masks_of_tall_are_fusion_benchs_of_whole_vectors(build: Any) -> None:
    peer = pytest.importorskip("fusion_bench.method.tall_mask.utils")
    given = [[4.0, 2.0, 1.0, 0.0], [0.5, 2.0, -1.0, 0.0], [-0.5, 2.0, 4.0, 0.0]]
    deltas, base = torch.tensor(given), torch.full((4,), 2.0)
    masks = peer.generate_task_masks(deltas, base + deltas, base, tall_mask_lambda=0.4)
    learned = learn(build, "tall_mask", given, mask_lambda=0.4)
    for pack, mask in zip(learned.packs, masks, strict=True):
        name = f"{pack.task}/model.norm.weight"
        assert entries(learned.shared["masks"], 4, name) == mask.float().tolist()


def test_sce_is_mergekits_where_every_entry_varies_and_the_deltas_are_not_small() -> None:
    peer = pytest.importorskip("mergekit.merge_methods.sce")
    deltas = drawn() * torch.tensor([1e3, 2e3, 3e3])[:, None]
    for factor, same in ((1.0, True), (1e-4, False)):
        scaled = deltas * factor
        chosen = scaled * peer.sce_mask(scaled, 0.1).reshape(-1, 500)[-1]
        weights = peer.sce_weight(chosen)
        squares = chosen.square().sum(1)
        assert torch.allclose(weights, squares / squares.sum(), atol=1e-6) is same
        agrees = chosen * torch.where(chosen.sum(0) >= 0, 1.0, -1.0) > 0
        shares = weights[:, None] * agrees
        theirs = (shares * chosen).sum(0) / shares.sum(0).clamp_min(1e-6)
        ours = function("sce")(list(scaled), density=0.1)
        assert torch.allclose(ours, theirs, atol=1e-6 * factor) is same


class Model(nn.Module):
    """A classifier with the call of a language model: what `fisher` asks for."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(6, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Any:
        out = self.layer(input_ids)
        loss = nn.functional.cross_entropy(out, labels[:, 0])
        return type("Output", (), {"loss": loss})


@pytest.mark.parametrize(("batch", "same"), [(1, True), (8, False)])
def test_ewcs_importance_is_avalanches_at_batches_of_one(batch: int, same: bool) -> None:
    """Of larger batches Avalanche squares the mean gradient."""
    from avalanche.training.plugins import EWCPlugin
    from torch.utils.data import Dataset

    model, rows = Model(), torch.randn(16, 6, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(16) % 3

    class Rows(Dataset):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return 16

        def __getitem__(self, n: int) -> tuple[Tensor, Tensor, int]:
            return rows[n], labels[n], 0

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = nn.functional.cross_entropy
    theirs = EWCPlugin(1.0).compute_importances(model.layer, loss, optimizer, Rows(), "cpu", batch)
    given = {"input_ids": rows, "attention_mask": torch.ones(16, 6), "labels": labels[:, None]}
    ours = fisher(model, given)
    for name, importance in theirs.items():
        found = torch.allclose(ours[f"layer.{name}"], importance.data, atol=1e-7)
        assert found is same, name
