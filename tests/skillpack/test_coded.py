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
    shifts = rows((1, 50), 30, seed)[0], rows((1, 40), 30, seed)[0]
    own = torch.arange(count) + 3, rows((count, 40), top, seed + 2)
    sums = codecs.coded_table(left, right, normal((count + 1,), seed), shifts, own, "small")
    for first in (small, table, stack, sums):
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


LEFT = [[1, 0, -2, 0], [0, 3, 0, 0]]
RIGHT = [[1, -1, 0], [0, 5, 4]]


def a_table(own: dict[int, list[int]], layout: codecs.CodeLayout = "small") -> Encoded:
    """Rank 2, scales 0.5 and 2, 0.25 for rows of their own; row 1 is half as fine, column 2 four times as fine."""
    codes = torch.tensor(list(own.values()), dtype=torch.int16).view(-1, 3)
    left, right, down, across = (
        torch.tensor(x, dtype=torch.int16) for x in (LEFT, RIGHT, [0, -1, 0, 0], [0, 0, 2])
    )
    scales, alive = torch.tensor([0.5, 2.0, 0.25]), torch.tensor(list(own), dtype=torch.int64)
    return codecs.coded_table(left, right, scales, (down, across), (alive, codes), layout)


@pytest.mark.parametrize("layout", coded_rows.LAYOUTS)
def test_a_table_by_hand(layout: codecs.CodeLayout) -> None:
    shared = [[0.5, -0.5, 0.0], [0.0, 60.0, 12.0], [-1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]
    assert codecs.decode(a_table({}, layout)).tolist() == shared
    encoded = a_table({1: [-1, 0, 16], 3: [4, 1, -8]}, layout)
    shared[1], shared[3] = [-0.5, 60.0, 14.0], [1.0, 0.25, -0.5]
    assert codecs.decode(encoded).tolist() == shared
    codec = codecs.codec_named("coded_table")
    assert isinstance(codec, codecs.Scattered)
    places, values = codec.entries(encoded)
    assert places.tolist() == [3, 5, 9, 10, 11] and values.tolist() == [-0.5, 2, 1, 0.25, -0.5]


@pytest.mark.parametrize("layout", coded_rows.LAYOUTS)
def test_a_row_of_zeros_has_no_codes_of_its_own(layout: codecs.CodeLayout) -> None:
    """So it is left out when it is written, and refused when it is read."""
    encoded, row = a_table({1: [-1, 0, 16], 3: [4, 1, -8]}, layout), [4, 1, -8]
    assert a_table({0: [0, 0, 0], 3: row}, layout).meta["kept"] == 1
    sizes = [(1, 3), (1, 4), (2, 3), (2, 4), (2, 3)]
    matrices = coded_rows.read(encoded.parts, sizes, encoded.meta)
    matrices[-1][1] = 0
    for kind in (0, 7):  # in a stream, zeros may be coded as any row is
        if layout == "small":
            kinds = [entropy.classes_of(m, 16)[0] for m in matrices]
            kinds[-1][1] = kind
            codes = entropy.encode(matrices, kinds, 16)
            lies, meta = {"kinds": torch.cat(kinds), "codes": codes}, {"bytes": len(codes)}
        else:
            lies, meta = coded_rows.write(matrices, layout)
        forged = dataclasses.replace(encoded, parts=encoded.parts | lies, meta=encoded.meta | meta)
        with pytest.raises(ValueError, match="whose own codes are all zero"):
            codecs.decode(forged)
        if kind == 0 or layout == "fast":
            with pytest.raises(ValueError, match="whose own codes are all zero"):
                codecs.check(forged)


@some
@given(sizes, st.integers(0, 5), st.sampled_from([0, 1, 127]), st.integers(0, 1000))
def test_a_table_is_its_factors_and_its_entries(
    size: tuple[int, int], rank: int, top: int, seed: int
) -> None:
    """Of any shape, also without a row, a rank or a row of its own codes."""
    rank, codec = min(rank, *size), codecs.codec_named("coded_table")
    assert isinstance(codec, codecs.Factored) and isinstance(codec, codecs.Scattered)
    shifts = rows((1, size[0]), 30, seed)[0], rows((1, size[1]), 30, seed + 1)[0]
    matrices = [rows((rank, n), top, seed + n) for n in size]
    own = torch.arange(0, size[0], 2), rows((-(-size[0] // 2), size[1]), top, seed + 2)
    encoded = codecs.coded_table(*matrices, normal((rank + 1,), seed), shifts, own, "fast")
    left, right = torch.empty(size[0], rank), torch.empty(rank, size[1])
    if encoded.shape[0]:
        codec.write_factors(encoded, left, right)
        places, values = codec.entries(encoded)
        assert (places.diff() > 0).all() and values.all()
        found = (left.double() @ right.double()).view(-1).index_add_(0, places, values.double())
        slack = 1e-6 * float((left.abs() @ right.abs()).max()) + 1e-30
        wanted = codecs.decode(encoded).view(-1).double()
        assert torch.allclose(found, wanted, rtol=1e-6, atol=slack)
    assert codecs.decode(encoded).shape == size


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
