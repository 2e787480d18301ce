"""What each codec takes and refuses, and its sizes by hand; test_roundtrip.py has its values."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cl_graft.skillpack import codecs
from cl_graft.skillpack.codecs import CODECS, Encoded, UnknownCodec
from tests.skillpack.tensors import grid, normal

few = settings(max_examples=40, deadline=None)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


# inputs

shapes = st.lists(st.integers(0, 9), max_size=3).map(tuple)
matrices = st.tuples(st.integers(1, 9), st.integers(1, 9))
dtypes = st.sampled_from(DTYPES)
seeds = st.integers(0, 10_000)


# sizes by hand


def test_sizes_by_hand() -> None:
    x = torch.zeros(100, 64)
    mask = x.bool()
    mask.view(-1)[::100] = True  # 64 values, 6 of 7 bits after the first: 56 bytes of gaps
    q = grid(100, 64, 3, 64, 0)  # 6400 codes and 100 zeros of 3 bits, 100 scales, an exponent
    pair = (grid(2, 100, 2, 50, 0), grid(2, 64, 2, 64, 0))  # 200 + 4 and 128 + 2 values of 2 bits
    sizes = {
        codecs.dense(x): 12800,
        codecs.sparse(x, mask): 2 * 64 + 56,
        codecs.sparse(x, ~x.bool()): 2 * 6400 + 800,
        codecs.low_rank(x[:, :3], x[:3]): 2 * 3 * 164,
        codecs.low_rank_stack(x[:, :2].expand(5, -1, -1), x[:2].expand(5, -1, -1)): 2 * 2 * 5 * 164,
        codecs.quantized(q): 1 + 2438 + 200,
        codecs.quantized_low_rank([pair], (100, 64)): 1 + 51 + 1 + 33 + 2 * (4 + 2),
        codecs.sign_scale(x): 804,
        codecs.mask(mask): 800,
        codecs.exact(x.double()): 8 * 6400,
        codecs.exact(torch.tensor(3)): 8,
        codecs.quantized_product([(grid(100, 2, 2, 2, 0), pair[1])], (100, 64)): 1
        + 75
        + 1
        + 33
        + 2 * (100 + 2),
        codecs.sign_scales(x, 0): 800 + 2 * 100,
        codecs.sign_scales(x, 1): 800 + 2 * 64,
        codecs.sparse_codebook(mask.byte(), mask, torch.arange(8.0)): 4 * 8 + 24 + 56,
        codecs.sparse_low_rank(torch.eye(3, 64), torch.eye(3, 8)): 2 * (3 + 3) + 3 + 2,
        codecs.sign_low_rank(pair, (x.T[:5], x[:5]), 50): 1
        + 51
        + 1
        + 33
        + 2 * (4 + 2)
        + 103
        + 2 * 5 * (2 + 2),
        codecs.dct_patches(x, 16, [3, 0], [8, 20]): 4 + 8 * 256 * 3 // 8 + 2 * 8,
    }
    assert [codecs.payload_bytes(*e.spec) for e in sizes] == list(sizes.values())


def test_top_keeps_the_largest_and_of_equal_ones_the_first() -> None:
    x = torch.tensor([[1.0, -3.0, 2.0], [-2.0, 0.0, 2.0]])
    assert codecs.decode(codecs.sparse_top(x, 3)).tolist() == [[0, -3, 2], [-2, 0, 0]]
    assert torch.equal(codecs.decode(codecs.sparse_top(x, 6)), x)
    assert not codecs.decode(codecs.sparse_top(x, 0)).any()


@few
@given(shapes, seeds, st.data())
def test_top_keeps_exactly_as_many_as_asked(
    shape: tuple[int, ...], seed: int, data: st.DataObject
) -> None:
    x = (normal(shape, seed) * 200).round()  # many ties
    keep = data.draw(st.integers(0, x.numel()))
    encoded = codecs.sparse_top(x, keep)
    assert encoded.parts["values"].numel() == encoded.meta["kept"] == keep
    kept = sorted(encoded.parts["values"].float().abs().tolist())
    assert kept == sorted(x.abs().reshape(-1).tolist())[x.numel() - keep :]


def test_what_is_decoded_is_not_tied_to_the_parts() -> None:
    encoded = codecs.dense(torch.ones(2), torch.float32)
    codecs.decode(encoded).zero_()
    assert codecs.decode(encoded).tolist() == [1, 1]


def test_an_empty_tensor_is_decoded_whatever_its_other_size() -> None:
    """2**48 columns of no rows take no memory, and none for their groups."""
    for shape in ((0, 1 << 48), (1 << 48, 0)):
        for codec, meta in (
            ("dense", {"dtype": "BF16"}),
            ("exact", {"dtype": "I64"}),
            ("low_rank", {"dtype": "BF16", "rank": 0}),
            ("quantized", {"bits": 4, "group_size": 1}),
            ("quantized_low_rank", {"groups": [[0, 4, 1, 1]]}),
        ):
            layout = codecs.layout(codec, shape, meta)
            parts = {name: torch.zeros(size, dtype=dtype) for name, (dtype, size) in layout.items()}
            assert codecs.decode(Encoded(codec, shape, meta, parts)).shape == shape


# refusals


@pytest.mark.parametrize(
    "encode",
    [
        lambda x: codecs.dense(x, torch.float16),
        lambda x: codecs.sparse(x, torch.ones_like(x, dtype=torch.bool), torch.float16),
        lambda x: codecs.low_rank(x, torch.ones(2, 2), torch.float16),
    ],
)
def test_overflow_and_non_finite_values_are_refused(encode: Any) -> None:
    x = torch.ones(2, 2)
    encode(x)
    x[1, 1] = 7e4
    with pytest.raises(ValueError, match="overflows F16: store it in a wider dtype"):
        encode(x)
    for bad in (math.nan, math.inf, -math.inf):
        x[1, 1] = bad
        with pytest.raises(ValueError, match="NaN or Inf"):
            encode(x)


def test_float32_beyond_bfloat16_is_refused() -> None:
    with pytest.raises(ValueError, match="overflows BF16"):
        codecs.dense(torch.tensor([torch.finfo(torch.float32).max]))


def test_bad_arguments_are_refused() -> None:
    x, q = torch.ones(4, 6), grid(2, 6, 3, 4, 0)
    mask = torch.ones(6, 4, dtype=torch.bool)
    bad_scale = dataclasses.replace(q, scale=q.scale * math.inf)
    codecs.check(table([1, 2]))
    for encode in (
        lambda: codecs.dense(x, torch.float64),
        lambda: codecs.exact(x > 0),
        lambda: codecs.exact(x.to(torch.int16)),
        lambda: codecs.exact(x.double() * math.nan),
        lambda: codecs.exact(x * math.inf),
        lambda: codecs.sparse(x, mask),
        lambda: codecs.sparse(x, x),
        lambda: codecs.sparse_top(x, 25),
        lambda: codecs.sparse_top(x, -1),
        lambda: codecs.sparse_top(torch.tensor([1.0, math.nan, 2.0]), 1),
        lambda: codecs.low_rank(x, x),
        lambda: codecs.low_rank(x[0], x),
        lambda: codecs.mask(x),
        lambda: codecs.sign_scale(x, math.nan),
        lambda: codecs.sign_scale(x, 1e300),
        lambda: codecs.sign_scale(x * math.nan),
        lambda: codecs.quantized(bad_scale),
        lambda: codecs.quantized_low_rank([(q, q)], (6, 5)),
        lambda: codecs.quantized_low_rank([(q, grid(2, 6, 4, 4, 0))], (6, 6)),
        lambda: codecs.quantized_low_rank([(q, grid(3, 6, 3, 4, 0))], (6, 6)),
        lambda: codecs.quantized_low_rank([(q, q)] * 65, (6, 6)),
        lambda: codecs.quantized_product([(q, q)], (2, 6)),
        lambda: codecs.quantized_product([(grid(6, 2, 4, 2, 0), q)], (6, 6)),
        lambda: codecs.sign_scales(x, 2),
        lambda: codecs.sign_scales(x[0], 0),
        lambda: codecs.sign_scales(x, 0, torch.ones(6)),
        lambda: codecs.sign_scales(x * math.inf, 0),
        lambda: codecs.sparse_codebook(x.byte(), mask, torch.ones(2)),
        lambda: codecs.sparse_codebook(x.byte(), mask.T, torch.ones(3)),
        lambda: codecs.sparse_codebook(2 * x.byte(), mask.T, torch.ones(2)),
        lambda: codecs.sparse_codebook(x.byte(), mask.T, torch.ones(2) * math.nan),
        lambda: codecs.sparse_low_rank(x, x[:3]),
        lambda: codecs.sparse_low_rank(x * math.nan, x),
        lambda: codecs.sign_low_rank((q, q), (x, x.T), 4),
        lambda: codecs.sign_low_rank((q, grid(2, 6, 4, 4, 0)), (x, x), 4),
        lambda: codecs.seeded_sparse(x, -1, 1 << 48),
        lambda: codecs.seeded_sparse(x, 1, 1 << 40),
        lambda: codecs.seeded_sparse(x * math.nan, 1, 1 << 48),
        lambda: table([1, 1]),
        lambda: table([3, 1]),
        lambda: table([0, 4]),
        lambda: table([1, 2], 31),
        lambda: table([1, 2], 0, 1.0, 1.0),
        lambda: table([1, 2], 0, math.nan),
        lambda: codecs.dct_patches(x, 2, [2, 0], [3, 2]),
        lambda: codecs.dct_patches(x, 2, [9], [6]),
        lambda: codecs.dct_patches(x * math.nan, 2, [2], [6]),
    ):
        with pytest.raises(ValueError):
            encode()


def table(rows: list[int], shift: int = 0, *scales: float) -> Encoded:
    """A table (4, 6) of a rank for each of the scales but the last, and two rows of their own codes."""
    ones = torch.ones(8, 8, dtype=torch.int16)
    shifts, own = (shift * ones[0, :4], ones[0, :6]), (torch.tensor(rows), ones[:2, :6])
    return codecs.coded_table(
        ones[:0, :4], ones[:0, :6], torch.tensor(scales or (1.0,)), shifts, own
    )


SPECS: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
    ("dense", (2, 2), {}),
    ("dense", (2, 2), {"dtype": "F64"}),
    ("dense", (2, 2), {"dtype": ["F32"]}),
    ("dense", (2, 2), {"dtype": "F32", "more": 1}),
    ("dense", (2, -2), {"dtype": "F32"}),
    ("dense", (2, 2.0), {"dtype": "F32"}),
    ("dense", (2, True), {"dtype": "F32"}),
    ("dense", (1 << 30, 1 << 30), {"dtype": "F32"}),
    ("dense", (1,) * 9, {"dtype": "F32"}),
    ("dense", (0, 1 << 30, 1 << 30), {"dtype": "F32"}),  # empty, but its strides overflow
    ("sparse", (2, 2), {"dtype": "F32", "kept": 5}),
    ("sparse", (2, 2), {"dtype": "F32", "kept": 1, "gap": None}),
    ("sparse", (2, 2), {"dtype": "F32", "kept": 1, "gap": [0, 1]}),
    ("sparse", (2, 2), {"dtype": "F32", "kept": 1, "gap": [49, 1]}),
    ("sparse", (2, 2), {"dtype": "F32", "kept": 1, "gap": [2, 1, 1]}),
    ("sparse", (2, 2), {"dtype": "F32", "kept": 1, "gap": [2, 5]}),  # each goes one place on
    ("exact", (2, 2), {}),
    ("exact", (2, 2), {"dtype": "I8"}),
    ("exact", (2, 2), {"dtype": None}),
    ("exact", (2, 2), {"dtype": "I64", "level": 6}),
    ("exact", (1,) * 9, {"dtype": "U8"}),
    ("low_rank", (2, 2), {"dtype": "F32", "rank": -1}),
    ("low_rank", (2,), {"dtype": "F32", "rank": 1}),
    ("quantized", (2, 2), {"bits": 7, "group_size": 4}),
    ("quantized", (2, 2), {"bits": 4, "group_size": 0}),
    ("quantized", (2, 2), {"bits": 4.0, "group_size": 4}),
    ("quantized", (2, 2, 2), {"bits": 4, "group_size": 4}),
    ("quantized_low_rank", (2, 2), {"groups": 1}),
    ("quantized_low_rank", (2, 2), {"groups": [[1, 4, 4]]}),
    ("quantized_low_rank", (2, 2), {"groups": [[1, 4, 4, 0]]}),
    ("quantized_low_rank", (2, 2), {"groups": [[10**20, 4, 4, 4]]}),
    ("quantized_low_rank", (2, 2), {"groups": [[0, 4, 4, 4]] * 65}),
    ("coded_low_rank", (2, 2), {"rank": 3, "layout": "fast", "bytes": 0}),
    ("coded_low_rank", (2, 2), {"rank": 1, "layout": "slow", "bytes": 0}),
    ("coded_low_rank", (2, 2), {"rank": 1, "layout": "fast", "bytes": 33}),
    ("coded_low_rank", (2, 2), {"rank": 1, "layout": "small", "bytes": 2, "top": 1}),
    ("coded_low_rank", (2, 2), {"rank": 1, "layout": "small", "bytes": 4, "top": 8192}),
    ("coded_low_rank", (2, 2), {"rank": 1, "layout": "fast", "bytes": 4, "top": 1}),
    ("coded_table", (2, 3), {"rank": 3, "kept": 0, "layout": "fast", "bytes": 0}),
    ("coded_table", (2, 3), {"rank": 1, "kept": 3, "layout": "fast", "bytes": 0}),
    ("coded_table", (2, 0), {"rank": 0, "kept": 1, "layout": "fast", "bytes": 0}),
    ("coded_table", (2, 3), {"rank": 0, "kept": 1, "layout": "fast", "bytes": 33}),
    ("coded_table", (2, 3), {"rank": 0, "kept": 1, "layout": "small", "bytes": 2, "top": 1}),
    ("coded_table", (2, 3), {"rank": 0, "kept": 1, "layout": "fast", "bytes": 0, "gap": [1, 3]}),
    ("coded_table", (2, 3), {"rank": 0, "layout": "fast", "bytes": 0}),
    ("coded_table", (2, 3, 4), {"rank": 0, "kept": 1, "layout": "fast", "bytes": 0}),
    ("coded_low_rank_stack", (2, 2), {"ranks": [1, 1], "layout": "fast", "bytes": 0}),
    ("coded_low_rank_stack", (2, 2, 3), {"ranks": [1], "layout": "fast", "bytes": 0}),
    ("coded_low_rank_stack", (2, 2, 3), {"ranks": [1, 3], "layout": "fast", "bytes": 0}),
    ("coded_low_rank_stack", (2, 2, 3), {"ranks": [1, True], "layout": "fast", "bytes": 0}),
    ("coded_low_rank_stack", (2, 2, 3), {"ranks": 2, "layout": "fast", "bytes": 0}),
    ("coded_low_rank_stack", (2, 2, 3), {"ranks": [0, 0], "layout": "fast", "bytes": 39}),
    ("coded", (2, 2), {"kept": 3, "columns": 0, "layout": "fast", "bytes": 0}),
    ("coded", (2, 2), {"kept": 1, "columns": 2, "layout": "fast", "bytes": 0}),
    ("coded", (2, 2), {"kept": 1, "columns": 0, "layout": "fast", "bytes": 0, "gap": None}),
    ("coded", (2, 2), {"kept": 1, "columns": 0, "layout": ["fast"], "bytes": 0}),
    ("sign_scale", (2, 2), {"scale": 1}),
    ("sign_scales", (2, 2), {}),
    ("sign_scales", (2, 2), {"axis": 2}),
    ("sign_scales", (2, 2), {"axis": True}),
    ("sign_scales", (2,), {"axis": 0}),
    ("sparse_codebook", (2, 2), {"bits": 0, "kept": 1}),
    ("sparse_codebook", (2, 2), {"bits": 9, "kept": 1}),
    ("sparse_codebook", (2, 2), {"bits": 1, "kept": 5}),
    ("seeded_sparse", (2, 2), {"dtype": "F32", "kept": 1, "seed": 1, "rate": (1 << 48) + 1}),
    ("seeded_sparse", (2, 2), {"dtype": "F32", "kept": 1, "seed": 1, "rate": (1 << 41) - 1}),
    ("seeded_sparse", (1 << 40,), {"dtype": "F32", "kept": 9, "seed": 1, "rate": 1 << 42}),
    ("quantized_product", (2, 2), {"groups": [[1, 7, 4, 4]]}),
    ("quantized_product", (2, 2), {"groups": [[0, 4, 4, 4]] * 65}),
    ("sign_low_rank", (2, 2), {"grid": [1, 2, 4, 4], "signs": [1, 4]}),
    ("sign_low_rank", (2, 2), {"grid": [1, 1, 4, 4], "signs": [1, 4, 4]}),
    ("sign_low_rank", (2, 2), {"grid": [1, 2, 4, 4], "signs": [1, 0, 4]}),
    ("sparse_low_rank", (2, 2), {"dtype": "F32", "rank": 3, "left": [0], "right": [0]}),
    ("sparse_low_rank", (2, 2), {"dtype": "F32", "rank": 1, "left": [0, 1], "right": [0]}),
    ("sparse_low_rank", (2, 2), {"dtype": "F32", "rank": 1, "left": [3], "right": [0]}),
    ("dct_patches", (2, 2), {"patch": 2, "bits": [[1, 2]]}),
    ("dct_patches", (2, 2), {"patch": 257, "bits": [[1, 1]]}),
    ("dct_patches", (2, 2), {"patch": 0, "bits": [[1, 1]]}),
    ("dct_patches", (2, 2), {"patch": 2, "bits": [[9, 1]]}),
    ("dct_patches", (2, 2), {"patch": 2, "bits": []}),
    ("dct_patches", (2, 2), {"patch": 2, "bits": [[0, 1]] + [[0, 0]] * 8}),
    ("mask", (2, 2), {"dtype": "U8"}),
    ("mask", (1 << 30, 1 << 30), {}),
    ("lossless", (2, 2), {"dtype": "F64", "bytes": [0, 0, 0]}),
    ("lossless", (2, 2), {"dtype": "F32", "bytes": [0, 0]}),
    ("lossless", (2, 2), {"dtype": "F32", "bytes": [0, 0, 3]}),
    ("lossless", (2, 2), {"dtype": "F32", "bytes": [0, -1, 0]}),
    ("lossless", (2, 2), {"dtype": "F32", "bytes": [0, 0, 0], "rows": 3}),
    ("lossless", (2, 2), {"dtype": "F32", "bytes": [0, 0, 0], "rows": 1, "gap": [1, 3]}),
    ("lossless", (2, 2), {"dtype": "F32", "bytes": [0, 0, 0], "rows": 1, "gap": [49, 1]}),
    ("lossless", (2, 2), {"dtype": "F32", "bytes": [0, 0, 0], "gap": [1, 1]}),
    ("lossless", (2, 2), {"dtype": "F32", "bytes": [0, 0, 0], "kept": 1}),
    ("lossless", (2, 2), {"dtype": "F32"}),
]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_spec_without_a_meaning_has_no_layout(spec: Any) -> None:
    with pytest.raises(ValueError) as error:
        codecs.layout(*spec)
    assert str(error.value).endswith(".") and "\n" not in str(error.value)


def test_what_a_refusal_quotes_is_cut_short() -> None:
    for spec in (
        ("dense", (7,) * 10**6, {"dtype": "F32"}),
        ("dense", (2,), {"dtype": "F" * 10**6}),
        ("exact", (2,), {"dtype": "F" * 10**6}),
        ("sparse", (2,), {"dtype": "F32", "kept": [7] * 10**6}),
        ("sign_scale", (2,), {str(i): i for i in range(10**4)}),
    ):
        with pytest.raises(ValueError) as error:
            codecs.layout(*spec)
        assert len(str(error.value)) < 300
    with pytest.raises(UnknownCodec) as unknown:
        codecs.layout("zip" * 10**6, (2,), {})
    assert len(str(unknown.value)) < 100 + sum(len(f"{name}, ") for name in CODECS) + 100


def one_of_each() -> dict[str, Encoded]:
    x = normal((6, 7), 0)
    codes = (x / x.abs().max() * 90).short()
    return {
        "dense": codecs.dense(x),
        "sparse": codecs.sparse_top(x, 3),
        "low_rank": codecs.low_rank(x[:, :2], x[:2]),
        "low_rank_stack": codecs.low_rank_stack(normal((6, 3, 2), 1), normal((6, 2, 7), 2)),
        "quantized": codecs.quantized(grid(6, 7, 3, 4, 0)),
        "quantized_low_rank": codecs.quantized_low_rank(
            [(grid(1, 6, 3, 4, 0), grid(1, 7, 3, 4, 1))], (6, 7)
        ),
        "coded_low_rank": codecs.coded_low_rank(codes[:3], codes[:3], x[0, :3], (7, 7), "fast"),
        "coded_low_rank_stack": codecs.coded_low_rank_stack(
            [
                None,
                codecs.coded_low_rank(codes[:2, :3], codes[:2], x[0, :2], (3, 7), "fast"),
                *[None] * 4,
            ],
            (6, 3, 7),
            "fast",
        ),
        "coded_table": codecs.coded_table(
            codes[:3, :6],
            codes[:3],
            x[0, :4],
            (codes[0, :6] // 9, codes[0] // 9),
            (torch.tensor([1, 4]), codes[:2]),
            "fast",
        ),
        "coded": codecs.coded(codes, x[:, 0], (6, 7), "fast"),
        "sign_scale": codecs.sign_scale(x),
        "mask": codecs.mask(x > 0),
        "exact": codecs.exact(x.double()),
        "lossless": codecs.lossless(x, x.bfloat16()),
        "quantized_product": codecs.quantized_product(
            [(grid(6, 2, 3, 4, 0), grid(2, 7, 3, 4, 1))], (6, 7)
        ),
        "sign_scales": codecs.sign_scales(x, 1),
        "sparse_codebook": codecs.sparse_codebook(
            (x > 0).byte() * 2, torch.arange(42).view(6, 7) % 4 == 0, torch.arange(4) - 1.5
        ),
        "seeded_sparse": codecs.seeded_sparse(x, 5, 1 << 46),
        "sparse_low_rank": codecs.sparse_low_rank(torch.eye(2, 6), x[:2]),
        "sign_low_rank": codecs.sign_low_rank(
            (grid(1, 6, 3, 4, 0), grid(1, 7, 3, 4, 1)), (x[:3, :6], x[:3]), 4
        ),
        "dct_patches": codecs.dct_patches(x, 3, [3, 1, 0], [1, 3, 2]),
    }


def test_there_is_one_of_each() -> None:
    assert set(one_of_each()) == set(CODECS)


@pytest.mark.parametrize("codec", CODECS)
def test_parts_other_than_the_layouts_are_refused(codec: str) -> None:
    encoded = one_of_each()[codec]
    name, part = next((n, p) for n, p in encoded.parts.items() if p.numel())
    for parts in (
        {},
        encoded.parts | {"more": part},
        encoded.parts | {name: part.reshape(-1)[:-1]},
        encoded.parts | {name: part.to(torch.int16)},
    ):
        with pytest.raises(ValueError, match="needs the parts"):
            codecs.decode(dataclasses.replace(encoded, parts=parts))


@pytest.mark.parametrize(
    "codec",
    [
        "sparse",
        "quantized",
        "quantized_low_rank",
        "sign_scale",
        "mask",
        "quantized_product",
        "sign_scales",
        "sparse_codebook",
        "sparse_low_rank",
        "sign_low_rank",
        "dct_patches",
    ],
)
def test_a_stray_bit_after_packed_values_is_refused(codec: str) -> None:
    encoded = one_of_each()[codec]
    packed = next(part for part in encoded.parts.values() if part.dtype == torch.uint8)
    packed[-1] |= 0x80
    with pytest.raises(ValueError, match="not zero"):
        codecs.check(encoded)


def test_an_index_must_fit_its_values_and_its_shape() -> None:
    x = torch.zeros(8, 8)
    mask = x > 0
    mask[0, 0] = mask[7, 7] = True
    thin, dense = codecs.sparse(x, mask), codecs.sparse(x, ~mask)
    assert "gap" in thin.meta and "gap" not in dense.meta
    codecs.check(dataclasses.replace(thin, shape=(64,)))
    with pytest.raises(ValueError, match="past the last of 63"):
        codecs.check(dataclasses.replace(thin, shape=(63,)))
    dense.parts["index"][0] ^= 1
    with pytest.raises(ValueError, match="63 positions for 62 values"):
        codecs.check(dense)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_finite_finds_any_bad_value(bad: float) -> None:
    for encoded in one_of_each().values():
        assert codecs.finite(encoded)
        for part in encoded.parts.values():
            if part.is_floating_point() and part.numel():
                old = part.view(-1)[-1].clone()
                part.view(-1)[-1] = bad
                assert not codecs.finite(encoded)
                part.view(-1)[-1] = old


def test_the_positions_of_a_seed_are_those_of_splitmix64() -> None:
    """The first numbers of seed 1234567, as Rosetta Code has them for every language."""
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    x = torch.arange(1.0, 6.0)
    for rate in (1 << 46, 1 << 47, 3 << 46, 1 << 48):
        kept = [n if drawn >> 16 < rate else 0 for n, drawn in enumerate(published, 1)]
        assert codecs.decode(codecs.seeded_sparse(x, 1234567, rate)).tolist() == kept


def test_a_seed_must_keep_as_many_as_there_are_values() -> None:
    encoded = codecs.seeded_sparse(normal((40, 30), 0), 5, 1 << 46)
    with pytest.raises(ValueError, match="the seed keeps"):
        codecs.decode(dataclasses.replace(encoded, meta=encoded.meta | {"seed": 6}))


def test_patches_come_back_at_the_edges_too_and_the_largest_have_the_most_bits() -> None:
    x = normal((10, 13), 0)
    x[4:8, 8:12] *= 50
    encoded = codecs.dct_patches(x, 4, [8, 0], [1, 11])
    found = codecs.decode(encoded)
    assert (found[4:8, 8:12] - x[4:8, 8:12]).norm() < 0.02 * x[4:8, 8:12].norm()
    found[4:8, 8:12] = 0
    assert not found.any()
    whole = codecs.decode(codecs.dct_patches(x, 4, [8], [12]))
    assert (whole - x).norm() < 0.02 * x.norm()


# bits of weights


STORED: dict[
    str, tuple[int, float]
] = {  # of `one_of_each`: bits of its weights, and what it takes in theory
    "dense": (16 * 42, 16 * 42),
    "sparse": (16 * 3, 16 * 3 + math.log2(math.comb(42, 3))),
    "low_rank": (16 * 2 * (6 + 7), 16 * 2 * (6 + 7)),
    "low_rank_stack": (16 * 2 * 6 * (3 + 7), 16 * 2 * 6 * (3 + 7)),
    "quantized": (3 * 42, 3 * (42 + 12) + 16 * 12),
    "quantized_low_rank": (3 * (6 + 7), 3 * (6 + 7 + 4) + 16 * 4),
    "coded_low_rank": (8 * 42, 8 * (42 + 6 + 8)),
    "coded_low_rank_stack": (8 * 20, 8 * (20 + 4 + 16)),
    "coded_table": (8 * (4 + 3 + 21 + 18 + 14), 8 * (60 + 2 * 4 + 1 + 10)),
    "coded": (8 * 42, 8 * (42 + 12 + 6 + 1)),
    "sign_scale": (42, 42),
    "exact": (64 * 42, 64 * 42),
    "mask": (0, 42),
    "lossless": (16 * 42, 8 * sum(one_of_each()["lossless"].meta["bytes"])),
    "quantized_product": (3 * 2 * (6 + 7), 3 * (12 + 6 + 14 + 4) + 16 * (6 + 4)),
    "sign_scales": (42, 42 + 16 * 7),
    "sparse_codebook": (2 * 11, 32 * 4 + 2 * 11 + math.log2(math.comb(42, 11))),
    "seeded_sparse": (16 * 12, 16 * 12),
    "sparse_low_rank": (16 * (2 + 14), 16 * (2 + 14) + math.log2(math.comb(12, 2))),
    "sign_low_rank": (
        (3 + 3) * (6 + 7),
        3 * (6 + 2 + 7 + 2) + 16 * 4 + 3 * (6 + 7) + 16 * 3 * (2 + 2),
    ),
    "dct_patches": (9 * (3 + 3), 9 * (3 + 3) + 16 * 4 + math.log2(60)),  # 6! / (1! 3! 2!) ways
}


@pytest.mark.parametrize("codec", CODECS)
def test_the_bits_of_the_weights_alone_and_of_the_content(codec: str) -> None:
    """No masks, positions, scales, zeros or headers: what the paper's comparison counts."""
    spec, (kept, least) = one_of_each()[codec].spec, STORED[codec]
    assert codecs.weight_bits(*spec) == kept
    assert codecs.least_bits(*spec) == pytest.approx(least)
    assert least <= 8 * codecs.payload_bytes(*spec)


def test_values_of_a_delta_count_16_bits_whatever_their_dtype_and_state_in_full() -> None:
    x = normal((6, 7), 0)
    assert codecs.weight_bits(*codecs.dense(x, torch.float32).spec) == 16 * 42
    for dtype in codecs.STORABLE.values():
        spec = codecs.exact(x.to(dtype)).spec
        assert (
            codecs.weight_bits(*spec) == 8 * codecs.payload_bytes(*spec) == 8 * dtype.itemsize * 42
        )


# specs, rows, state


def test_specs_are_foretold() -> None:
    for encoded, spec in (
        (codecs.dense(torch.ones(2, 3)), codecs.dense_spec((2, 3))),
        (codecs.exact(torch.ones(4).int()), codecs.exact_spec((4,), torch.int32)),
        (
            codecs.low_rank(torch.ones(2, 4), torch.ones(4, 3), torch.float16),
            codecs.low_rank_spec((2, 3), 4, torch.float16),
        ),
        (
            one_of_each()["quantized_low_rank"],
            codecs.quantized_low_rank_spec((6, 7), [[1, 3, 4, 4]]),
        ),
    ):
        assert encoded.spec == spec


@pytest.mark.parametrize("codec", sorted(CODECS.keys() - {"lossless"}))
def test_rows_are_those_of_what_is_decoded(codec: str) -> None:
    encoded, ids = one_of_each()[codec], torch.tensor([5, 0, 0, 3])
    found = codecs.rows(encoded, ids)
    assert found.dtype == torch.float32
    assert torch.equal(found, codecs.decode(encoded)[ids])


EXTREMES = {
    torch.uint8: [0, 255],
    torch.int32: [-(2**31), 2**31 - 1, 2**24 + 1],
    torch.int64: [-(2**63), 2**63 - 1, 2**53 + 1],
    torch.float16: [65504.0, -(2.0**-24), -0.0],
    torch.bfloat16: [torch.finfo(torch.bfloat16).max, 2.0**-133, -0.0],
    torch.float32: [torch.finfo(torch.float32).max, 2.0**-149, -0.0, 1 / 3],
    torch.float64: [1.7e308, 5e-324, -0.0, 1 / 3],
}


@pytest.mark.parametrize("dtype", EXTREMES, ids=str)
def test_state_comes_back_bit_for_bit_in_its_own_dtype(dtype: torch.dtype) -> None:
    assert set(EXTREMES) == set(codecs.STORABLE.values())
    x = torch.tensor(EXTREMES[dtype], dtype=dtype)
    for kept in (x, x.repeat(3, 2).T, x[0], x[:0]):
        found = codecs.original(codecs.exact(kept))
        assert found.dtype == dtype and found.shape == kept.shape
        assert found.reshape(-1).view(torch.uint8).equal(kept.reshape(-1).view(torch.uint8))


def test_state_is_not_tied_to_what_it_was_made_of() -> None:
    x = torch.tensor([1, 2])
    encoded = codecs.exact(x)
    x.zero_()
    codecs.original(encoded).zero_()
    codecs.decode(encoded).zero_()
    assert codecs.original(encoded).tolist() == codecs.decode(encoded).tolist() == [1, 2]


def test_state_is_rounded_once_where_it_is_taken_for_a_delta() -> None:
    encoded = codecs.exact(torch.tensor([2**24 + 1, 2**24 + 3, -7]))
    assert codecs.decode(encoded).tolist() == [2**24, 2**24 + 4, -7]


def test_only_what_was_kept_exactly_has_an_original() -> None:
    with pytest.raises(ValueError, match="codec dense keeps no original"):
        codecs.original(one_of_each()["dense"])
    encoded = codecs.exact(torch.ones(2))
    with pytest.raises(ValueError, match="needs the parts"):
        codecs.original(dataclasses.replace(encoded, shape=(3,)))


def test_a_stack_is_a_product_for_each_of_its_matrices() -> None:
    left, right = normal((3, 5, 2), 0).bfloat16().float(), normal((3, 2, 4), 1).bfloat16().float()
    stack = codecs.low_rank_stack(left, right)
    for i, one in enumerate(codecs.decode(stack)):
        assert torch.equal(one, codecs.decode(codecs.low_rank(left[i], right[i])))
    picked = torch.tensor([2, 0])
    assert torch.equal(codecs.rows(stack, picked), codecs.decode(stack)[picked])
    assert not codecs.is_factored(stack) and codecs.rank_of(stack) is None
    for wrong in (right[:2], right.mT, right[0]):
        with pytest.raises(ValueError, match="have no product"):
            codecs.low_rank_stack(left, wrong)
    with pytest.raises(ValueError, match="is not that of a stack of matrices"):
        codecs.layout("low_rank_stack", (5, 4), {"dtype": "BF16", "rank": 2})


@pytest.mark.parametrize("layout", ["small", "fast"])
def test_a_stack_of_coded_matrices_is_each_of_them_and_one_of_zeros_takes_two_bytes(
    layout: codecs.CodeLayout,
) -> None:
    codes = (normal((4, 9), 3) * 30).short()
    shift = torch.arange(-3, 4).short()
    one = codecs.coded_low_rank(
        codes[:2, :5], codes[:2, :7], normal((2,), 1), (5, 7), layout, (None, shift)
    )
    other = codecs.coded_low_rank(codes[:, :5], codes[:, :7], normal((4,), 2), (5, 7), layout)
    stack = codecs.coded_low_rank_stack([one, None, other], (3, 5, 7), layout)
    assert stack.meta["ranks"] == [2, 0, 4]
    whole = codecs.decode(stack)
    assert torch.equal(whole[0], codecs.decode(one)) and not whole[1].any()
    assert torch.equal(whole[2], codecs.decode(other))
    assert torch.equal(codecs.rows(stack, torch.tensor([2])), whole[2:])
    assert not codecs.is_factored(stack) and codecs.layout_name(stack) == layout
    less = codecs.coded_low_rank_stack([one, other], (2, 5, 7), layout)
    assert codecs.payload_bytes(*stack.spec) == codecs.payload_bytes(*less.spec) + 2
    for wrong in ([one, other], [one, None, stack]):
        with pytest.raises(ValueError, match="are not a stack of"):
            codecs.coded_low_rank_stack(wrong, (3, 5, 7), layout)
