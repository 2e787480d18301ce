"""What `pack create` says of the base's dtype, against sums that are worked by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from cl_graft.skillpack import codecs
from cl_graft.skillpack.compress.create import create
from cl_graft.skillpack.compress.dtype_cost import dtype_costs, told
from cl_graft.skillpack.folders.checkpoint import Checkpoint
from tests.model_folders import llama, saved, tuned

STEP = 2.0**-7  # of bfloat16 at 1


def checkpoint(folder: Path, **tensors: Tensor) -> Checkpoint:
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return Checkpoint(folder)


def ones(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.bfloat16)


@pytest.mark.parametrize("transposed", [False, True])
def test_an_eighth_of_a_step(transposed: bool, tmp_path: Path) -> None:
    """Nearest leaves nothing; an eighth of the entries move by a whole step: error sqrt(1/8 * 7/8) steps an entry."""
    base = checkpoint(tmp_path, w=ones(600, 500))
    delta = codecs.dense(torch.full((600, 500), STEP / 8), torch.float32)
    (mlp, every) = dtype_costs(base, [("w", "mlp", transposed)], lambda name: delta)
    assert (mlp.role, every.role) == ("mlp", "all") and mlp.row() | {"role": "all"} == every.row()
    row = mlp.row()
    assert row["delta / weights"] == pytest.approx(STEP / 8, rel=0.01)
    assert (row["nearest: kept"], row["nearest: error / delta"]) == (0, 1)
    assert row["stochastic: kept"] == pytest.approx(1, abs=0.03)
    assert row["stochastic: error / delta"] == pytest.approx(math.sqrt(7), rel=0.02)
    assert mlp.delta == pytest.approx(
        300_000 * (STEP / 8) ** 2
    )  # of all rows, not of those looked at
    sentence = told([every], torch.bfloat16)
    assert "base's bfloat16 rounding to nearest would keep 0.0%" in sentence


def test_the_share_kept_is_the_projection_on_the_delta(tmp_path: Path) -> None:
    """Three quarters of a step go up by a whole one, three eighths go nowhere: (3/4 * 1) of (3/4)^2 + 3 (3/8)^2."""
    base = checkpoint(tmp_path, w=ones(64, 4))
    change = torch.full((64, 4), 3 * STEP / 8)
    change[:, 0] = 0.75 * STEP
    encoded = codecs.dense(change, torch.float32)
    row = dtype_costs(base, [("w", "mlp", False)], lambda name: encoded)[0].row()
    assert row["nearest: kept"] == pytest.approx(0.75 / (0.75**2 + 3 * 0.375**2), rel=0.01)


def test_only_what_has_a_narrow_dtype_counts(tmp_path: Path) -> None:
    tensors = {"wide": torch.ones(4, 4), "norm": ones(8), "scalar": ones(), "grown": ones(4, 4)}
    base = checkpoint(tmp_path, **tensors)
    shapes = {"wide": (4, 4), "norm": (8,), "scalar": (), "grown": (6, 4), "added": (2, 2)}
    encoded = {n: codecs.dense(torch.full(s, STEP / 8), torch.float32) for n, s in shapes.items()}
    names = [(name, "norm" if name == "norm" else "other", False) for name in shapes]
    costs = {cost.role: cost for cost in dtype_costs(base, names, encoded.__getitem__)}
    assert list(costs) == ["norm", "other", "all"]
    per = (STEP / 8) ** 2
    assert costs["norm"].delta == pytest.approx(8 * per)
    assert costs["all"].delta == pytest.approx((8 + 1 + 16) * per)  # rows that are new are no sum
    assert dtype_costs(base, [("wide", "mlp", False)], encoded.__getitem__) == []


def test_create_tells_it_for_a_narrow_base_alone(tmp_path: Path) -> None:
    model = llama()
    wide = saved(model, tmp_path / "wide")
    base = saved(model.bfloat16(), tmp_path / "base")
    folder = saved(tuned(model.float()), tmp_path / "tuned")
    made = create(base, folder, tmp_path / "pack", budget="400%")
    assert [row["role"] for row in made.rounding][-1] == "all"
    assert {"embedding", "attention", "mlp", "norm"} <= {row["role"] for row in made.rounding}
    assert sum("base's bfloat16" in note for note in made.notes) == 1
    assert 0.98 < made.rounding[-1]["stochastic: kept"] < 1.02
    made = create(wide, folder, tmp_path / "other", budget="400%")
    assert made.rounding == [] and not any("stochastic" in note for note in made.notes)
