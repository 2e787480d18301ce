"""Packs on a model: base plus exactly the deltas named, and the base again bit for bit."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from cl_graft.bench.merge import bench_merge
from cl_graft.skillpack import codecs
from cl_graft.skillpack.codecs import CodeLayout, Encoded
from cl_graft.skillpack.codecs.quant import round_to_nearest
from cl_graft.skillpack.format.file import (
    CorruptPack,
    NonFinite,
    ShapeMismatch,
    SkillPack,
    WrongBase,
    fingerprint,
)
from cl_graft.skillpack.live.decode import entries, factors
from cl_graft.skillpack.live.grafted import Grafted
from cl_graft.skillpack.rounding import seed_of, stochastic
from tests.refusals import refusal

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
Q = "model.layers.0.self_attn.q_proj.weight"
UP = "model.layers.1.mlp.up_proj.weight"
NORM = "model.norm.weight"


def tiny(dtype: torch.dtype = torch.float32, tied: bool = True) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).to(dtype)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def identical(model: nn.Module, weights: dict[str, Tensor]) -> bool:
    """Bit for bit, so that -0 is not 0."""
    now = dict(model.named_parameters())
    return now.keys() == weights.keys() and all(
        torch.equal(now[n].detach().view(torch.uint8), weights[n].view(torch.uint8)) for n in now
    )


def rounded(x: Tensor, dtype: torch.dtype, packs: list[SkillPack], name: str) -> Tensor:
    """The sum of a base and its deltas as a model of that dtype holds it."""
    return (
        x
        if dtype == torch.float32
        else stochastic(x, dtype, seed_of([packs[0].base, *(p.task for p in packs)], name))
    )


def pack_for(model: nn.Module, task: str, *names: str, seed: int = 0) -> SkillPack:
    """Random deltas, large enough to change a bfloat16 weight."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    tensors: dict[str, Encoded] = {}
    for name in names:
        x = torch.randn(shapes[name], generator=generator) * 0.1
        tensors[name] = codecs.sign_scale(x) if x.ndim == 2 else codecs.dense(x)
    return SkillPack(tensors, task, "test", {}, fingerprint(model.named_parameters()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_activate_adds_the_deltas_in_float32_and_unload_brings_the_base_back(
    dtype: torch.dtype,
) -> None:
    model = tiny(dtype)
    before = snapshot(model)
    a, b = pack_for(model, "a", Q, NORM, seed=1), pack_for(model, "b", Q, UP, seed=2)
    grafted = Grafted(model)
    grafted.activate([a, b])
    expected = dict(before)
    for name, parts in {Q: [a, b], NORM: [a], UP: [b]}.items():
        deltas = [pack.decode()[name] for pack in parts]
        total = deltas[0] + deltas[1] if len(deltas) == 2 else deltas[0]
        expected[name] = rounded(before[name].float() + total, dtype, parts, name)
        assert not torch.equal(expected[name], before[name])
    assert identical(model, expected)
    assert grafted.active == (a, b)
    grafted.unload()
    assert identical(model, before)
    assert grafted.active == ()


def test_exactly_the_packs_named_are_active_whatever_was_before() -> None:
    model = tiny()
    packs = [pack_for(model, "a", Q, NORM, seed=1), pack_for(model, "b", Q, UP, seed=2)]
    fresh = []
    for pack in packs:
        grafted = Grafted(tiny())
        grafted.activate([pack])
        fresh.append(snapshot(grafted.model))
    grafted, before = Grafted(model), snapshot(model)
    for _ in range(3):  # on and off again, without drift
        for pack, weights in zip(packs, fresh, strict=True):
            grafted.activate([pack])
            assert identical(model, weights)
    grafted.activate([])
    assert identical(model, before)


def test_only_touched_parameters_are_copied_and_only_while_they_are() -> None:
    grafted = Grafted(tiny())
    model = grafted.model
    grafted.activate([pack_for(model, "a", Q, NORM)])
    assert grafted._copies.keys() == {Q, NORM}
    grafted.unload()
    assert not grafted._copies


def test_outputs_change_and_come_back() -> None:
    model = tiny().eval()
    tokens = torch.arange(12)[None]
    pack = pack_for(model, "a", Q, UP)
    grafted = Grafted(model)
    with torch.no_grad():
        base = model(tokens).logits
        grafted.activate([pack])
        tuned = model(tokens).logits
        grafted.unload()
        assert not torch.allclose(base, tuned)
        assert torch.equal(base, model(tokens).logits)


def test_tied_weights_are_one_parameter() -> None:
    model = tiny(tied=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    before = snapshot(model)
    grafted = Grafted(model)
    grafted.activate([pack_for(model, "a", "model.embed_tokens.weight")])
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not torch.equal(model.lm_head.weight, before["model.embed_tokens.weight"])
    grafted.unload()
    assert identical(model, before)


def test_the_base_is_fingerprinted_once_and_without_its_packs() -> None:
    model = tiny()
    plain = fingerprint(model.named_parameters())
    grafted = Grafted(model)
    pack = pack_for(model, "a", Q)
    grafted.activate([pack])
    assert grafted.base == plain != fingerprint(model.named_parameters())
    grafted.activate([pack, pack])  # checked against the base, not against what is active
    assert grafted.base == plain


def test_a_pack_through_a_file_gives_the_same_weights(tmp_path: Path) -> None:
    model, path = tiny(), tmp_path / "a.skillpack"
    pack = pack_for(model, "a", Q, UP, NORM)
    pack.save(path)
    grafted = Grafted(model)
    grafted.activate([pack])
    direct = snapshot(model)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    grafted.activate([SkillPack.load(path, base=grafted.base, shapes=shapes)])
    assert identical(model, direct)


def test_refusals_leave_model_and_packs_as_they_were() -> None:
    model = tiny()
    good = pack_for(model, "good", Q)
    grafted = Grafted(model)
    grafted.activate([good])
    before = snapshot(model)
    other = SkillPack(good.tensors, "other", "test", {}, "f" * 32)
    unknown = SkillPack({"nobody.weight": good.tensors[Q]}, "x", "test", {}, good.base)
    wrong = SkillPack({UP: good.tensors[Q]}, "x", "test", {}, good.base)
    for kind, bad, words in (
        (WrongBase, other, ("'other'", grafted.base)),
        (ShapeMismatch, unknown, ("'nobody.weight'", "no such parameter")),
        (ShapeMismatch, wrong, (UP, "(32, 32)", "(48, 32)")),
    ):
        refusal(kind, lambda bad=bad: grafted.activate([good, bad]), *words)
        assert identical(model, before)
        assert grafted.active == (good,)


def test_a_sum_that_overflows_leaves_the_base() -> None:
    model = tiny(torch.float16)
    before = snapshot(model)
    good = pack_for(model, "good", "model.embed_tokens.weight")
    huge = codecs.sign_scale(torch.ones(32, 32), 1e5)
    grafted = Grafted(model)
    grafted.activate([good])
    bad = SkillPack({Q: huge}, "huge", "test", {}, good.base)
    refusal(NonFinite, lambda: grafted.activate([good, bad]), Q, "float16", "'huge'")
    assert identical(model, before)
    assert grafted.active == ()


def test_deltas_that_nearest_rounds_away_are_kept_on_the_mean_and_together() -> None:
    """A quarter of a bfloat16 step makes a whole one in a quarter of the entries; four quarters do in each."""
    model = nn.Linear(100, 100, bias=False, dtype=torch.bfloat16)
    nn.init.ones_(model.weight)
    step = math.ldexp(1.0, -7)
    quarter = codecs.dense(torch.full((100, 100), step / 4), torch.float32)
    pack = SkillPack({"weight": quarter}, "a", "test", {}, fingerprint(model.named_parameters()))
    grafted = Grafted(model)
    grafted.activate([pack])
    assert set(model.weight.flatten().tolist()) == {1.0, 1 + step}
    assert float((model.weight != 1).float().mean()) == pytest.approx(0.25, abs=0.02)  # 4.6 sigma
    grafted.activate([pack] * 4)
    assert (model.weight == 1 + step).all()
    grafted.unload()
    assert (model.weight == 1).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_seed_is_that_of_the_packs_and_the_parameter(dtype: torch.dtype) -> None:
    model = tiny(dtype)
    a, b = pack_for(model, "a", Q, NORM, seed=1), pack_for(model, "b", Q, seed=1)
    q = dict(model.named_parameters())[Q]
    grafted = Grafted(model)
    grafted.activate([a])
    first = q.detach().clone()
    grafted.activate([b])  # the same deltas, and other random numbers
    assert not torch.equal(q, first)
    grafted.activate([a, b])
    both = q.detach().clone()
    grafted.activate([b, a])
    assert not torch.equal(q, both)
    grafted.activate([a])
    assert torch.equal(q, first)


def test_scalars_are_parameters_too() -> None:
    model = nn.Module()
    model.scale = nn.Parameter(torch.tensor(2.0, dtype=torch.bfloat16))
    delta = codecs.dense(torch.tensor(0.5), torch.float32)
    pack = SkillPack({"scale": delta}, "a", "test", {}, fingerprint(model.named_parameters()))
    Grafted(model).activate([pack])
    assert model.scale.item() == 2.5


def low_rank_pack(model: nn.Module, task: str, *names: str, seed: int = 0) -> SkillPack:
    """Quantised factors in groups of 8, 4, 3 and 2 bits; each delta is a tenth of its weight's size."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name in names:
        weight = dict(model.named_parameters())[name]
        size = (0.1 * weight.float().std().item() / math.sqrt(22)) ** 0.5
        pairs = []
        for bits, rank in ((8, 2), (4, 4), (3, 6), (2, 10)):
            sides = [torch.randn(rank, n, generator=generator) * size for n in weight.shape]
            pairs.append(tuple(round_to_nearest(side, bits, 20, search=False) for side in sides))
        tensors[name] = codecs.quantized_low_rank(pairs, tuple(weight.shape))
    return SkillPack(tensors, task, "test", {}, fingerprint(model.named_parameters()))


def large(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(200, 2100, bias=False).to(dtype)  # more rows than one tile of a product


@pytest.mark.parametrize("dtype", DTYPES)
def test_factors_are_those_that_the_codec_decodes(dtype: torch.dtype) -> None:
    pack = low_rank_pack(large(torch.float32), "a", "weight")
    encoded = pack.tensors["weight"]
    left, right = factors([encoded])
    assert left.shape == (2100, 22) and right.shape == (22, 200)
    exact = left.double() @ right.double()
    assert torch.allclose(
        exact, pack.delta("weight").double(), rtol=0, atol=1e-6 * exact.abs().max()
    )
    rounded = factors([encoded, encoded], dtype)
    assert torch.equal(rounded[0], torch.cat([left, left], 1).to(dtype))
    assert torch.equal(rounded[1], torch.cat([right, right]).to(dtype))
    plain = codecs.low_rank(torch.randn(3, 2), torch.randn(2, 5))
    assert torch.equal(torch.mm(*factors([plain])), codecs.decode(plain))


@pytest.mark.parametrize("dtype", DTYPES)
def test_low_rank_deltas_are_added_to_within_the_stated_tolerance(dtype: torch.dtype) -> None:
    model = large(dtype)
    packs = [low_rank_pack(model, task, "weight", seed=n) for n, task in enumerate("ab")]
    base = model.weight.detach().double()
    left, right = factors([pack.tensors["weight"] for pack in packs])
    exact = base + left.double() @ right.double()
    sum32 = base.float() + packs[0].delta("weight") + packs[1].delta("weight")
    reference = rounded(sum32, dtype, list(packs), "weight")
    Grafted(model).activate(packs)
    missed, allowed = (model.weight - exact).abs(), (reference - exact).abs()
    sizes = left.abs().double() @ right.abs().double()
    of_factors = 2.0**-7 if dtype == torch.bfloat16 else 2.0**-20
    about = torch.finfo(dtype)
    own = about.eps * exact.abs().clamp(min=about.smallest_normal)
    assert (missed <= own + of_factors * sizes).all()
    # the weights' own rounding is what matters: what the factors' adds to it is below a twentieth
    assert missed.square().mean().sqrt() < 1.05 * allowed.square().mean().sqrt()


@pytest.mark.parametrize("dtype", DTYPES)
def test_merging_anew_gives_the_same_bits(dtype: torch.dtype) -> None:
    model = large(dtype)
    before, grafted = snapshot(model), Grafted(model)
    a, b = (low_rank_pack(model, task, "weight", seed=n) for n, task in enumerate("ab"))
    grafted.activate([a])
    merged = snapshot(model)
    assert not identical(model, before)
    for packs in ([a], [b], [a, b], []):  # in place of, after and beside others
        grafted.activate(packs)
        grafted.activate([a])
        assert identical(model, merged)
    grafted.unload()
    assert identical(model, before)
    grafted.activate([a])
    assert identical(model, merged)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sparse_delta_changes_only_what_it_names(dtype: torch.dtype) -> None:
    model = large(dtype)
    before = model.weight.detach().clone()
    encoded = codecs.sparse_top(torch.randn(2100, 200), 3000)
    pack = SkillPack({"weight": encoded}, "a", "test", {}, fingerprint(model.named_parameters()))
    Grafted(model).activate([pack])
    wanted = rounded(before.float() + pack.delta("weight"), dtype, [pack], "weight")
    assert torch.equal(model.weight, wanted)
    assert int((model.weight != before).sum()) <= 3000
    ids = torch.tensor([2099, 0, 7, 7])
    assert torch.equal(entries(encoded).rows(ids, 200), pack.delta("weight")[ids])


@pytest.mark.parametrize("fields", [{"added": [Q]}, {"grown": {Q: [8, 32]}}])
def test_packs_with_tensors_or_rows_that_the_base_lacks_are_for_folders(fields: dict) -> None:
    model = tiny()
    pack = replace(pack_for(model, "vision", Q), **fields)
    refusal(
        ShapeMismatch, lambda: Grafted(model).activate([pack]), "'vision'", "cl-graft pack apply"
    )


def test_parts_that_fit_no_codec_are_refused_and_the_base_is_back() -> None:
    model = large(torch.bfloat16)
    before, good = snapshot(model), low_rank_pack(model, "a", "weight")
    encoded = good.tensors["weight"]
    for codes in (encoded.parts["codes"][:-1], encoded.parts["codes"] | 128):
        parts = {**encoded.parts, "codes": codes}
        bad = replace(good, tensors={"weight": replace(encoded, parts=parts)})
        refusal(CorruptPack, lambda bad=bad: Grafted(model).activate([bad]), "'weight'", "'a'")
        assert identical(model, before)


@pytest.mark.parametrize("layout", ["small", "fast"])
def test_the_benchmark_runs_and_counts_the_packs_bytes(layout: CodeLayout) -> None:
    for dtype in ("float32", "bfloat16"):
        shapes = ((256, 384), (384, 256))
        found = bench_merge(0.1, dtype, shapes, repeats=3, threads=1, layout=layout)
        assert found["share"] == pytest.approx(0.1, rel=0.1) and found["dtype"] == dtype
        ratio = found["merge_ms"] / found["product_ms"]
        assert found["merge_over_product"] == pytest.approx(ratio)
        assert found["switch_over_merge"] == pytest.approx(found["switch_ms"] / found["merge_ms"])
        assert len(found["ranks"]) == 2 and ("small_decode_s_per_100mb" in found) == (
            layout == "small"
        )
