"""Packs of whole numbers on live weights: the same bits from either layout, in one pass, and the base back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from cl_graft.skillpack import codecs, rounding
from cl_graft.skillpack.codecs import CodeLayout, Encoded
from cl_graft.skillpack.format.file import NonFinite, SkillPack, fingerprint
from cl_graft.skillpack.live import attach, grafted
from cl_graft.skillpack.live.attach import Attached
from cl_graft.skillpack.live.decode import entries, factors
from cl_graft.skillpack.live.grafted import Grafted

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROWS, COLS, RANK = 48, 68, 12
SPREADS = torch.tensor([300.0, 40, 3, 1, 0.4, 0])  # codes of 16, 8, 8 or 4, 4, 2 and 0 bits


class Tied(nn.Module):
    """A table that is read twice, as an embedding and as the last layer, and a layer between."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(ROWS, COLS, dtype=dtype)
        self.layer = nn.Linear(COLS, COLS, bias=False, dtype=dtype)
        self.last = nn.Linear(COLS, ROWS, bias=False, dtype=dtype)
        self.last.weight = self.table.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.last(self.layer(self.table(input_ids)))


def numbers(rows: int, cols: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    spreads = SPREADS.repeat(rows // len(SPREADS) + 1)[:rows, None]
    return (torch.randn(rows, cols, generator=generator) * spreads).round().to(torch.int16)


def low_rank(shape: tuple[int, int], seed: int, layout: CodeLayout = "small") -> Encoded:
    left, right = numbers(RANK, shape[0], seed), numbers(RANK, shape[1], seed + 1)
    sizes = 1e-3 / SPREADS.clamp(min=1).square().repeat(2)
    return codecs.coded_low_rank(left, right, sizes, shape, layout)


def table(shape: tuple[int, int], seed: int, layout: CodeLayout = "small") -> Encoded:
    steps = torch.full((shape[0],), 1e-3)
    return codecs.coded(numbers(shape[0], shape[1], seed), steps, shape, layout)


def summed(shape: tuple[int, int], seed: int, layout: CodeLayout = "small") -> Encoded:
    """Factors, and every fifth row on its own, in codes of every width."""
    left, right = numbers(RANK, shape[0], seed), numbers(RANK, shape[1], seed + 1)
    sizes = torch.cat([1e-3 / SPREADS.clamp(min=1).square().repeat(2), torch.tensor([1e-3])])
    shifts = torch.arange(shape[0]).short() % 3, torch.arange(shape[1]).short() % 5 - 2
    own = torch.arange(2, shape[0], 5)
    codes = numbers(len(own), shape[1], seed + 2)
    return codecs.coded_table(left, right, sizes, shifts, (own, codes), layout)


def pack_of(model: nn.Module, task: str, tensors: dict[str, Encoded]) -> SkillPack:
    return SkillPack(tensors, task, "test", {}, fingerprint(model.named_parameters()))


def packs_of(model: nn.Module, layout: CodeLayout = "small") -> list[SkillPack]:
    """The table by rows and the layer by factors; the layer alone; both by factors; the table by both, alone."""
    large, square = (ROWS, COLS), (COLS, COLS)
    return [
        pack_of(
            model,
            "a",
            {"table.weight": table(large, 1, layout), "layer.weight": low_rank(square, 2, layout)},
        ),
        pack_of(model, "b", {"layer.weight": low_rank(square, 4, layout)}),
        pack_of(
            model,
            "c",
            {
                "table.weight": low_rank(large, 6, layout),
                "layer.weight": low_rank(square, 8, layout),
            },
        ),
        pack_of(model, "d", {"table.weight": summed(large, 10, layout)}),
    ]


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(model: nn.Module, wanted: dict[str, Tensor]) -> bool:
    return all(torch.equal(p, wanted[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(30, 64), (64, 30), (33, 35), (1, 9)])
def test_factors_of_either_layout_are_the_codes_with_the_scale_in_the_smaller(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    rank = min(RANK, *shape)
    left, right = numbers(rank, shape[0], 0), numbers(rank, shape[1], 1)
    scales = torch.rand(rank).bfloat16().float()
    shifts = torch.arange(shape[0]).short() % 3, torch.arange(shape[1]).short() % 5 - 2
    for layout in ("small", "fast"):
        encoded = codecs.coded_low_rank(left, right, scales, shape, layout, shifts)
        found = factors([encoded], dtype)
        if shape[0] <= shape[1]:
            wanted = (left.T * scales).to(dtype), right.to(dtype)
        else:
            wanted = left.T.to(dtype), (right * scales[:, None]).to(dtype)
        assert torch.equal(found.left, wanted[0] * torch.exp2(-shifts[0].float())[:, None])
        assert torch.equal(found.right, wanted[1] * torch.exp2(-shifts[1].float()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_switch_gives_the_bits_of_a_merge_and_the_base_comes_back(dtype: torch.dtype) -> None:
    model = Tied(dtype)
    before, outside = snapshot(model), model.table.weight.view(-1)
    packs, live = packs_of(model), Grafted(model)
    alone = []
    for pack in packs:
        live.activate([pack])
        alone.append(snapshot(model))
        assert not same(model, before) and model.last.weight is model.table.weight
        live.unload()
        assert same(model, before)
    for number in (0, 1, 2, 3, 0, 2, 3, 1):
        live.activate([packs[number]])
        assert same(model, alone[number])
        assert torch.equal(outside, model.table.weight.view(-1)), "an alias sees what is merged"
    for two in ([packs[0], packs[2]], packs[2:], [packs[0], packs[3]], [packs[3], packs[0]]):
        live.activate(two)
        both = snapshot(model)
        live.activate([packs[1]])
        live.activate(two)
        assert same(model, both)
    live.unload()
    assert same(model, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chosen", [(0, 1, 2, 3), (3,), (0, 3), (2, 3)], ids=str)
def test_weights_are_base_plus_deltas_whatever_the_codecs(
    dtype: torch.dtype, chosen: tuple[int, ...]
) -> None:
    """To one spacing of the dtype, and what bfloat16 factors lose: 2**-7 of the sum of magnitudes, entries too."""
    model = Tied(dtype)
    before, packs = snapshot(model), packs_of(model)
    packs = [packs[k] for k in chosen]
    Grafted(model).activate(packs)
    for name, parameter in model.named_parameters():
        mine = [pack.tensors[name] for pack in packs if name in pack.tensors]
        wanted = before[name].double() + sum(codecs.decode(e).double() for e in mine)
        pairs = [factors([e]) for e in mine if codecs.is_factored(e)]
        lost = 2.0**-7 * sum(p.left.abs() @ p.right.abs() for p in pairs)
        for each in (entries(e) for e in mine if pairs and codecs.is_scattered(e)):
            lost.view(-1)[each.positions] += 2.0**-7 * each.values.abs()
        spacing = torch.finfo(dtype).eps * wanted.abs() + torch.finfo(dtype).smallest_normal
        missed = (parameter.double() - wanted).abs()
        assert (missed <= 2 * spacing + (lost if dtype == torch.bfloat16 else 1e-6)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile", [8 * COLS, 1 << 22])
def test_low_rank_sums_are_rounded_by_chance_and_position(
    dtype: torch.dtype, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A product of ones, which every dtype holds, far below the spacing of a base of ones: what is kept is by chance."""
    monkeypatch.setattr(grafted, "TILE", tile)
    ones, weight = torch.ones(1, COLS).short(), torch.empty(COLS, COLS, dtype=dtype)
    size = torch.finfo(dtype).eps / 8
    encoded = codecs.coded_low_rank(ones, ones, torch.tensor([size]), (COLS, COLS))
    pair = factors([encoded], torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
    assert grafted.put(weight, torch.ones_like(weight), [pair], seed=3)
    wanted = rounding.summed(torch.full((COLS, COLS), 1 + size), dtype, 3)
    assert torch.equal(weight, wanted)
    risen = float((weight > 1).float().mean())
    assert risen == pytest.approx(0.125, abs=0.025) if dtype != torch.float32 else risen == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts_give_the_same_weights(dtype: torch.dtype) -> None:
    weights = []
    for layout in ("small", "fast"):
        model = Tied(dtype)
        before = snapshot(model)
        Grafted(model).activate(packs_of(model, layout))  # type: ignore[arg-type]
        assert not same(model, before)
        weights.append(snapshot(model))
    assert same(model, weights[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_attached_packs_are_decoded_once(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Tied(dtype)
    packs, ids = packs_of(model), torch.arange(6).reshape(3, 2)
    live, wanted = Grafted(model), []
    choices: list[attach.Choice] = [(0,), (0, 2), (1, 2), (3,), (0, 3), (2, 3)]
    with torch.no_grad():
        for choice in choices:
            live.activate([packs[k] for k in choice])
            wanted.append(model(ids).float())
        live.unload()
        with Attached(model, packs) as attached:
            for module in (codecs, grafted):
                for name in ("decode", "rows", "factors", "entries"):
                    monkeypatch.setattr(module, name, None, raising=False)
            monkeypatch.setattr(SkillPack, "delta", None)
            for choice, expected in zip(choices, wanted, strict=True):
                attached.choose(choice)
                found = model(ids).float()
                assert (found - expected).abs().max() <= 0.05 * expected.abs().max()


def test_what_overflows_is_told_and_the_base_is_back() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        model = Tied(dtype)
        before = snapshot(model)
        left, right = torch.full((1, COLS), 8191).short(), torch.full((1, COLS), 8191).short()
        huge = codecs.coded_low_rank(left, right, torch.tensor([3e38]), (COLS, COLS))
        live = Grafted(model)
        with pytest.raises(NonFinite, match=r"'layer.weight' overflows"):
            live.activate([pack_of(model, "a", {"layer.weight": huge})])
        assert same(model, before) and live.active == ()


@pytest.mark.parametrize("count", [1, 7, (1 << 15) + 3, 150_001])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_total_is_the_sum_rounded_by_position_on_any_threads(
    dtype: torch.dtype, count: int
) -> None:
    generator = torch.Generator().manual_seed(count)
    base = torch.randn(count, generator=generator).to(dtype)
    delta = torch.randn(count, generator=generator) * 0.01
    wanted = rounding.summed(base.float() + delta, dtype, 5, 8)
    before = torch.get_num_threads()
    try:
        for threads in (1, 4, 6):
            torch.set_num_threads(threads)
            out = torch.empty_like(base)
            assert rounding.total(base, delta, out, 5, 8) and torch.equal(out, wanted)
    finally:
        torch.set_num_threads(before)
    delta[-1] = float("inf")
    assert not rounding.total(base, delta, out, 5, 8)


@pytest.mark.parametrize("first", [0, 4, 2**33])
@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 1001, 150_001])
def test_the_compiled_loop_gives_the_same_bits(
    count: int, first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounding, "WORTH_COMPILING", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    generator = torch.Generator().manual_seed(count)
    bits = torch.randint(-(2**15), 2**15, (2, count), generator=generator).to(torch.int16)
    base, delta = bits.view(torch.bfloat16)  # every exponent, infinities and NaN
    for mine in (base, torch.where(base.abs() < 1e30, base, 1.0), torch.zeros_like(base)):
        other = delta if mine is base else torch.where(delta.abs() < 1e30, delta, -0.0)
        found, wanted = torch.empty_like(base), torch.empty_like(base)
        finite = rounding.total(mine, other, found, 11, first)
        assert finite == rounding._add_chunks([mine, other, wanted], 11, first)
        assert torch.equal(found.view(torch.int16), wanted.view(torch.int16))
        assert finite == bool(wanted.isfinite().all())
