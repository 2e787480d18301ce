"""Stochastic rounding: either neighbour, the right one as often as it is near, the same bits in every tile."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cl_graft.skillpack.rounding import (
    NARROW,
    add,
    dithered,
    neighbours,
    random_bits,
    random_bits_at,
    seed_of,
    stochastic,
)

CPU = torch.device("cpu")
dtypes = st.sampled_from(NARROW)
seeds = st.integers(0, 2**64 - 1)
patterns = st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=40)


def floats(bits: list[int]) -> Tensor:
    """float32 of any bits: every exponent, subnormals, both zeros, infinities and NaN."""
    return torch.tensor(bits, dtype=torch.int32).view(torch.float32)


def bits_of(x: Tensor) -> Tensor:
    return x.view(torch.int16)


def every_value(dtype: torch.dtype) -> Tensor:
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)


def splitmix(seed: int, position: int) -> int:
    """16 bits of the published generator, in Python's whole numbers."""
    mask = 2**64 - 1
    z = (seed + (position // 4 + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return ((z ^ (z >> 31)) >> 16 * (position % 4)) & 0xFFFF


def test_the_generator_is_splitmix64() -> None:
    """Its first numbers from the seed 1234567, as Rosetta Code lists them."""
    numbers = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    expected = [number >> 16 * lane & 0xFFFF for number in numbers for lane in range(4)]
    assert random_bits(16, 1234567, 0, CPU).tolist() == expected


@given(seeds, st.integers(0, 2**40), st.integers(0, 9))
@settings(deadline=None, max_examples=50)
def test_the_bits_of_a_position_are_the_same_from_wherever_it_is_reached(
    seed: int, offset: int, count: int
) -> None:
    expected = [splitmix(seed, offset + i) for i in range(count)]
    assert random_bits(count, seed, offset, CPU).tolist() == expected


def test_bits_are_uniform_and_neighbours_independent() -> None:
    bits = random_bits(1 << 20, seed_of(["a"], "w"), 0, CPU).double() / 2**16
    counts = (bits * 64).long().bincount(minlength=64).double()
    chi = float(((counts - 2**14) ** 2 / 2**14).sum())
    assert 25 < chi < 120  # 63 +- 11.2
    centred = bits - 0.5
    for lag in (1, 2, 3, 4, 8, 576):
        correlation = float((centred[lag:] * centred[:-lag]).mean() * 12)
        assert abs(correlation) < 5 / math.sqrt(len(bits))


@pytest.mark.parametrize("dtype", NARROW)
def test_what_the_dtype_holds_stays_bit_for_bit(dtype: torch.dtype) -> None:
    values = every_value(dtype)
    values = values[~values.isnan()]
    assert len(values) == {torch.bfloat16: 65282, torch.float16: 63490}[dtype]
    for seed in (0, 1, 2**63):
        assert torch.equal(bits_of(stochastic(values.float(), dtype, seed)), bits_of(values))


@given(patterns, dtypes, seeds)
@settings(deadline=None, max_examples=200)
def test_the_result_is_one_of_both_neighbours(
    bits: list[int], dtype: torch.dtype, seed: int
) -> None:
    x = floats(bits)
    rounded = stochastic(x, dtype, seed)
    values = every_value(dtype)
    grid = values[values.isfinite()].double().unique()
    for before, after in zip(x.double().tolist(), rounded.double().tolist(), strict=True):
        if math.isnan(before):
            assert math.isnan(after)
        elif abs(before) > torch.finfo(dtype).max:  # no chance decides what overflows
            assert after == torch.tensor(before, dtype=torch.float32).to(dtype).double().item()
        else:
            above = int(torch.searchsorted(grid, before))
            below = above if grid[above] == before else above - 1
            assert after in (grid[below], grid[above])
        assert math.isnan(after) or math.copysign(1, after) == math.copysign(1, before)


# 2**-7 at 1 and 2**-10 are the spacings there; 2**-24 float16's smallest number, 2**-133 bfloat16's
@pytest.mark.parametrize(
    ("dtype", "below", "spacing"),
    [
        (torch.bfloat16, 1.0, 2.0**-7),
        (torch.bfloat16, -1.0, -(2.0**-7)),
        (torch.bfloat16, 0.0, 2.0**-133),
        (torch.bfloat16, 2.0 - 2.0**-7, 2.0**-7),  # the next is of another exponent
        (torch.float16, 1.0, 2.0**-10),
        (torch.float16, -5 * 2.0**-24, -(2.0**-24)),
        (torch.float16, 0.0, 2.0**-24),
        (torch.float16, 1023 * 2.0**-24, 2.0**-24),  # its largest subnormal number
    ],
)
@pytest.mark.parametrize("share", [0.0625, 0.5, 0.8125])
def test_the_upper_neighbour_comes_as_often_as_it_is_near(
    dtype: torch.dtype, below: float, spacing: float, share: float
) -> None:
    count = 40_000
    x = torch.full((count,), below + share * spacing)
    rounded = stochastic(x, dtype, seed_of(["pack"], f"{below} {share}")).double()
    assert set(rounded.tolist()) == {below, below + spacing}
    found = float((rounded != below).double().mean())
    assert abs(found - share) < 4.5 * math.sqrt(share * (1 - share) / count)


@pytest.mark.parametrize("dtype", NARROW)
def test_the_mean_error_is_zero_where_nearest_loses_a_small_delta(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    base = (torch.randn(1 << 19, generator=generator) * 0.02).to(dtype).float()
    base = base[base.abs() > 2.0**-13]  # normal numbers of float16
    spacing = 2.0 ** base.abs().log2().floor() * torch.finfo(dtype).eps
    moved = base + 0.01 * spacing
    assert torch.equal(moved.to(dtype).float(), base)  # nothing is left of it
    error = (stochastic(moved, dtype, 7).double() - moved.double()) / spacing
    assert abs(float(error.mean())) < 4.5 * float(error.std()) / math.sqrt(len(error))
    assert float(error.std()) == pytest.approx(math.sqrt(0.01 * 0.99), rel=0.02)


@pytest.mark.parametrize("dtype", NARROW)
def test_by_a_hash_of_the_entry_a_small_delta_is_kept_and_what_the_dtype_holds_stays(
    dtype: torch.dtype,
) -> None:
    values = every_value(dtype)
    values = values[~values.isnan()]
    assert torch.equal(bits_of(dithered(values.float(), dtype)), bits_of(values))
    generator = torch.Generator().manual_seed(0)
    base = (torch.randn(1 << 19, generator=generator) * 8).to(dtype).float()
    base = base[base.abs() > 2.0**-8]
    spacing = 2.0 ** base.abs().log2().floor() * torch.finfo(dtype).eps
    delta = torch.randn(len(base), generator=generator) * 0.05 * spacing
    moved = base + delta
    added = dithered(moved, dtype).double() - base.double()
    kept = added * delta / delta.square().mean()
    assert abs(float(kept.mean()) - 1) < 4.5 * float(kept.std()) / math.sqrt(len(kept))
    assert float((moved.to(dtype) - base).mul(delta).mean() / delta.square().mean()) < 1e-3
    order = torch.randperm(len(moved), generator=generator)
    assert torch.equal(dithered(moved[order], dtype), dithered(moved, dtype)[order])


@given(st.integers(0, 300), st.integers(0, 300), dtypes, seeds, st.integers(0, 2**33))
@settings(deadline=None, max_examples=50)
def test_tiles_are_rounded_as_the_whole(
    a: int, b: int, dtype: torch.dtype, seed: int, offset: int
) -> None:
    x = torch.randn(a + b, generator=torch.Generator().manual_seed(a))
    parts = [stochastic(x[:a], dtype, seed, offset), stochastic(x[a:], dtype, seed, offset + a)]
    assert torch.equal(torch.cat(parts), stochastic(x, dtype, seed, offset))


@pytest.mark.parametrize("dtype", NARROW)
def test_large_and_strided_tensors_are_rounded_in_row_major_order(dtype: torch.dtype) -> None:
    x = torch.randn(300, 700, generator=torch.Generator().manual_seed(0))  # several chunks
    whole = stochastic(x, dtype, 5)
    rows = [stochastic(row, dtype, 5, i * 700) for i, row in enumerate(x)]
    assert torch.equal(whole, torch.stack(rows))
    assert torch.equal(stochastic(x.T.contiguous().T, dtype, 5), whole)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        assert torch.equal(stochastic(x, dtype, 5), whole)
    finally:
        torch.set_num_threads(threads)


@given(st.lists(st.integers(0, 2**40), max_size=20), seeds)
@settings(deadline=None, max_examples=50)
def test_entries_at_any_places_have_the_bits_of_those_places(places: list[int], seed: int) -> None:
    expected = [splitmix(seed, place) for place in places]
    assert random_bits_at(torch.tensor(places, dtype=torch.int64), seed).tolist() == expected


@pytest.mark.parametrize("dtype", NARROW)
def test_a_part_of_a_sum_by_tile_or_by_places(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(40, 30, generator=generator).to(dtype)
    delta = torch.randn(40, 30, generator=generator) * 1e-3
    whole = stochastic(base.float() + delta, dtype, 3)
    tiled, placed = base.clone(), base.clone()
    add(tiled[25:], delta[25:], 3, 25 * 30)
    assert torch.equal(tiled[25:], whole[25:]) and torch.equal(tiled[:25], base[:25])
    some = torch.randperm(1200, generator=generator)[:100]
    there = placed.view(-1)[some]
    add(there, delta.view(-1)[some], 3, some)
    assert torch.equal(there, whole.view(-1)[some])
    wide = base.double()
    add(wide, delta, 3)
    assert torch.equal(wide, base.double() + delta)


@given(patterns, dtypes)
@settings(deadline=None, max_examples=100)
def test_neighbours_are_next_to_each_other_and_around(bits: list[int], dtype: torch.dtype) -> None:
    x = floats(bits)
    x = x[x.abs() <= torch.finfo(dtype).max]
    low, high = neighbours(x, dtype)
    for side in (low, high):
        assert torch.equal(side.to(dtype).float(), side)  # a value of the dtype
    assert ((low.abs() <= x.abs()) & (x.abs() <= high.abs())).all()
    steps = (high.to(dtype).view(torch.int16) - low.to(dtype).view(torch.int16)).int()
    assert torch.equal(steps, (low != x).int())


def test_seeds_tell_packs_their_order_and_tensors_apart() -> None:
    seeds = [seed_of(*of) for of in ((["a"], "w"), (["b"], "w"), (["a"], "v"), (["a", "b"], "w"))]
    seeds += [seed_of(["b", "a"], "w"), seed_of([], "w"), seed_of(["a", "w"], "")]
    assert len(set(seeds)) == len(seeds)
    assert (
        seed_of(["a"], "w") == 0x574C3FF3DD8BEED6
    )  # for good: folders that were written are checked by it


def test_another_dtype_is_refused() -> None:
    for x, dtype in ((torch.zeros(2), torch.float8_e5m2), (torch.zeros(2).half(), torch.bfloat16)):
        with pytest.raises(ValueError, match="pass float32 and a dtype of 16 bits"):
            stochastic(x, dtype, 0)
