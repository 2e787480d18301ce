"""Two packs side by side, against numbers worked by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cl_graft.skillpack import codecs
from cl_graft.skillpack.codecs import Encoded
from cl_graft.skillpack.format.file import SkillPack
from cl_graft.skillpack.tools.compare import TensorComparison, compare


def pack(base: str = "b", **tensors: Tensor | Encoded) -> SkillPack:
    encoded = {n: t if isinstance(t, Encoded) else codecs.dense(t) for n, t in tensors.items()}
    return SkillPack(encoded, task="t", method="m", options={}, base=base)


ONE = torch.tensor([[3.0, 0.0], [0.0, 4.0]])  # norm 5


def test_a_tensor_in_both() -> None:
    other = torch.tensor([[0.0, 3.0], [0.0, 4.0]])
    found = compare(pack(w=ONE), pack(w=codecs.dense(other, torch.float32)))
    (row,) = found.rows
    cosine, difference = 16 / 25, math.sqrt(18) / 5
    assert row == TensorComparison(
        "w", "", "both", "dense", "dense", 8, 16, *map(approx, (cosine, difference))
    )
    assert found.totals == [row._replace(name="all", codec_a=None, codec_b=None)]


def approx(value: float) -> float:
    return pytest.approx(value, abs=1e-12)


def test_a_tensor_in_one_only_counts_as_zero_in_the_total() -> None:
    found = compare(pack(w=ONE, x=2 * ONE), pack(w=ONE, y=ONE))
    assert [(row.name, row.where, row.cosine) for row in found.rows] == [
        ("w", "both", approx(1.0)),
        ("x", "only in a", None),
        ("y", "only in b", None),
    ]
    (total,) = found.totals
    assert total.cosine == approx(25 / math.sqrt(125 * 50))
    assert total.difference == approx(math.sqrt(125 / 125))
    assert (total.bytes_a, total.bytes_b) == (16, 16)


def test_totals_by_role() -> None:
    roles = {"w": "mlp", "x": "mlp", "y": "norm"}
    found = compare(pack(w=ONE, x=ONE, y=ONE, z=ONE), pack(w=ONE, x=-ONE, y=ONE, z=ONE), roles)
    assert [(t.name, t.cosine) for t in found.totals] == [
        ("mlp", approx(0.0)),
        ("norm", approx(1.0)),
        ("", approx(1.0)),
        ("all", approx(0.5)),
    ]


def test_what_is_undefined_is_none() -> None:
    zero = torch.zeros(2, 2)
    found = compare(pack(w=zero, x=ONE), pack(w=ONE, x=torch.ones(3)))
    assert [(row.cosine, row.difference) for row in found.rows] == [(None, None)] * 2
    assert found.totals[0].cosine is None
    empty = compare(pack(), pack())
    assert (empty.rows, empty.totals[0].bytes_a, empty.totals[0].cosine) == ([], 0, None)


def test_small_differences_keep_their_digits() -> None:
    near = ONE + torch.tensor([[0.0, 1e-10], [0.0, 0.0]])
    exact = [codecs.dense(t, torch.float32) for t in (ONE, near)]
    found = compare(pack(w=exact[0]), pack(w=exact[1]))
    assert found.rows[0].difference == pytest.approx(2e-11, rel=1e-4)


def test_bases() -> None:
    assert compare(pack(w=ONE), pack(w=ONE)).same_base
    assert not compare(pack(w=ONE), pack("other", w=ONE)).same_base
