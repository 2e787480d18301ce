"""Every codec against a slow decoder: plain Python that walks the parts bit by bit.

Whatever is encoded (float32, bfloat16, float16; one row, one column, nothing at all), `decode` must
give what the format says, whether or not the encoder and the decoder agree with each other.
"""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.fft import idctn
from torch import Tensor

from cl_graft.skillpack import codecs
from cl_graft.skillpack.codecs import Encoded
from cl_graft.skillpack.codecs.quant import BITS, round_to_nearest
from tests.skillpack.tensors import grid, normal

few = settings(max_examples=40, deadline=None)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


# the reference decoder: whole numbers and fractions only, so that nothing rounds

# bytes, exponent, mantissa
FORMATS = {"F64": (8, 11, 52), "F32": (4, 8, 23), "BF16": (2, 8, 7), "F16": (2, 5, 10)}
WHOLE = {"U8": 1, "I32": 4, "I64": 8}  # bytes


def octets(part: Tensor) -> list[int]:
    return part.contiguous().reshape(-1).view(torch.uint8).tolist()


def bits_of(data: list[int]) -> list[int]:
    """The lowest bit of the first byte first."""
    return [byte >> i & 1 for byte in data for i in range(8)]


def number(bits: list[int]) -> int:
    return sum(bit << i for i, bit in enumerate(bits))


def floats(data: list[int], dtype: str) -> list[Fraction]:
    """IEEE 754 by its definition; -0 is 0 here."""
    size, exponents, mantissas = FORMATS[dtype]
    found = []
    for start in range(0, len(data), size):
        bits = bits_of(data[start : start + size])
        mantissa, exponent = number(bits[:mantissas]), number(bits[mantissas:-1])
        assert exponent < 2**exponents - 1, "NaN or Inf"
        bias = 2 ** (exponents - 1) - 1
        steps = mantissa + (2**mantissas if exponent else 0)
        power = max(exponent, 1) - bias - mantissas
        found.append((-1) ** bits[-1] * steps * Fraction(2) ** power)
    return found


def wholes(data: list[int], dtype: str) -> list[Fraction]:
    """Two's complement, but for bytes."""
    size = WHOLE[dtype]
    words = [number(bits_of(data[start : start + size])) for start in range(0, len(data), size)]
    return [Fraction(w - (w >> 8 * size - 1 << 8 * size if size > 1 else 0)) for w in words]


def packed(data: list[int], count: int, width: int) -> list[int]:
    """`count` values of `width` bits; of wide ones first the low bytes of all, then the rest."""
    if width > 8:
        high = packed(data[count:], count, width - 8)
        return [low + 256 * rest for low, rest in zip(data[:count], high, strict=True)]
    bits = bits_of(data)
    assert len(data) == math.ceil(count * width / 8) and not any(bits[count * width :])
    return [number(bits[i * width : (i + 1) * width]) for i in range(count)]


def positions(index: list[int], gap: list[int] | None, numel: int) -> list[int]:
    if gap is None:
        return [at for at, bit in enumerate(packed(index, numel, 1)) if bit]
    width, tokens = gap
    found, at = [], 0
    for token in packed(index, tokens, width):
        at += token
        if token < 2**width - 1:
            found.append(at)
            at += 1
    return found


def take_matrix(
    codes: list[int], scales: list[Fraction], rows: int, cols: int, width: int, size: int
) -> dict[tuple[int, int], Fraction]:
    """{(i, j): value} of one quantised matrix off the front of `codes` and `scales`."""
    groups = math.ceil(cols / size)
    used = 1 + math.ceil(width * rows * (cols + groups) / 8)
    values = packed(codes[1:used], rows * (cols + groups), width)
    power = Fraction(2) ** (codes[0] - 256 * (codes[0] > 127))
    found = {}
    for i, j in itertools.product(range(rows), range(cols)):
        group = i * groups + j // size
        found[i, j] = scales[group] * (values[i * cols + j] - values[rows * cols + group]) * power
    del codes[:used], scales[: rows * groups]
    return found


def shares(kind: int, top: int) -> list[int]:
    """Parts of 2**24 of the codes -top .. top in a class, by the page of the format; floats are those of IEEE 754."""
    family, scale = divmod(kind - 1, 40)
    m = 2.0 ** (scale // 2 - 7) * (math.sqrt(2.0) if scale % 2 else 1.0)
    q = (math.sqrt(1 + m * m) - 1) / m
    v = 3.14 * m * m + 0.5 * m
    g = v / (1 + v)
    geometric, squared, ratio = [1.0], [1.0], g
    for _ in range(top):
        geometric.append(geometric[-1] * q)
        squared.append(squared[-1] * ratio)
        ratio = ratio * (g * g)
    both = [[w / math.fsum(ws + ws[1:]) for w in ws] for ws in (geometric, squared)]
    weights = both[family] if family < 2 else [(a + b) / 2 for a, b in zip(*both, strict=True)]
    side = [1 + math.floor(w * (2**24 - 2 * top - 1)) for w in weights[1:]]
    return [*side[::-1], 2**24 - 2 * sum(side), *side]


def coded_rows(
    parts: dict[str, list[int]], sizes: list[tuple[int, int]], meta: dict[str, Any]
) -> list[list[list[int]]]:
    """Matrices of whole numbers, row by row, off an ANS stack or a stream of aligned widths."""
    found = [[[0] * n for _ in range(rows)] for rows, n in sizes]
    data = list(parts["codes"])
    each = [(m, row) for m, matrix in enumerate(found) for row in matrix]
    rows = [(kind, m, row) for kind, (m, row) in zip(parts["kinds"], each, strict=True)]
    if meta["layout"] == "fast":
        for width, _, row in sorted(rows, key=lambda each: (each[1], each[0])):
            size = math.ceil(len(row) * width / 8)
            for j in range(len(row) if width else 0):
                bits = bits_of(data[:size])
                start = 8 * (j % size) + width * (j // size) if width < 8 else width * j
                code = number(bits[start : start + width])
                row[j] = code - (code >> width - 1 << width)
            del data[:size]
        assert not data
        return found
    words = [sum(data[i + k] << 8 * k for k in range(4)) for i in range(0, len(data), 4)]
    state = 0
    for kind, _, row in sorted(rows, key=lambda each: each[0]):
        for j in range(len(row) if kind else 0):
            while state < 2**32 and words:
                state = state * 2**32 + words.pop()
            place, code, below = state % 2**24, 0, 0
            table = shares(kind, meta["top"])
            while below + table[code] <= place:
                below, code = below + table[code], code + 1
            state = table[code] * (state // 2**24) + place - below
            row[j] = code - meta["top"]
    assert not state and not words
    return found


def reference(encoded: Encoded) -> list[Fraction]:
    """The delta in row-major order."""
    meta: dict[str, Any] = encoded.meta
    parts = {name: octets(part) for name, part in encoded.parts.items()}
    numel = math.prod(encoded.shape)
    if encoded.codec == "dense":
        return floats(parts["values"], meta["dtype"])
    if encoded.codec == "exact":
        return (wholes if meta["dtype"] in WHOLE else floats)(parts["values"], meta["dtype"])
    if encoded.codec == "sparse":
        where = positions(parts["index"], meta.get("gap"), numel)
        kept = dict(zip(where, floats(parts["values"], meta["dtype"]), strict=True))
        return [kept.get(at, Fraction(0)) for at in range(numel)]
    if encoded.codec == "mask":
        return [Fraction(bit) for bit in packed(parts["bits"], numel, 1)]
    if encoded.codec == "sign_scale":
        (scale,) = floats(parts["scale"], "F32")
        return [scale if bit else -scale for bit in packed(parts["signs"], numel, 1)]
    if encoded.codec == "coded":
        count, *rest = encoded.shape if len(encoded.shape) > 1 else (1, numel)
        n = math.prod(rest)
        alive = positions(parts["index"], meta.get("gap"), count)
        (matrix,) = coded_rows(parts, [(meta["kept"], n)], meta)
        sizes = floats(parts["columns"], "BF16") if meta["columns"] else [Fraction(1)] * n
        steps = floats(parts["steps"], "BF16")
        values = dict.fromkeys(itertools.product(range(count), range(n)), Fraction(0))
        for i, step, row in zip(alive, steps, matrix, strict=True):
            values |= {(i, j): row[j] * step * sizes[j] for j in range(n)}
        return list(values.values())
    if encoded.codec == "seeded_sparse":
        values = iter(floats(parts["values"], meta["dtype"]))
        drawn = splitmix(meta["seed"], numel)
        return [next(values) if z >> 16 < meta["rate"] else Fraction(0) for z in drawn]
    if encoded.codec == "sparse_codebook":
        levels, bits = floats(parts["levels"], "F32"), meta["bits"]
        codes = packed(parts["codes"], meta["kept"], bits)
        where = positions(parts["index"], meta.get("gap"), numel)
        kept = {at: levels[code] for at, code in zip(where, codes, strict=True)}
        return [kept.get(at, Fraction(0)) for at in range(numel)]
    if encoded.codec == "coded_low_rank_stack":
        (stack, rows, cols), ranks = encoded.shape, meta["ranks"]
        total, scales = sum(ranks), floats(parts["scales"], "BF16")
        sizes = [(stack, cols), (stack, rows), (total, cols), (total, rows)]
        across, down, right, left = coded_rows(parts, sizes, meta)
        first = [sum(ranks[:e]) for e in range(stack + 1)]
        return [
            sum(
                (scales[k] * left[k][i] * right[k][j] for k in range(first[e], first[e + 1])),
                Fraction(0),
            )
            * Fraction(2) ** -(down[e][i] + across[e][j])
            for e, i, j in itertools.product(range(stack), range(rows), range(cols))
        ]
    rows, cols = encoded.shape
    if encoded.codec == "coded_low_rank":
        rank, scales = meta["rank"], floats(parts["scales"], "BF16")
        sizes = [(1, cols), (1, rows), (rank, cols), (rank, rows)]
        (across,), (down,), right, left = coded_rows(parts, sizes, meta)
        return [
            sum((scales[k] * left[k][i] * right[k][j] for k in range(rank)), Fraction(0))
            * Fraction(2) ** -(down[i] + across[j])
            for i, j in itertools.product(range(rows), range(cols))
        ]
    if encoded.codec == "coded_table":
        rank, (*scales, step) = meta["rank"], floats(parts["scales"], "BF16")
        sizes = [(1, cols), (1, rows), (rank, cols), (rank, rows), (meta["kept"], cols)]
        (across,), (down,), right, left, own = coded_rows(parts, sizes, meta)
        where = positions(parts["index"], meta.get("gap"), rows)
        added = dict(zip(where, own, strict=True))
        return [
            sum(
                (scales[k] * left[k][i] * right[k][j] for k in range(rank)),
                step * added[i][j] if i in added else Fraction(0),
            )
            * Fraction(2) ** -(down[i] + across[j])
            for i, j in itertools.product(range(rows), range(cols))
        ]
    places = list(itertools.product(range(rows), range(cols)))
    if encoded.codec == "low_rank":
        rank = meta["rank"]
        left, right = (floats(parts[side], meta["dtype"]) for side in ("left", "right"))
        return [
            sum((left[i * rank + k] * right[k * cols + j] for k in range(rank)), Fraction(0))
            for i, j in places
        ]
    if encoded.codec == "sign_scales":
        signs, scales = packed(parts["signs"], numel, 1), floats(parts["scales"], "BF16")
        pairs = zip(places, signs, strict=True)
        return [scales[place[meta["axis"]]] * (1 if bit else -1) for place, bit in pairs]
    if encoded.codec == "sparse_low_rank":
        rank = meta["rank"]
        left, right = (
            spread(parts, meta, side, rank * n)
            for side, n in zip(("left", "right"), (rows, cols), strict=True)
        )
        return product(left, right, rank, rows, cols)
    if encoded.codec == "sign_low_rank":
        return signed(parts, meta, rows, cols)
    codes, scales = parts["codes"], floats(parts["scales"], "F16")
    delta = dict.fromkeys(places, Fraction(0))
    if encoded.codec == "quantized":
        delta |= take_matrix(codes, scales, rows, cols, meta["bits"], meta["group_size"])
    for rank, width, left_size, right_size in meta.get("groups", []):
        if encoded.codec == "quantized_product":
            turned = take_matrix(codes, scales, rows, rank, width, left_size)
            u = {(k, i): value for (i, k), value in turned.items()}
        else:
            u = take_matrix(codes, scales, rank, rows, width, left_size)
        v = take_matrix(codes, scales, rank, cols, width, right_size)
        for (i, j), k in itertools.product(places, range(rank)):
            delta[i, j] += u[k, i] * v[k, j]
    assert not codes and not scales
    return [delta[place] for place in places]


def splitmix(seed: int, count: int) -> list[int]:
    """The first numbers of SplitMix64 from a seed, by its definition."""
    found, wrap = [], 2**64 - 1
    for _ in range(count):
        seed = seed + 0x9E3779B97F4A7C15 & wrap
        z = (seed ^ seed >> 30) * 0xBF58476D1CE4E5B9 & wrap
        z = (z ^ z >> 27) * 0x94D049BB133111EB & wrap
        found.append(z ^ z >> 31)
    return found


def spread(parts: dict[str, Any], meta: dict[str, Any], side: str, numel: int) -> list[Fraction]:
    """A sparse factor, row-major."""
    where = positions(parts[f"{side}_index"], meta[side][1:] or None, numel)
    kept = dict(zip(where, floats(parts[side], meta["dtype"]), strict=True))
    return [kept.get(at, Fraction(0)) for at in range(numel)]


def product(
    left: list[Fraction], right: list[Fraction], rank: int, rows: int, cols: int
) -> list[Fraction]:
    """left.T @ right of factors (rank, rows) and (rank, cols)."""
    return [
        sum((left[k * rows + i] * right[k * cols + j] for k in range(rank)), Fraction(0))
        for i, j in itertools.product(range(rows), range(cols))
    ]


def signed(parts: dict[str, Any], meta: dict[str, Any], rows: int, cols: int) -> list[Fraction]:
    """The product of both pairs of factors of `sign_low_rank`."""
    rank, bits, *sizes = meta["grid"]
    codes, scales = parts["codes"], floats(parts["scales"], "F16")
    high = [
        take_matrix(codes, scales, rank, n, bits, size)
        for n, size in zip((rows, cols), sizes, strict=True)
    ]
    lists = [
        [found[k, i] for k in range(rank) for i in range(n)]
        for found, n in zip(high, (rows, cols), strict=True)
    ]
    grid = product(lists[0], lists[1], rank, rows, cols)
    low, *sizes = meta["signs"]
    signs = packed(parts["signs"], low * (rows + cols), 1)
    magnitudes, factors = floats(parts["sizes"], "BF16"), []
    for n, size in zip((rows, cols), sizes, strict=True):
        groups = math.ceil(n / size)
        factors.append(
            [
                magnitudes[k * groups + i // size] * (1 if signs[k * n + i] else -1)
                for k in range(low)
                for i in range(n)
            ]
        )
        signs, magnitudes = signs[low * n :], magnitudes[low * groups :]
    assert not codes and not scales and not signs and not magnitudes
    pairs = zip(grid, product(*factors, low, rows, cols), strict=True)
    return [a + b for a, b in pairs]


def agrees(encoded: Encoded, exact: bool = True) -> bool:
    """Whether `decode` gives what the reference gives, and the parts what `layout` foretells.

    Sums of products are rounded to float32 in some order, everything else not at all.
    """
    expected = [float(value) for value in reference(encoded)]
    found = codecs.decode(encoded)
    assert found.dtype == torch.float32 and tuple(found.shape) == encoded.shape
    assert codecs.payload_bytes(*encoded.spec) == sum(map(len, map(octets, encoded.parts.values())))
    if exact:
        return found.reshape(-1).tolist() == expected
    slack = 1e-5 * max(map(abs, expected), default=0.0)
    pairs = zip(found.reshape(-1).tolist(), expected, strict=True)
    return all(math.isclose(a, b, rel_tol=1e-5, abs_tol=slack) for a, b in pairs)


# inputs

ragged = [(1, 1), (1, 9), (9, 1), (5, 7), (8, 8), (0, 4), (4, 0), (0, 0)]
shapes = st.sampled_from([(), (0,), (1,), (7,), (2, 1, 3), (3, 0, 2), *ragged])
matrices = st.sampled_from(ragged) | st.tuples(st.integers(1, 9), st.integers(1, 9))
filled = st.tuples(st.integers(1, 9), st.integers(1, 9))
dtypes = st.sampled_from(DTYPES)
seeds = st.integers(0, 10_000)
widths = pytest.mark.parametrize("width", BITS)


def test_the_reference_by_hand() -> None:
    x = torch.tensor([1.5, -0.09375, 2.0**-24, 65504.0])
    assert floats(octets(x), "F32") == [Fraction(v) for v in x.tolist()]
    assert floats(octets(x.half()), "F16") == [Fraction(v) for v in x.tolist()]
    assert floats([0xC0, 0x3F, 0x01, 0x80], "BF16") == [Fraction(3, 2), -(Fraction(2) ** -133)]
    assert packed([0b11010001, 0b1], 3, 3) == [1, 2, 7]
    assert positions([0b11110100, 0b00], [2, 5], 10) == [0, 2, 9]  # 0, 1, skip 3, skip 3, 0


# round trips


@few
@given(shapes, dtypes, dtypes, seeds)
def test_dense(shape: tuple[int, ...], source: torch.dtype, kept: torch.dtype, seed: int) -> None:
    x = normal(shape, seed, source)
    encoded = codecs.dense(x, kept)
    assert agrees(encoded)
    assert torch.equal(codecs.decode(encoded), x.to(kept).float())


@few
@given(shapes, st.sampled_from(list(codecs.STORABLE.values())), seeds)
def test_exact(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> None:
    """Values that float32 has, too; what it has not is rounded (test_codecs.py)."""
    x = (normal(shape, seed) * 1e4).to(dtype)
    encoded = codecs.exact(x)
    assert agrees(encoded)
    assert torch.equal(codecs.original(encoded), x)


@few
@given(shapes, st.sampled_from([0.0, 0.05, 0.5, 1.0]), dtypes, dtypes, seeds)
def test_sparse(
    shape: tuple[int, ...], density: float, source: torch.dtype, kept: torch.dtype, seed: int
) -> None:
    x = normal(shape, seed, source)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density
    encoded = codecs.sparse(x, mask, kept)
    assert agrees(encoded)
    assert torch.equal(codecs.decode(encoded), torch.where(mask, x.to(kept).float(), 0.0))


def test_sparse_with_both_indices_and_gaps_wider_than_a_byte() -> None:
    x = normal((50, 40), 0)
    for step, widest in ((2, 0), (90, 8), (1999, 16)):
        mask = torch.zeros(2000, dtype=torch.bool)
        mask[::step] = True
        encoded = codecs.sparse(x, mask.reshape(x.shape))
        assert encoded.meta.get("gap", [0])[0] <= widest
        assert agrees(encoded)
    wide = {"dtype": "F32", "kept": 2, "gap": [12, 2]}  # tokens 700 and 1000, low bytes first
    parts = {
        "values": torch.tensor([1.0, 2.0]),
        "index": torch.tensor([700 & 255, 1000 & 255, 700 >> 8 | (1000 >> 8) << 4]).byte(),
    }
    assert agrees(Encoded("sparse", (2000,), wide, parts))


@few
@given(matrices, st.integers(0, 5), dtypes, dtypes, seeds)
def test_low_rank(
    shape: tuple[int, int], rank: int, source: torch.dtype, kept: torch.dtype, seed: int
) -> None:
    left, right = normal((shape[0], rank), seed, source), normal((rank, shape[1]), seed, source)
    encoded = codecs.low_rank(left, right, kept)
    assert encoded.shape == shape
    assert agrees(encoded, exact=False)


@widths
@few
@given(matrices, st.integers(1, 12), seeds)
def test_quantized(width: int, shape: tuple[int, int], size: int, seed: int) -> None:
    q = grid(*shape, width, size, seed)
    encoded = codecs.quantized(q)
    assert agrees(encoded)
    assert torch.equal(codecs.decode(encoded), q.dequantize())


@widths
@few
@given(filled, st.integers(1, 12), dtypes, seeds)
def test_quantized_weights(
    width: int, shape: tuple[int, int], size: int, source: torch.dtype, seed: int
) -> None:
    """From the weights on: what comes back is near them, a step of the group's grid at most."""
    x = normal(shape, seed, source)
    encoded = codecs.quantized(round_to_nearest(x, width, size, search=False))
    assert agrees(encoded)
    miss = (codecs.decode(encoded) - x.float()).abs()
    for group in range(0, shape[1], size):
        part = x[:, group : group + size].float()
        step = (part.amax(1).clamp(min=0) - part.amin(1).clamp(max=0)) / (2**width - 1)
        assert (miss[:, group : group + size].amax(1) <= 1.2 * step).all()  # scales are float16


rank_groups = st.tuples(
    st.integers(0, 3), st.sampled_from(BITS), st.integers(1, 12), st.integers(1, 12)
)


@few
@given(matrices, st.lists(rank_groups, max_size=3), seeds)
def test_quantized_low_rank(
    shape: tuple[int, int], groups: list[tuple[int, int, int, int]], seed: int
) -> None:
    pairs = [
        (grid(rank, shape[0], width, a, seed + i), grid(rank, shape[1], width, b, seed + 2 * i))
        for i, (rank, width, a, b) in enumerate(groups)
    ]
    encoded = codecs.quantized_low_rank(pairs, shape)
    assert encoded.meta == {"groups": [list(group) for group in groups]}
    assert len(encoded.parts) == 2
    assert agrees(encoded, exact=False)


@widths
@few
@given(filled, st.integers(1, 4), st.integers(1, 12), dtypes, seeds)
def test_quantized_factors(
    width: int, shape: tuple[int, int], rank: int, size: int, source: torch.dtype, seed: int
) -> None:
    pair = tuple(round_to_nearest(normal((rank, n), seed + n, source), width, size) for n in shape)
    encoded = codecs.quantized_low_rank([pair], shape)
    assert agrees(encoded, exact=False)
    product = pair[0].dequantize().T @ pair[1].dequantize()
    torch.testing.assert_close(codecs.decode(encoded), product)


layouts = pytest.mark.parametrize("layout", get_args(codecs.CodeLayout))
tops = st.sampled_from([0, 1, 2, 7, 8, 40, 300])


def whole(rows: int, n: int, top: int, seed: int) -> Tensor:
    """Codes of rows that are smaller and smaller, int16."""
    sizes = torch.logspace(0, -2, max(1, rows))[:rows, None]
    return (normal((rows, n), seed) * (40 * top) * sizes).round().clamp(-top, top).short()


@layouts
@few
@given(matrices, st.integers(0, 4), tops, st.booleans(), seeds)
def test_coded_low_rank(
    layout: codecs.CodeLayout,
    shape: tuple[int, int],
    rank: int,
    top: int,
    shifted: bool,
    seed: int,
) -> None:
    rank = min(rank, *shape)
    left, right = (whole(rank, n, top, seed + i) for i, n in enumerate(shape))
    shifts = tuple(whole(1, n, 30, seed + n)[0] if shifted else None for n in shape)
    encoded = codecs.coded_low_rank(left, right, normal((rank,), seed), shape, layout, shifts)
    assert encoded.meta["rank"] == rank and codecs.layout_name(encoded) == layout
    assert agrees(encoded, exact=False)


@layouts
@few
@given(matrices, st.integers(0, 4), tops, st.booleans(), st.floats(0, 1), seeds)
def test_coded_table(
    layout: codecs.CodeLayout,
    shape: tuple[int, int],
    rank: int,
    top: int,
    shifted: bool,
    share: float,
    seed: int,
) -> None:
    rank = min(rank, *shape)
    left, right = (whole(rank, n, top, seed + i) for i, n in enumerate(shape))
    shifts = tuple(whole(1, n, 30 * shifted, seed + n)[0] for n in shape)
    own = whole(*shape, top, seed + 2)
    own *= torch.rand(shape[0], 1, generator=torch.Generator().manual_seed(seed)) < share
    scales = normal((rank + 1,), seed)
    rows = torch.arange(shape[0]), own
    encoded = codecs.coded_table(left, right, scales, shifts, rows, layout)
    assert encoded.meta["rank"] == rank and codecs.layout_name(encoded) == layout
    assert encoded.meta["kept"] == int(own.any(1).sum())
    assert agrees(encoded, exact=False)


@layouts
@few
@given(matrices, st.lists(st.integers(0, 3), min_size=1, max_size=3), tops, st.booleans(), seeds)
def test_coded_low_rank_stack(
    layout: codecs.CodeLayout,
    shape: tuple[int, int],
    ranks: list[int],
    top: int,
    shifted: bool,
    seed: int,
) -> None:
    matrices, ranks = [], [min(rank, *shape) for rank in ranks]
    for number, rank in enumerate(ranks):
        left, right = (whole(rank, n, top, seed + number + n) for n in shape)
        shifts = tuple(whole(1, n, 30, seed + n)[0] if shifted else None for n in shape)
        scales = normal((rank,), seed)
        matrices.append(codecs.coded_low_rank(left, right, scales, shape, layout, shifts))
    encoded = codecs.coded_low_rank_stack(matrices, (len(ranks), *shape), layout)
    assert encoded.meta["ranks"] == ranks and codecs.layout_name(encoded) == layout
    assert agrees(encoded, exact=False)


@layouts
@few
@given(shapes, tops, st.booleans(), seeds)
def test_coded(
    layout: codecs.CodeLayout, shape: tuple[int, ...], top: int, sized: bool, seed: int
) -> None:
    n = math.prod(shape[1:] if len(shape) > 1 else shape)
    rows = shape[0] if len(shape) > 1 else 1
    columns = normal((n,), seed) if sized else None
    codes = whole(rows, n, top, seed)
    encoded = codecs.coded(codes, normal((rows,), seed + 1), shape, layout, columns)
    assert encoded.meta["kept"] == int(codes.any(1).sum())
    assert agrees(encoded, exact=False)


@few
@given(shapes, dtypes, seeds, st.none() | st.floats(-10, 10, width=32))
def test_sign_scale(
    shape: tuple[int, ...], source: torch.dtype, seed: int, scale: float | None
) -> None:
    x = normal(shape, seed, source)
    encoded = codecs.sign_scale(x, scale)
    assert agrees(encoded)
    if scale is None and x.numel():
        torch.testing.assert_close(encoded.parts["scale"][0], x.float().abs().mean())
    elif scale is not None:
        assert torch.equal(codecs.decode(encoded), torch.where(x > 0, scale, -scale).float())


@few
@given(shapes, seeds)
def test_mask(shape: tuple[int, ...], seed: int) -> None:
    x = normal(shape, seed) > 0
    encoded = codecs.mask(x)
    assert agrees(encoded) and torch.equal(codecs.decode(encoded), x.float())


@few
@given(shapes, st.integers(1, 8), seeds, st.floats(0, 1))
def test_sparse_codebook(shape: tuple[int, ...], bits: int, seed: int, share: float) -> None:
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, shape, dtype=torch.uint8, generator=g)
    mask, levels = torch.rand(shape, generator=g) < share, normal((2**bits,), seed)
    encoded = codecs.sparse_codebook(codes, mask, levels)
    assert agrees(encoded) and encoded.spec == codecs.sparse_codebook_spec(mask, bits)
    assert torch.equal(codecs.decode(encoded), levels[codes.long()] * mask)


@few
@given(shapes, dtypes, st.integers(0, 1 << 48), st.integers(1 << 41, 1 << 48))
def test_seeded_sparse(shape: tuple[int, ...], kept: torch.dtype, seed: int, rate: int) -> None:
    x = normal(shape, 0)
    encoded = codecs.seeded_sparse(x, seed, rate, kept)
    assert agrees(encoded)
    found = codecs.decode(encoded)
    assert torch.equal(found[found != 0], x.to(kept).float()[found != 0])
    if rate == 1 << 48:
        assert encoded.meta["kept"] == x.numel()


@few
@given(matrices, st.integers(0, 1), dtypes, seeds)
def test_sign_scales(shape: tuple[int, int], axis: int, source: torch.dtype, seed: int) -> None:
    x = normal(shape, seed, source)
    encoded = codecs.sign_scales(x, axis)
    assert agrees(encoded) and encoded.spec == codecs.sign_scales_spec(shape, axis)
    if x.numel():
        wanted = x.float().abs().mean(1 - axis).bfloat16().float()
        assert torch.equal(encoded.parts["scales"].float(), wanted)


@few
@given(matrices, st.integers(0, 4), dtypes, seeds, st.floats(0, 1))
def test_sparse_low_rank(
    shape: tuple[int, int], rank: int, kept: torch.dtype, seed: int, share: float
) -> None:
    rank, g = min(rank, max(shape)), torch.Generator().manual_seed(seed)
    left, right = (
        normal((rank, n), seed + n) * (torch.rand(rank, n, generator=g) < share) for n in shape
    )
    encoded = codecs.sparse_low_rank(left, right, kept)
    assert agrees(encoded, exact=False)
    assert encoded.spec == codecs.sparse_low_rank_spec(left != 0, right != 0, kept)


@few
@given(matrices, st.integers(0, 3), st.integers(0, 3), st.integers(1, 12), seeds)
def test_sign_low_rank(shape: tuple[int, int], high: int, low: int, size: int, seed: int) -> None:
    pair = tuple(grid(high, n, 2, size, seed + n) for n in shape)
    factors = tuple(normal((low, n), seed + n) for n in shape)
    encoded = codecs.sign_low_rank(pair, factors, size)
    assert agrees(encoded, exact=False)
    assert codecs.rank_of(encoded) == high + low


@few
@given(matrices, st.lists(rank_groups, max_size=3), seeds)
def test_quantized_product(
    shape: tuple[int, int], groups: list[tuple[int, int, int, int]], seed: int
) -> None:
    pairs = [
        (grid(shape[0], rank, width, a, seed + i), grid(rank, shape[1], width, b, seed + 2 * i))
        for i, (rank, width, a, b) in enumerate(groups)
    ]
    encoded = codecs.quantized_product(pairs, shape)
    assert encoded.meta == {"groups": [list(group) for group in groups]}
    assert agrees(encoded, exact=False)


@few
@given(filled, st.integers(1, 5), st.lists(st.integers(0, 8), min_size=1, max_size=4), seeds)
def test_dct_patches(shape: tuple[int, int], side: int, bits: list[int], seed: int) -> None:
    """Against SciPy's inverse transform of what the parts say, patch by patch."""
    down, across = (math.ceil(n / side) for n in shape)
    counts = [down * across // len(bits)] * len(bits)
    counts[0] += down * across - sum(counts)
    encoded = codecs.dct_patches(normal(shape, seed), side, bits, counts)
    parts = {name: octets(part) for name, part in encoded.parts.items()}
    kinds = packed(parts["kinds"], down * across, max(1, (len(bits) - 1).bit_length()))
    codes, scales = parts["codes"], iter(floats(parts["scales"], "BF16"))
    blocks = {}
    for kind, width in enumerate(bits):
        area, mine = side * side, [n for n, k in enumerate(kinds) if k == kind]
        assert len(mine) == counts[kind]
        used = math.ceil(len(mine) * area * width / 8)
        steps = packed(codes[:used], len(mine) * area, width) if width else []
        codes = codes[used:]
        for n, patch in enumerate(mine):
            scale = next(scales) if width else Fraction(0)
            middle = Fraction(2**width - 1, 2)
            values = [float(scale * (c - middle)) for c in steps[n * area : (n + 1) * area]]
            blocks[patch] = np.array(values or [0.0] * area).reshape(side, side)
    assert not codes and next(scales, None) is None
    whole = np.block(
        [[idctn(blocks[i * across + j], norm="ortho") for j in range(across)] for i in range(down)]
    )
    found = codecs.decode(encoded)
    np.testing.assert_allclose(found.numpy(), whole[: shape[0], : shape[1]], atol=1e-6)


@pytest.mark.parametrize("codec", ["dense", "sparse", "sign_scale"])
def test_extreme_values_come_back_as_they_are(codec: str) -> None:
    top, small = torch.finfo(torch.float32).max, 2.0**-149
    x = torch.tensor([[top, -top, small, -small, 2.0**-126, 0.0]])
    encode = {
        "dense": lambda: codecs.dense(x, torch.float32),
        "sparse": lambda: codecs.sparse(x, x != 0, torch.float32),
        "sign_scale": lambda: codecs.sign_scale(x, top),
    }
    assert agrees(encode[codec]())
