"""Packs on a model: base plus exactly the deltas named, and the base again bit for bit."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from cl_graft.skillpack import codecs
from cl_graft.skillpack.apply import Grafted
from cl_graft.skillpack.codecs import Encoded
from cl_graft.skillpack.file import (
    NonFinite,
    ShapeMismatch,
    SkillPack,
    SkillPackError,
    WrongBase,
    fingerprint,
)

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


def pack_for(model: nn.Module, task: str, *names: str, seed: int = 0) -> SkillPack:
    """Random deltas, large enough to change a bfloat16 weight."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    tensors: dict[str, Encoded] = {}
    for name in names:
        x = torch.randn(shapes[name], generator=generator) * 0.1
        tensors[name] = codecs.sign_scale(x) if x.ndim == 2 else codecs.dense(x)
    return SkillPack(tensors, task, "test", {}, fingerprint(model.named_parameters()))


def refusal(kind: type[SkillPackError], action: Callable[[], object], *words: str) -> None:
    with pytest.raises(SkillPackError) as caught:
        action()
    assert type(caught.value) is kind
    message = str(caught.value)
    assert message.endswith(".") and "\n" not in message
    assert all(word in message for word in words), message


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
        expected[name] = (before[name].float() + total).to(dtype)
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
    assert set(grafted._pristine) == {Q, NORM}
    grafted.unload()
    assert not grafted._pristine


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


def test_deltas_that_round_away_one_by_one_count_together() -> None:
    """Summed in float32 before the cast: two halves of a bfloat16 step make a whole one."""
    model = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    nn.init.ones_(model.weight)
    half = codecs.dense(torch.tensor([[math.ldexp(1.0, -8)]]), torch.float32)
    pack = SkillPack({"weight": half}, "a", "test", {}, fingerprint(model.named_parameters()))
    grafted = Grafted(model)
    grafted.activate([pack])
    assert model.weight.item() == 1  # the nearest even
    grafted.activate([pack, pack])
    assert model.weight.item() == 1 + math.ldexp(1.0, -7)
