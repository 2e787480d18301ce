"""The codec `lossless`: every bit comes back, and what is no stream of it is refused; one small stream by hand."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cl_graft.skillpack import codecs
from cl_graft.skillpack.codecs import Encoded, NoDelta, lossless, restore, token_stream
from cl_graft.skillpack.format.file import NonFinite, SkillPack, WrongBase, fingerprint
from cl_graft.skillpack.live.attach import Attached
from cl_graft.skillpack.live.composed import Deltas, compose
from cl_graft.skillpack.live.grafted import Grafted
from cl_graft.skillpack.tools.compare import compare
from tests.refusals import refusal
from tests.skillpack.tensors import normal

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
few = settings(max_examples=60, deadline=None)
shapes = st.sampled_from([(), (0,), (1,), (7,), (5, 3), (2, 3, 4), (3, 0), (0, 2), (40, 9)])
dtypes = st.sampled_from(FLOATS)


def same(a: Tensor, b: Tensor) -> bool:
    bits = (t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(*bits)


def drawn(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Any finite bit patterns: both zeros, subnormals, the largest."""
    kind = torch.int32 if dtype.itemsize == 4 else torch.int16
    g, ends = torch.Generator().manual_seed(seed), torch.iinfo(kind)
    x = torch.randint(ends.min, ends.max + 1, shape, dtype=kind, generator=g).view(dtype)
    return torch.where(x.isfinite(), x, torch.tensor(-0.0, dtype=dtype))


# every bit


@few
@given(
    shapes,
    dtypes,
    dtypes,
    st.sampled_from(["any", "near", "same", "rows", "zeros"]),
    st.integers(0, 999),
)
def test_every_bit_comes_back(
    shape: tuple[int, ...], dtype: torch.dtype, own: torch.dtype, how: str, seed: int
) -> None:
    base = drawn(shape, own, seed) if how == "any" else normal(shape, seed, own)
    x = drawn(shape, dtype, seed + 1) if how == "any" else base.to(dtype)
    if how == "near":
        x = (x.float() + 1e-4 * normal(shape, seed + 1)).to(dtype)
    if how == "rows" and shape:
        x = x.clone()
        x[::3] = 1.5
    if how == "zeros":
        base, x = torch.zeros(shape, dtype=own), -torch.zeros(shape, dtype=dtype)
    for before in (base, None):
        encoded = lossless(x, before)
        codecs.check(encoded)
        assert same(restore(encoded, before), x)
        wanted = codecs.layout(*encoded.spec)["code"][1]
        assert tuple(encoded.parts["code"].shape) == wanted


@few
@given(dtypes, st.integers(0, 6), st.integers(0, 6), st.integers(0, 99))
def test_rows_that_the_base_lacks_or_has_too_many(
    dtype: torch.dtype, rows: int, there: int, seed: int
) -> None:
    base = normal((there, 3), seed, dtype)
    x = torch.cat([base, normal((6, 3), seed + 1, dtype)])[:rows]
    assert same(restore(lossless(x, base), base), x)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_ends_of_the_line_and_both_zeros(dtype: torch.dtype) -> None:
    """From each of these to each other: steps that wrap around 2**w among them."""
    ends = torch.finfo(dtype)
    bits = torch.tensor([0, 1], dtype=torch.int32 if dtype.itemsize == 4 else torch.int16)
    values = torch.tensor([ends.max, ends.min, 0.0, -0.0, ends.tiny, 1.0], dtype=dtype)
    values = torch.cat([values, bits.view(dtype), -bits.view(dtype)])
    base, x = (torch.stack(pair) for pair in zip(*itertools.product(values, values), strict=True))
    assert same(restore(lossless(x, base), base), x)


def test_more_than_a_block_and_what_does_not_lie_straight() -> None:
    base = normal((700, 900), 0)
    x = base + 1e-4 * normal((700, 900), 1)
    for a, b in ((x, base), (x.T, base.T), (x[::2, ::3], base[::2, ::3])):
        encoded = lossless(a, b)
        assert same(restore(encoded, b), a)
        assert encoded.parts["code"].numel() < 0.6 * 4 * a.numel()
    held = base.clone()
    restore(lossless(x, base), base).zero_()
    assert torch.equal(base, held)


def test_a_base_in_another_dtype_with_the_same_values_is_the_same_base() -> None:
    """As a fingerprint does not change with the dtype that a model is loaded in."""
    narrow = normal((5, 7), 0, torch.bfloat16)
    x = (narrow.float() * 1.01).half()
    assert same(restore(lossless(x, narrow), narrow.float()), x)


def test_training_that_moves_few_values_takes_few_bytes() -> None:
    base = normal((512, 512), 0, torch.bfloat16)
    x = (base.float() + 1e-6 * normal((512, 512), 1).sign()).bfloat16()
    changed = float((x != base).float().mean())
    assert 0.001 < changed < 0.05
    share = lossless(x, base).parts["code"].numel() / (2 * x.numel())
    entropy = -(changed * math.log2(changed) + (1 - changed) * math.log2(1 - changed)) / 16
    assert share < entropy  # the exponents tell where to look
    few_rows = base.clone()
    few_rows[[3, 400]] += 1
    encoded = lossless(few_rows, base)
    assert encoded.meta["rows"] == 2 and encoded.parts["code"].numel() < 2 * 2 * 512


def test_nothing_but_finite_floats_of_up_to_32_bits() -> None:
    x = torch.ones(3)
    for bad, base, said in (
        (torch.tensor([1.0, math.nan]), None, "NaN or Inf"),
        (torch.tensor([1.0, math.inf]), None, "NaN or Inf"),
        (x.double(), None, "torch.float64"),
        (x.int(), None, "torch.int32"),
        (x, torch.ones(3).double(), "torch.float64"),
        (x, torch.ones(3, 1), "shape"),
        (x.half(), torch.full((3,), math.nan), "NaN, which has no one rounding"),
    ):
        with pytest.raises(ValueError, match=said):
            lossless(bad, base)


# the stream, by hand


def test_a_stream_by_hand() -> None:
    """Of four ones in F16 the third goes one step up: tokens 0, 0, 2, 0 with the shares 3/4 and 1/4.

    The last is coded first: the state is 0, then 3 * 2**22 (0 + the 3/4 before token 2), then 2**24 (1 whole share and
    nothing left), then 2**24 + 2**22; one word.
    """
    base = torch.ones(1, 4, dtype=torch.float16)
    x = base.clone()
    x[0, 2] = 1 + 2.0**-10
    encoded = lossless(x, base)
    assert encoded.meta == {"dtype": "F16", "bytes": [6, 0, 4]}
    assert encoded.parts["code"].tolist() == [0, 0, 3, 3, 0, 1, 0, 0, 0x40, 1]
    # a step of 9 up is 18 = 0b10010: token 4 * 2 + 4, low bits 10; 8 down is 15 = 0b1111: token 4 + 7, low bit 1
    x[0, 2], x[0, 3] = 1 + 9 * 2.0**-10, 1 - 8 * 2.0**-11
    encoded = lossless(x, base)
    sizes, code = encoded.meta["bytes"], encoded.parts["code"].tolist()
    assert code[: sizes[0]] == [0, 0, 13, 2, *[0] * 10, 1, 1] and code[sizes[0] :][: sizes[1]] == [
        1,
        2,
    ]
    assert same(restore(encoded, base), x)


def test_tokens_are_the_length_and_two_bits() -> None:
    numbers = [*range(1 << 12), *(2**k + d for k in range(12, 32) for d in (-1, 0, 1)), 2**32 - 1]
    tokens, left, low = token_stream.split(np.array(numbers, np.uint32))
    for z, t, r, rest in zip(numbers, tokens.tolist(), left.tolist(), low.tolist(), strict=True):
        length = max(0, z.bit_length() - 3)
        assert (t, r, rest) == (4 * length + (z >> length), length, z % (1 << length))
    assert token_stream.joined(tokens, low).tolist() == numbers
    assert token_stream.lengths(tokens).tolist() == left.tolist()
    assert max(tokens) + 1 == token_stream.tokens_of(32) == token_stream.TOKENS
    assert token_stream.split(np.array([65535], np.uint32))[0] + 1 == token_stream.tokens_of(16)


@few
@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=30).filter(lambda n: n[0] and n[-1]))
def test_a_table_is_near_what_was_counted_and_adds_up(counts: list[int]) -> None:
    table = token_stream.Table(3, 5, token_stream._weights(np.array(counts)))
    used, found = table.frequencies()
    assert used.tolist() == [5 + i for i, count in enumerate(counts) if count]
    assert found.sum() == 1 << 24 and (found > 0).all()
    for count, frequency in zip(filter(None, counts), found.tolist(), strict=True):
        share = count / sum(counts) * 2**24
        assert frequency == pytest.approx(share, rel=0.15, abs=2 + 2**24 * 2**-33 * len(counts))
    assert (
        token_stream.read_tables(token_stream.write_tables([replace(table, first=0)]))[0].weights
        == table.weights
    )


# what is no stream


def a_stream() -> tuple[Encoded, Tensor, Tensor]:
    base = normal((40, 50), 0)
    x = base.clone()
    x[::2] += 1e-4 * normal((20, 50), 1)
    return lossless(x, base), base, x


def test_a_damaged_stream_is_refused_or_stands_for_something_else_within_the_shape() -> None:
    """Whatever byte changes: the file's checksum tells damage, the codec keeps within what the shape says."""
    encoded, base, x = a_stream()
    refused = 0
    for place in range(0, encoded.parts["code"].numel(), 11):
        code = encoded.parts["code"].clone()
        code[place] ^= 0x55
        try:
            found = restore(replace(encoded, parts={"code": code}), base)
        except ValueError as error:
            refused += 1
            assert str(error).endswith(".") and "\n" not in str(error)
        else:
            assert found.shape == x.shape and found.dtype == x.dtype and not same(found, x)
    assert refused > 30


def test_sections_that_do_not_fit_are_refused() -> None:
    encoded, base, _ = a_stream()
    assert "rows" in encoded.meta
    code, (tables, low, words) = encoded.parts["code"].tolist(), encoded.meta["bytes"]
    index = len(code) - tables - low - words

    def with_(said: str, **sections: Any) -> None:
        parts = {
            "index": code[:index],
            "tables": code[index : index + tables],
            "low": code[index + tables : index + tables + low],
            "words": code[-words:],
        } | sections
        meta = encoded.meta | {"bytes": [len(parts[k]) for k in ("tables", "low", "words")]}
        joined = torch.tensor([byte for part in parts.values() for byte in part], dtype=torch.uint8)
        with pytest.raises(ValueError, match=said):
            restore(Encoded("lossless", encoded.shape, meta, {"code": joined}), base)

    own = code[index : index + tables]
    with_("cut off", tables=own[:-1])
    with_("cut off", tables=own[:2])
    with_("no table", tables=[])
    with_("begin and end", tables=[0, 0, 1, 0])
    with_("begin and end", tables=[0, 0, 0])
    with_("go up from 0", tables=[1, 0, 1, 1])
    with_("go up from 0", tables=[*own, 0, 0, 1, 1])
    with_("goes beyond", tables=[0, 123, 2, 1, 1])
    with_("goes on|not zero", words=code[-words:] + [1, 0, 0, 0])
    with_("last word", words=code[-words:-4] + [0, 0, 0, 0])
    with_("cannot hold|goes on", low=code[index + tables : index + tables + low - 1])
    with_("goes on", low=code[index + tables : index + tables + low] + [0])
    with_("rows are marked", index=[code[0] ^ 1, *code[1:index]])


def test_what_is_no_base_of_it() -> None:
    encoded, base, _ = a_stream()
    with pytest.raises(ValueError, match="none for shape"):
        restore(encoded, base[:, :49])
    with pytest.raises(ValueError, match="stores a delta"):
        restore(codecs.dense(base), base)


def test_tables_of_16_bits_end_with_their_tokens_and_exponents() -> None:
    base = torch.ones(4, dtype=torch.float16)
    encoded = lossless(base + 1, base)
    for table in ([0, 59, 2, 1, 1], [0, 0, 1, 1, 32, 0, 1, 1]):
        meta = {"dtype": "F16", "bytes": [len(table), 0, 0]}
        parts = {"code": torch.tensor(table, dtype=torch.uint8)}
        with pytest.raises(ValueError, match="goes beyond 32 contexts or 60 tokens"):
            codecs.check(Encoded("lossless", encoded.shape, meta, parts))


# there is no delta


def model_and_pack(
    dtype: torch.dtype = torch.float32, own: torch.dtype = torch.float32
) -> tuple[nn.Module, SkillPack, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(6, 5), "b": nn.Linear(5, 4)}).to(own)
    named = dict(model.named_parameters())
    tuned = {n: (p.detach().float() * 1.01).to(dtype) for n, p in named.items() if n != "b.bias"}
    tensors = {n: lossless(x, named[n].detach()) for n, x in tuned.items()}
    return model, SkillPack(tensors, "math", "m", {}, fingerprint(named.items())), tuned


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_live_model_gets_the_tuned_bits_and_its_own_back(dtype: torch.dtype) -> None:
    model, pack, tuned = model_and_pack(dtype, dtype)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    grafted = Grafted(model)
    for _ in range(2):
        grafted.activate([pack])
        for name, parameter in model.named_parameters():
            assert same(parameter.detach(), tuned.get(name, before[name]))
        grafted.unload()
        assert all(same(p.detach(), before[n]) for n, p in model.named_parameters())


def test_a_wider_model_gets_the_values_and_a_narrower_one_refuses() -> None:
    model, pack, tuned = model_and_pack(torch.bfloat16, torch.float32)
    Grafted(model).activate([pack])
    assert torch.equal(dict(model.named_parameters())["a.weight"], tuned["a.weight"].float())
    for dtype, own in ((torch.float32, torch.bfloat16), (torch.float16, torch.bfloat16)):
        model, pack, _ = model_and_pack(dtype, own)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        refusal(WrongBase, lambda: Grafted(model).activate([pack]), "'a.weight'", f"in {dtype}")  # noqa: B023
        assert all(same(p.detach(), before[n]) for n, p in model.named_parameters())


def test_what_would_add_a_delta_refuses() -> None:
    model, pack, _ = model_and_pack()
    assert (
        pack.lossless
        and not SkillPack({"a": codecs.dense(torch.ones(1))}, "t", "m", {}, "").lossless
    )
    other = replace(pack, tensors={"a.bias": codecs.dense(torch.ones(5))}, task="code")
    model.forward = lambda x: model["b"](model["a"](x))  # type: ignore[index, method-assign]
    grafted = Grafted(model)
    for add in (
        lambda: pack.delta("a.weight"),
        lambda: pack.rows("a.weight", torch.tensor([0])),
        lambda: pack.decode(),
        lambda: Deltas(pack)["a.weight"],
        lambda: grafted.activate([pack, other]),
        lambda: grafted.activate([other, pack]),
        lambda: Attached(model, [pack], {"x": torch.zeros(3, 2, 6)}),
        lambda: compose(lambda name, one: one.delta(name), [pack], {"a.weight": (5, 6)}),
        lambda: compare(pack, other),
    ):
        refusal(NoDelta, add, "'math'", "bit for bit", "`cl-graft pack apply`")
    grafted.activate([other])
    assert grafted.active == (other,)


def test_a_pack_that_stands_for_nan_is_refused() -> None:
    base = torch.tensor([1.0, torch.finfo(torch.float32).max])
    good = lossless(torch.nextafter(base, torch.tensor(0.0)), base)
    up = replace(good, parts={"code": good.parts["code"].clone()})
    tables = good.meta["bytes"][0]
    assert up.parts["code"][:tables].tolist() == [0, 1, 1, 2]  # both one step down
    up.parts["code"][1] = 2  # up
    pack = SkillPack({"w": up}, "math", "m", {}, "0" * 32)
    refusal(NonFinite, lambda: pack.tuned("w", base), "'w'", "'math'")
