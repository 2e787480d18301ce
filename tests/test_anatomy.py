"""`bench pack --only anatomy`: every statistic on small inputs worked by hand, and the part on a small model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cl_graft.bench import anatomy, bf16_training
from cl_graft.bench.cells import Cells
from cl_graft.bench.deltas import Delta
from cl_graft.bench.guesses import GUESSES
from cl_graft.bench.held_out import HeldOut
from cl_graft.bench.statistics import (
    Beside,
    bf16_difference,
    bits_of_codes,
    direction_energies,
    entropy,
    leading,
)
from cl_graft.bench.table import markdown
from cl_graft.skillpack import codecs
from cl_graft.skillpack.folders.checkpoint import Checkpoint
from cl_graft.skillpack.format.file import SkillPack
from cl_graft.task import Example
from tests.model_folders import llama, saved, tuned

TEXT = [Example("a b c d e"[: 3 + 2 * (i % 4)], " f g") for i in range(24)]


@pytest.fixture(scope="module")
def delta(tmp_path_factory: pytest.TempPathFactory) -> Delta:
    """A Llama of 17 k weights, all of them moved."""
    place = tmp_path_factory.mktemp("delta")
    base, after = saved(llama(), place / "base"), saved(tuned(llama()), place / "tuned")
    return Delta("small", base, after, TEXT, TEXT[:12], 64, TEXT)


def test_entropy_in_bits() -> None:
    """Two of four and one each of two others: 2 * 1 + 1 * 2 + 1 * 2 bits."""
    assert entropy(torch.tensor([2, 1, 0, 1])) == pytest.approx(6.0)
    assert entropy(torch.tensor([5])) == 0.0


def test_bits_of_codes_are_given_the_class() -> None:
    """Class 1 has -1 and 1 in equal parts, class 2 has 7 alone, class 0 counts as nothing."""
    codes = torch.tensor([[1, -1, 1, -1], [7, 7, 7, 7], [0, 0, 0, 0]], dtype=torch.int16)
    classes = torch.tensor([1, 2, 0], dtype=torch.uint8)
    assert bits_of_codes([(codes, classes)]) == (pytest.approx(4.0), 8)
    more = torch.tensor([[1, 1, 1, 1, 1, 1, 1, 1]], dtype=torch.int16)
    bits, count = bits_of_codes([(codes, classes), (more, classes[:1])])  # 10 of 12 are 1
    assert count == 16
    assert bits == pytest.approx(12 * 0.65002242, rel=1e-6)
    assert bits_of_codes([]) == (0.0, 0)


def test_energies_of_directions() -> None:
    """Of a turned diagonal of 3, 2 and 1, wide and tall."""
    angle = torch.tensor(0.3)
    turn = torch.eye(3)
    turn[:2, :2] = torch.tensor([[angle.cos(), -angle.sin()], [angle.sin(), angle.cos()]])
    matrix = turn @ torch.diag(torch.tensor([3.0, 2.0, 1.0])) @ torch.eye(3, 5)
    for x in (matrix, matrix.T):
        found = direction_energies(x)
        torch.testing.assert_close(found, torch.tensor([9.0, 4.0, 1.0]).double(), atol=1e-5, rtol=0)
    assert leading(found, 0.01) == pytest.approx(9, abs=1e-4)
    assert leading(found, 0.67) == pytest.approx(13, abs=1e-4)


def test_a_difference_of_bfloat16() -> None:
    """Around 1 bfloat16 has steps of 2^-7: less than half of one is lost, more is a whole one."""
    before = torch.tensor([1.0, 1.0, 1.0, 2.0**-10])
    after = before + torch.tensor([0.003, 0.005, -0.001, 2.0**-12])
    assert bf16_difference(before, after).tolist() == [0.0, 2.0**-7, 0.0, 2.0**-12]


def test_what_stands_for_a_delta() -> None:
    beside = Beside()
    beside.add(torch.tensor([1.0, 0.0]), torch.tensor([2.0, 2.0]))
    beside.add(torch.tensor([[3.0, 0.0]]), torch.tensor([[2.0, -2.0]]))
    assert beside.energy == pytest.approx(10 / 16)
    assert beside.projection == pytest.approx((2 + 6) / 16)
    assert beside.zero == 0.5


def test_rows_of_seen_tokens() -> None:
    delta = torch.tensor([[3.0, 0.0], [0.0, 1.0], [1.0, 1.0], [1.0, 0.0]])
    assert anatomy.row_energies(delta, torch.tensor([0, 2])) == {
        "rows of seen tokens": 0.5,
        "energy in rows of seen tokens": pytest.approx(11 / 13),
        "energy a row, seen over unseen": pytest.approx(5.5),
    }


def test_bits_and_bytes_of_a_pack_by_role() -> None:
    """One matrix of each codec: codes of both factors in their rows' classes, all bytes of a tensor in its share."""
    codes = torch.tensor([[1, -1, 1, -1], [0, 0, 0, 0]], dtype=torch.int16)
    tensors = {
        "q": codecs.coded_low_rank(codes[:, :3], codes, torch.ones(2), (3, 4)),
        "e": codecs.coded(codes, torch.ones(2), (2, 4)),
        "n": codecs.dense(torch.ones(8)),
    }
    pack = SkillPack(tensors, "t", "m", {}, "0" * 32)
    roles = {"q": "attention", "k": "attention", "e": "embedding", "n": "norm"}
    shapes = {"q": (3, 4), "k": (3, 4), "e": (2, 4), "n": (8,)}
    found = anatomy.code_figures(pack, roles, shapes, "1%")
    size = {name: codecs.payload_bytes(*tensors[name].spec) for name in tensors}
    assert size["n"] == 16
    # 1 -1 1 -1 of right and 1 -1 1 of left: both in the class that is best for magnitudes of 1
    assert found["bits a code, attention, 1%"] == pytest.approx(6.896596 / 7, rel=1e-4)
    assert found["bits a code, embedding, 1%"] == pytest.approx(1.0)
    assert "bits a code, norm, 1%" not in found
    assert found["bits a weight, attention, 1%"] == pytest.approx(8 * size["q"] / 24)
    assert found["share of bytes, norm, 1%"] == pytest.approx(16 / sum(size.values()))


def test_a_delta_of_one_role_is_lost_with_it_alone(delta: Delta, tmp_path: Path) -> None:
    """All else as in the base: without the MLPs' delta everything is lost, without another's nothing."""
    model = tuned(llama())
    start = dict(llama().named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".mlp." not in name:
                parameter.copy_(start[name])
    only = replace(delta, tuned=saved(model, tmp_path / "tuned"))
    found = anatomy.losses(anatomy.Parts(HeldOut(only)))
    assert found.pop("KL without the delta of mlp") == pytest.approx(1.0)
    assert {"attention", "norm", "embedding"} <= {name.split()[-1] for name in found}
    assert all(value == pytest.approx(0, abs=1e-9) for value in found.values())


def test_energies_of_a_delta_by_role(delta: Delta) -> None:
    """By the tensors themselves, with torch's own singular values."""
    found = anatomy.energies(anatomy.Parts(HeldOut(delta)))
    before, after = Checkpoint(delta.base), Checkpoint(delta.tuned)
    change = {n: after.read(n).float() - before.read(n).float() for n in before.floating}
    total = sum(float(d.square().sum()) for d in change.values())
    mlp = [d for n, d in change.items() if ".mlp." in n]
    energy = sum(float(d.square().sum()) for d in mlp)
    assert found["share of the weights' delta, mlp"] == pytest.approx(energy / total, rel=1e-4)
    squares = [torch.linalg.svdvals(d).square() for d in mlp]
    top = sum(float(s[: max(1, round(0.1 * len(s)))].sum()) for s in squares)
    assert found["top 10% of directions, mlp"] == pytest.approx(top / energy, rel=1e-4)
    zeros = [(after.read(n).bfloat16() == before.read(n).bfloat16()).float().mean() for n in change]
    sizes = torch.tensor([float(d.numel()) for d in change.values()])
    zero = float((torch.stack(zeros) * sizes).sum() / sizes.sum())
    assert found["bf16 difference, entries that are zero"] == pytest.approx(zero, rel=1e-4)
    grid = {n: before.read(n).bfloat16().float() for n in change}
    sums = {n: (grid[n] + d).bfloat16().float() - grid[n] for n, d in change.items()}
    along = sum(float((sums[n] * d).sum()) for n, d in change.items())
    key = "bf16 difference from a bf16 base, projection on the delta"
    assert found[key] == pytest.approx(along / total, rel=1e-4)
    alike = [(before.read(n) == grid[n]).float().mean() for n in change]
    assert found["values of the base that bf16 has"] == pytest.approx(
        float((torch.stack(alike) * sizes).sum() / sizes.sum()), rel=1e-4
    )


def test_weights_in_bfloat16_that_are_too_large_never_move(delta: Delta) -> None:
    """The first step of AdamW is the learning rate, 2e-5: beyond 2^-6 that is less than half of bfloat16's spacing."""
    found = bf16_training.train_in_bf16(HeldOut(delta), 2)
    again = bf16_training.train_in_bf16(HeldOut(delta), 2)
    for name, moved in found.moved.items():
        before, after = found.before[name], found.after[name]
        assert before.dtype == after.dtype == torch.bfloat16
        assert torch.equal(after, again.after[name])
        assert torch.equal(after[~moved], before[~moved])
        assert not moved[before.abs() >= 2.0**-6].any()
    assert any(moved.any() for moved in found.moved.values())
    norms = [m for n, m in found.moved.items() if "norm" in n]
    assert norms and not any(m.any() for m in norms)


def test_the_part_measures_each_group_once_and_sets_the_guesses_beside(
    delta: Delta, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        anatomy, "smollm2_delta", lambda steps, *given: replace(delta, name=f"{steps} steps")
    )
    monkeypatch.setattr(
        anatomy, "embedded_deltas", lambda data_dir: [replace(delta, name="mini, code")]
    )
    monkeypatch.setattr(anatomy, "BUDGETS", ("40%",))
    monkeypatch.setattr(anatomy, "EMBEDDED_BUDGETS", ("40%",))
    monkeypatch.setattr(
        anatomy, "kept_in_bf16", lambda parts, steps: {"kept in bf16, weights that never move": 0.5}
    )
    said: list[str] = []
    cells = Cells(tmp_path, said.append)
    part = anatomy.anatomy(None, cells)
    assert len(said) == 10  # weights, loss and codes of three deltas, and the training
    assert anatomy.anatomy(None, cells) == part and len(said) == 10
    rows = {(row["delta"], row["figure"]): row for row in part["rows"]}
    figures = {figure for of, figure in rows if of == "12 steps"}
    row = rows["300 steps", "top 1% of directions, mlp"]
    assert row["guess"] == GUESSES["top 1% of directions, mlp"][1] and 0 < row["measured"] < 1
    shares = [rows["12 steps", f]["measured"] for f in figures if f.startswith("share of bytes")]
    assert sum(shares) == pytest.approx(1.0)
    assert rows["mini, code", "KL without the delta of norm"]["guess"] is None
    known = {name for name in GUESSES if not name.endswith("%") and "kept in bf16" not in name}
    assert known <= figures  # no guess is of a figure that there is not
    table = markdown({"anatomy": part})
    assert "| 12 steps, kept in bf16, weights that never move | 0.5 | guessed 0.93 |" in table
    assert "| mini, code, rows of seen tokens | " in table and "no guess" in table
