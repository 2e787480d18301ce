"""Bit packing against a reader that goes bit by bit."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cl_graft.skillpack.codecs import packing
from cl_graft.skillpack.codecs.quant import BITS, Quantized

few = settings(max_examples=60, deadline=None)


def read_bits(data: list[int], count: int, width: int) -> list[int]:
    """Values of `width` bits from a stream, its lowest bit first; wide values plane by plane."""
    if width > 8:
        high = read_bits(data[count:], count, width - 8)
        return [low + 256 * rest for low, rest in zip(data[:count], high, strict=True)]
    bits = [byte >> i & 1 for byte in data for i in range(8)]
    return [sum(bits[n * width + i] << i for i in range(width)) for n in range(count)]


def test_three_bits_by_hand() -> None:
    # 1, 2, 7 -> 001, 010, 111, lowest bit first: 100 010 11 | 1 -> 0b11010001, 0b1
    packed = packing.pack(torch.tensor([1, 2, 7]), 3)
    assert packed.tolist() == [0b11010001, 0b1]
    assert packing.unpack(packed, 3, 3).tolist() == [1, 2, 7]


@few
@given(st.integers(1, 48), st.integers(0, 40), st.randoms(use_true_random=False))
def test_every_width_round_trips_in_the_fewest_bytes(
    width: int, count: int, rng: random.Random
) -> None:
    values = [rng.randrange(2**width) for _ in range(count)]
    packed = packing.pack(torch.tensor(values, dtype=torch.int64), width)
    assert packed.dtype == torch.uint8
    assert packed.numel() == packing.packed_bytes(count, width) == (count * width + 7) // 8
    assert read_bits(packed.tolist(), count, width) == values
    assert packing.unpack(packed, count, width).tolist() == values


@pytest.mark.parametrize("width", BITS)
def test_uint8_and_int64_pack_alike(width: int) -> None:
    values = torch.randint(0, 2**width, (5, 7), generator=torch.Generator().manual_seed(0))
    assert torch.equal(packing.pack(values, width), packing.pack(values.to(torch.uint8), width))


@pytest.mark.parametrize(("value", "width"), [(4, 2), (-1, 2), (256, 8), (1 << 20, 20)])
def test_a_value_that_does_not_fit_is_refused(value: int, width: int) -> None:
    with pytest.raises(ValueError, match=f"does not fit in {width} bits"):
        packing.pack(torch.tensor([0, value]), width)


@pytest.mark.parametrize("width", [0, 49])
def test_widths_are_1_to_48(width: int) -> None:
    with pytest.raises(ValueError, match="not between 1 and 48"):
        packing.pack(torch.tensor([0]), width)


def test_a_list_of_values_has_one_packing() -> None:
    packed = packing.pack(torch.tensor([1, 2, 3]), 2)
    packed[-1] |= 0b1000000
    with pytest.raises(ValueError, match="not zero"):
        packing.unpack(packed, 3, 2)
    for wrong in (packed[:0], torch.cat([packed, packed])):
        with pytest.raises(ValueError, match="cannot hold 3 values"):
            packing.unpack(wrong, 3, 2)


def test_gap_code_by_hand() -> None:
    # gaps before 0, 2 and 9 are 0, 1 and 6; in 2 bits, 3 skips three places without marking one
    tokens = packing.gap_code(torch.tensor([0, 2, 9]), 2)
    assert tokens.tolist() == [0, 1, 3, 3, 0]
    assert packing.gap_decode(tokens, 2, 10).tolist() == [0, 2, 9]


positions = st.integers(1, 300).flatmap(
    lambda numel: st.tuples(st.just(numel), st.sets(st.integers(0, numel - 1)))
)


@few
@given(positions, st.integers(1, 12))
def test_gap_codes_round_trip(case: tuple[int, set[int]], width: int) -> None:
    numel, kept = case
    tokens = packing.gap_code(torch.tensor(sorted(kept), dtype=torch.int64), width)
    assert all(0 <= token < 2**width for token in tokens.tolist())
    assert packing.gap_decode(tokens, width, numel).tolist() == sorted(kept)


@few
@given(positions)
def test_the_shortest_index_is_taken_and_its_size_is_exact(case: tuple[int, set[int]]) -> None:
    numel, kept = case
    where = torch.tensor(sorted(kept), dtype=torch.int64)
    all_gaps = [packing.pack(packing.gap_code(where, w), w).numel() for w in range(1, 12)]
    plain_width = next(w for w in range(1, 12) if numel - 1 < 2**w)
    plain = (
        len(kept) * plain_width + 7
    ) // 8  # positions as integers, which gap codes make needless
    assert min(all_gaps) <= plain + (len(kept) == 1)
    gap, index = packing.pack_index(where, numel)
    assert index.numel() == min((numel + 7) // 8, *all_gaps)
    assert packing.unpack_index(index, gap, numel).tolist() == sorted(kept)


def test_dense_masks_take_a_bitmap_and_thin_ones_gaps() -> None:
    assert packing.pack_index(torch.arange(0, 80, 2), 80)[0] is None
    gap, index = packing.pack_index(torch.arange(0, 8000, 100), 8000)
    assert gap == [7, 80] and index.numel() == 70  # a bitmap takes 1000 bytes


def test_an_empty_index_takes_no_bytes() -> None:
    gap, index = packing.pack_index(torch.empty(0, dtype=torch.int64), 100)
    assert gap is not None and index.numel() == 0
    assert packing.unpack_index(index, gap, 100).numel() == 0


@pytest.mark.parametrize(
    ("tokens", "width", "numel", "why"),
    [
        ([0, 9], 4, 10, "past the last of 10"),
        ([0, 3], 2, 10, "leads to no position"),
        ([0], 2, 0, "past the last of 0"),
        (
            [2**47 - 1] * 2**17 + [0],
            47,
            10,
            "past the last of 10",
        ),  # near 2**64: an int64 sum is negative
    ],
)
def test_a_bad_gap_index_is_refused(tokens: list[int], width: int, numel: int, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        packing.gap_decode(torch.tensor(tokens), width, numel)


def some_quantized(rows: int, cols: int, bits: int, group_size: int, seed: int = 0) -> Quantized:
    g = torch.Generator().manual_seed(seed)
    groups = -(-cols // group_size)
    return Quantized(
        torch.randint(0, 2**bits, (rows, cols), dtype=torch.uint8, generator=g),
        torch.randn(rows, groups, generator=g).half(),
        torch.randint(0, 2**bits, (rows, groups), dtype=torch.uint8, generator=g),
        bits,
        group_size,
        exponent=-11,
    )


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (1, 17), (17, 1), (4, 8), (0, 4), (4, 0)])
def test_a_quantised_matrix_round_trips(bits: int, shape: tuple[int, int]) -> None:
    q = some_quantized(*shape, bits, group_size=4)
    grid = packing.grid_of(q)
    packed = packing.pack_quantized(q)
    assert packed.numel() == grid.bytes
    assert grid.bytes == 1 + (bits * (q.codes.numel() + q.zero.numel()) + 7) // 8
    packing.check_quantized(packed, grid)
    back = packing.unpack_quantized(packed, q.scale.reshape(-1), grid)
    assert torch.equal(back.codes, q.codes) and torch.equal(back.zero, q.zero)
    assert torch.equal(back.scale, q.scale)
    assert (back.bits, back.group_size, back.exponent) == (bits, 4, -11)


@pytest.mark.parametrize("exponent", [-126, -1, 0, 117])
def test_every_exponent_is_kept(exponent: int) -> None:
    q = dataclasses.replace(some_quantized(2, 2, 3, 2), exponent=exponent)
    packed, grid = packing.pack_quantized(q), packing.grid_of(q)
    assert packing.unpack_quantized(packed, q.scale.reshape(-1), grid).exponent == exponent


@pytest.mark.parametrize(
    "wrong",
    [
        {"exponent": 118},
        {"exponent": -127},
        {"bits": 7},
        {"bits": 2},
        {"group_size": 0},
        {"group_size": 3},
        {"codes": torch.zeros(4, dtype=torch.uint8)},
        {"zero": torch.zeros(1, 1, dtype=torch.uint8)},
    ],
)
def test_a_quantised_matrix_that_does_not_fit_together_is_refused(wrong: dict) -> None:
    q = dataclasses.replace(some_quantized(4, 8, 3, 4), **wrong)
    with pytest.raises(ValueError):
        packing.pack_quantized(q)


def test_an_exponent_out_of_range_is_refused_on_reading() -> None:
    q = some_quantized(4, 8, 3, 4)
    packed = packing.pack_quantized(q)
    packed[0] = 0x80  # -128
    with pytest.raises(ValueError, match="exponent"):
        packing.check_quantized(packed, packing.grid_of(q))
