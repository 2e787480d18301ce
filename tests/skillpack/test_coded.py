"""Rows of whole numbers, entropy-coded or packed: the same numbers in both, near the entropy, and nothing by chance."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cl_graft.skillpack import codecs
from cl_graft.skillpack.codecs import Encoded, coded_rows, entropy
from tests.skillpack.tensors import normal

some = settings(max_examples=40, deadline=None)
sizes = st.tuples(st.integers(0, 12), st.integers(1, 40))


def rows(size: tuple[int, int], top: int, seed: int) -> Tensor:
    """Codes of rows of very different size, int16."""
    scale = torch.logspace(0, -3, max(1, size[0]))[: size[0], None]
    return (normal(size, seed) * scale * top).round().clamp(-top, top).to(torch.int16)


@some
@given(
    sizes,
    st.sampled_from([0, 1, 2, 9, 127, 128, entropy.TOP]),
    st.integers(0, 1000),
    st.sampled_from(coded_rows.LAYOUTS),
)
def test_what_is_written_is_read(size: tuple[int, int], top: int, seed: int, layout) -> None:
    matrices = [rows(size, top, seed), rows((size[0], 5), top, seed + 1)]
    shapes = [tuple(m.shape) for m in matrices]
    parts, meta = coded_rows.write(matrices, layout)
    assert parts["codes"].numel() == meta["bytes"]
    wanted = coded_rows.layout_of(shapes, meta, empty=False)
    assert {n: (p.dtype, tuple(p.shape)) for n, p in parts.items()} == wanted
    coded_rows.check(parts, shapes, meta)
    for found, given_ in zip(coded_rows.read(parts, shapes, meta), matrices, strict=True):
        assert torch.equal(found, given_)


@some
@given(st.integers(1, 30), st.sampled_from([0, 1, 7, 300]), st.integers(0, 1000))
def test_layouts_convert_into_one_another_to_the_byte(count: int, top: int, seed: int) -> None:
    left, right = rows((count, 50), top, seed), rows((count, 40), top, seed + 1)
    small = codecs.coded_low_rank(left, right, normal((count,), seed), (50, 40), "small")
    table = codecs.coded(left, normal((count,), seed), (count, 5, 10), "small", normal((50,), 1))
    stack = codecs.coded_low_rank_stack([None, small], (2, 50, 40), "small")
    for first in (small, table, stack):
        fast = codecs.relaid(first, "fast")
        again = codecs.relaid(fast, "small")
        assert codecs.layout_name(fast) == "fast" and again.meta == first.meta
        assert all(torch.equal(again.parts[name], part) for name, part in first.parts.items())
        assert torch.equal(codecs.decode(fast), codecs.decode(first))


def test_the_delta_by_hand() -> None:
    left = torch.tensor([[1, 0, -2], [0, 3, 0]], dtype=torch.int16)
    right = torch.tensor([[1, -1], [0, 5]], dtype=torch.int16)
    matrix = codecs.coded_low_rank(left, right, torch.tensor([0.5, 2.0]), (3, 2))
    assert codecs.decode(matrix).tolist() == [[0.5, -0.5], [0.0, 30.0], [-1.0, 1.0]]
    table = codecs.coded(left, torch.tensor([0.5, 2.0]), (2, 3), columns=torch.tensor([1.0, 2, 4]))
    assert codecs.decode(table).tolist() == [[0.5, 0.0, -4.0], [0.0, 12.0, 0.0]]


def test_a_factor_is_what_the_delta_is_the_product_of() -> None:
    encoded = codecs.coded_low_rank(
        rows((4, 9), 90, 1), rows((4, 7), 90, 2), normal((4,), 3), (9, 7)
    )
    codec = codecs.codec_named("coded_low_rank")
    assert isinstance(codec, codecs.Factored)
    left, right = torch.empty(9, 4), torch.empty(4, 7)
    codec.write_factors(encoded, left, right)
    assert torch.equal(left @ right, codecs.decode(encoded))


@pytest.mark.parametrize("spread", [0.05, 0.3, 1.0, 4.0, 40.0])
@pytest.mark.parametrize("kind", ["normal", "laplace"])
def test_bytes_are_within_two_percent_of_the_entropy(spread: float, kind: str) -> None:
    """Of codes whose distribution is known: that of rounded values of a normal or a Laplace distribution."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 4096, generator=generator)
    if kind == "laplace":
        x = (
            torch.rand(64, 4096, generator=generator).clamp_min(1e-9).log()
            * x.sign()
            / math.sqrt(2)
        )
    codes = (x * spread).round().to(torch.int16)
    counts = codes.unique(return_counts=True)[1].double()
    share = counts / counts.sum()
    least = float(-(share * share.log2()).sum()) * codes.numel() / 8
    parts, _ = coded_rows.write([codes], "small")
    assert sum(part.numel() for part in parts.values()) < 1.02 * least + 200


@pytest.mark.parametrize("top", [0, 1, 5, 300, entropy.TOP])
def test_a_table_is_a_distribution_of_whole_parts(top: int) -> None:
    for kind in range(1, entropy.CLASSES):
        table = entropy.frequencies(kind, top)
        assert len(table) == 2 * top + 1 and table.sum() == entropy.PARTS and table.min() >= 1
        assert (table == table[::-1]).all() and (table[top:-1] >= table[top + 1 :]).all()


def test_a_class_has_the_mean_magnitude_that_it_is_named_for() -> None:
    for scale in range(0, 30, 3):
        wanted = 2.0 ** (scale / 2 - 7)
        top = math.ceil(12 * wanted + 4)  # every code has one part, so far ones would count
        table = entropy.frequencies(1 + scale, top) / entropy.PARTS
        mean = float((torch.arange(-top, top + 1).abs().numpy() * table).sum())
        assert mean == pytest.approx(wanted, rel=0.02)


def coded_tensor(layout: str) -> Encoded:
    return codecs.coded_low_rank(
        rows((6, 33), 40, 1), rows((6, 21), 40, 2), normal((6,), 3), (33, 21), layout
    )


@pytest.mark.parametrize("layout", coded_rows.LAYOUTS)
def test_a_flipped_bit_is_refused_or_says_something_else_without_harm(layout: str) -> None:
    """Parts are under a checksum; what passes one that was made for it is a tensor of the right shape."""
    encoded = coded_tensor(layout)
    same, refused = 0, 0
    for name in ("kinds", "codes"):
        for place in range(encoded.parts[name].numel()):
            for bit in (1, 64):
                part = encoded.parts[name].clone()
                part[place] ^= bit
                changed = dataclasses.replace(encoded, parts=encoded.parts | {name: part})
                try:
                    delta = codecs.decode(changed)
                except ValueError:
                    refused += 1
                    continue
                assert delta.shape == (33, 21)
                same += torch.equal(delta, codecs.decode(encoded))
    assert same == 0 and refused > 0


@pytest.mark.parametrize("layout", coded_rows.LAYOUTS)
def test_too_few_and_too_many_bytes_are_refused(layout: str) -> None:
    encoded = coded_tensor(layout)
    for codes in (
        encoded.parts["codes"][:-4],
        torch.cat([encoded.parts["codes"], torch.ones(4, dtype=torch.uint8)]),
    ):
        meta = encoded.meta | {"bytes": len(codes)}
        changed = dataclasses.replace(encoded, parts=encoded.parts | {"codes": codes}, meta=meta)
        with pytest.raises(ValueError):
            codecs.decode(changed)


def test_a_top_that_no_code_has_is_refused() -> None:
    encoded = coded_tensor("small")
    with pytest.raises(ValueError):
        codecs.decode(dataclasses.replace(encoded, meta=encoded.meta | {"top": 41}))


def test_a_code_that_is_too_large_is_refused() -> None:
    with pytest.raises(ValueError, match="from 0 to 8191"):
        codecs.coded(torch.full((1, 2), 8192, dtype=torch.int16), torch.ones(1), (2,))
