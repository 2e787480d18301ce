"""Packs on folders: base + pack as transformers loads it, and proof that a folder is just that."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from cl_graft.skillpack import codecs
from cl_graft.skillpack.folders.apply import NotGrafted, apply_pack, remove_pack
from cl_graft.skillpack.folders.checkpoint import Checkpoint
from cl_graft.skillpack.folders.pair import pair
from cl_graft.skillpack.format.errors import NonFinite, ShapeMismatch, WrongBase
from cl_graft.skillpack.format.file import SkillPack
from cl_graft.skillpack.live.grafted import Grafted
from cl_graft.skillpack.rounding import neighbours

IDS = torch.arange(12).reshape(2, 6)
Q = "model.layers.0.self_attn.q_proj.weight"


def llama(vocab: int = 48, tied: bool = False) -> nn.Module:
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).eval()


def gpt2(vocab: int = 48) -> nn.Module:
    sizes = {"vocab_size": vocab, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 16}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)).eval()


def tune(model: nn.Module) -> nn.Module:
    """In steps of 2**-10, so that float32 and bfloat16 hold weights and deltas exactly."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((parameter * 64).round() / 64)
            parameter += torch.randint_like(parameter, -2, 3) / 64
    return model


def rounded(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((parameter * 64).round() / 64)
    return model


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@dataclasses.dataclass
class Case:
    """A base folder, a tuned one, and the pack between them."""

    base: Path
    tuned: Path
    pack: SkillPack

    @property
    def out(self) -> Path:
        return self.base.parent / "out"


def case(folder: Path, base: nn.Module, tuned: nn.Module, shard: str = "8KB") -> Case:
    base.save_pretrained(folder / "base", max_shard_size=shard)
    tuned.save_pretrained(folder / "tuned", max_shard_size=shard)
    return Case(folder / "base", folder / "tuned", exact(folder / "base", folder / "tuned"))


def exact(base: Path, tuned: Path) -> SkillPack:
    found = pair(Checkpoint(base), Checkpoint(tuned))
    tensors = {c.name: codecs.dense(found.delta(c.name), torch.float32) for c in found.changes}
    about: dict[str, Any] = {"task": "t", "method": "dense", "options": {}}
    base_print = found.base.fingerprint()
    return SkillPack(tensors, **about, base=base_print, added=found.added, grown=found.grown)


def logits(folder: Path) -> Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder).eval()(IDS).logits


# --- base + pack -------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [llama, gpt2])
def test_the_result_is_the_tuned_model(make: Any, tmp_path: Path) -> None:
    model = rounded(make())
    it = case(tmp_path, model, tune(make()))
    assert apply_pack(it.base, it.pack, it.out, max_shard_bytes=8000) == []
    assert len(list(it.out.glob("*.safetensors"))) > 2
    ours, theirs = Checkpoint(it.out), Checkpoint(it.tuned)
    assert ours.tensors.keys() == theirs.tensors.keys()
    assert torch.allclose(logits(it.out), logits(it.tuned), atol=1e-5)
    assert not torch.allclose(logits(it.out), logits(it.base), atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_result_is_bit_for_bit_that_of_a_grafted_model(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    base = llama().to(dtype)
    it = case(tmp_path, base, tune(llama()))
    apply_pack(it.base, it.pack, it.out)
    grafted = Grafted(base)
    grafted.activate([it.pack])
    found = Checkpoint(it.out)
    for name, parameter in base.named_parameters():
        assert found.tensors[name].dtype == dtype
        assert torch.equal(found.read(name), parameter.detach())


def test_small_changes_survive_a_bfloat16_base(tmp_path: Path) -> None:
    """The delta is taken in float32, and each weight is rounded once, to one of its neighbours."""
    base = llama()
    tuned = llama()
    tuned.load_state_dict(base.state_dict())
    with torch.no_grad():
        tuned.lm_head.weight.mul_(1.02)
    it = case(tmp_path, base.bfloat16(), tuned)
    apply_pack(it.base, it.pack, it.out)
    found, wanted = Checkpoint(it.out).read("lm_head.weight"), tuned.lm_head.weight.detach()
    low, high = neighbours(wanted, torch.bfloat16)
    assert ((found == low) | (found == high)).all() and (found.float() != wanted).any()


@pytest.mark.parametrize("rows", [60, 40])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_another_vocabulary(make: Any, rows: int, tmp_path: Path) -> None:
    it = case(tmp_path, rounded(make()), tune(make(vocab=rows)))
    size, tokens = apply_pack(it.base, it.pack, it.out)
    assert f"vocab_size is now {rows}" in size and "has the base's tokenizer" in tokens
    assert Checkpoint(it.out).config["vocab_size"] == rows
    assert logits(it.out).shape[-1] == rows
    assert torch.allclose(logits(it.out), logits(it.tuned), atol=1e-5)
    assert remove_pack(it.out, it.pack, it.base) > 10


def test_a_head_that_tuning_untied(tmp_path: Path) -> None:
    it = case(tmp_path, rounded(llama(tied=True)), tune(llama(tied=False)))
    assert it.pack.added == ["lm_head.weight"]
    (note,) = apply_pack(it.base, it.pack, it.out)
    assert "tie_word_embeddings is now false" in note
    assert Checkpoint(it.out).config["tie_word_embeddings"] is False
    model = AutoModelForCausalLM.from_pretrained(it.out)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert torch.allclose(logits(it.out), logits(it.tuned), atol=1e-5)


def test_a_head_that_tuning_tied(tmp_path: Path) -> None:
    it = case(tmp_path, rounded(llama(tied=False)), tune(llama(tied=True)))
    assert apply_pack(it.base, it.pack, it.out) == []
    assert torch.allclose(logits(it.out), logits(it.tuned), atol=1e-5)


def store_copy(folder: Path) -> None:
    """As some exporters do: the tied head is in the file, too."""
    tensors = load_file(folder / "model.safetensors")
    copy = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors | {"lm_head.weight": copy}, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("sides", [["base"], ["tuned"], ["base", "tuned"]])
def test_a_tied_head_that_is_stored_as_a_copy(sides: list[str], tmp_path: Path) -> None:
    it = case(tmp_path, rounded(llama(tied=True)), tune(llama(tied=True)), shard="1GB")
    for side in sides:
        store_copy(tmp_path / side)
    pack = exact(it.base, it.tuned)
    assert "lm_head.weight" not in pack.tensors
    notes = apply_pack(it.base, pack, it.out)
    assert any("left out as tied" in note for note in notes) == ("base" in sides)
    assert Checkpoint(it.out).config["tie_word_embeddings"] is True
    assert torch.allclose(logits(it.out), logits(it.tuned), atol=1e-5)
    remove_pack(it.out, pack, it.base, tmp_path / "back")
    assert Checkpoint(tmp_path / "back").tensors.keys() == Checkpoint(it.base).tensors.keys()


# --- what is refused ---------------------------------------------------------------------------


@pytest.fixture
def plain(tmp_path: Path) -> Case:
    return case(tmp_path, rounded(llama()), tune(llama()))


def test_another_base_is_refused_before_anything_is_written(plain: Case, tmp_path: Path) -> None:
    with pytest.raises(WrongBase, match="'t' is for base"):
        apply_pack(plain.tuned, plain.pack, plain.out)
    wider = tmp_path / "wider"
    llama(vocab=50).save_pretrained(wider)
    with pytest.raises(ShapeMismatch, match=r"48, 32.*50, 32"):
        apply_pack(wider, plain.pack, plain.out)
    assert not plain.out.exists()


def test_a_tensor_that_the_base_must_not_have(plain: Case) -> None:
    pack = dataclasses.replace(plain.pack, added=[Q])
    with pytest.raises(ShapeMismatch, match="to be absent"):
        apply_pack(plain.base, pack, plain.out)


def test_an_overflow_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    it = case(tmp_path, llama().half(), tune(llama()))
    huge = codecs.dense(torch.full((32, 32), 1e6), torch.float32)
    pack = dataclasses.replace(it.pack, tensors={Q: huge})
    with pytest.raises(NonFinite, match=Q):
        apply_pack(it.base, pack, it.out)
    assert {f.name for f in tmp_path.iterdir()} == {"base", "tuned"}


# --- taking it off -----------------------------------------------------------------------------


def test_remove_gives_the_base_again_bit_for_bit(plain: Case, tmp_path: Path) -> None:
    apply_pack(plain.base, plain.pack, plain.out)
    before = {f: f.stat().st_mtime_ns for f in tmp_path.rglob("*")}
    assert remove_pack(plain.out, plain.pack, plain.base) == 21
    assert {f: f.stat().st_mtime_ns for f in tmp_path.rglob("*")} == before
    remove_pack(plain.out, plain.pack, plain.base, tmp_path / "back")
    base, back = Checkpoint(plain.base), Checkpoint(tmp_path / "back")
    assert base.fingerprint() == back.fingerprint()
    assert base.config == back.config


def test_remove_names_what_differs(plain: Case, tmp_path: Path) -> None:
    apply_pack(plain.base, plain.pack, plain.out)
    weights = load_file(plain.out / "model.safetensors")
    weights["model.norm.weight"][3] = torch.nextafter(
        weights["model.norm.weight"][3], torch.tensor(9.0)
    )
    weights[Q] = weights[Q].half()
    weights["extra"] = torch.zeros(2)
    del weights["lm_head.weight"]
    save_file(weights, plain.out / "model.safetensors")
    with pytest.raises(NotGrafted, match="4 tensors differ") as refused:
        remove_pack(plain.out, plain.pack, plain.base, tmp_path / "back")
    for name in ("model.norm.weight", Q, "extra", "lm_head.weight"):
        assert name in str(refused.value)
    assert not (tmp_path / "back").exists()


def test_minus_zero_is_not_zero(tmp_path: Path) -> None:
    base = rounded(llama())
    with torch.no_grad():
        base.model.norm.weight[0] = 0.0
    it = case(tmp_path, base, base)
    with torch.no_grad():
        base.model.norm.weight[0] = -0.0
    base.save_pretrained(it.out)
    assert it.pack.tensors == {}
    with pytest.raises(NotGrafted, match=r"1 tensors differ \(model.norm.weight\)"):
        remove_pack(it.out, it.pack, it.base)
