"""Packs as LoRA adapters: peft loads them, what fits is exact, and the cost of the rest is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from cl_graft.errors import CLGraftError
from cl_graft.skillpack import codecs
from cl_graft.skillpack.codecs import Encoded
from cl_graft.skillpack.codecs.quant import round_to_nearest
from cl_graft.skillpack.folders.apply import apply_pack
from cl_graft.skillpack.folders.checkpoint import Checkpoint, CheckpointError
from cl_graft.skillpack.format.errors import WrongBase
from cl_graft.skillpack.format.file import SkillPack
from cl_graft.skillpack.tools.export import NothingToExport, best_factors, cut, export_peft

IDS = torch.arange(12).reshape(2, 6)
Q, K = (f"model.layers.0.self_attn.{n}_proj.weight" for n in "qk")
UP, DOWN = (f"model.layers.1.mlp.{n}_proj.weight" for n in ("up", "down"))
EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


def llama(tied: bool = False) -> nn.Module:
    config = LlamaConfig(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
        max_position_embeddings=32,
    )
    return LlamaForCausalLM(config)


def gpt2() -> nn.Module:
    sizes = {"vocab_size": 48, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 16}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2))


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def low(rows: int, cols: int, rank: int) -> Encoded:
    return codecs.low_rank(torch.randn(rows, rank) * 0.2, torch.randn(rank, cols) * 0.2)


def quantised(rows: int, cols: int, *ranks: int) -> Encoded:
    pairs = [[round_to_nearest(torch.randn(r, n) * 0.2, 4) for n in (rows, cols)] for r in ranks]
    return codecs.quantized_low_rank([(left, right) for left, right in pairs], (rows, cols))


def pack_for(folder: Path, tensors: dict[str, Encoded], **more: Any) -> SkillPack:
    about: dict[str, Any] = {"task": "t", "method": "m", "options": {}}
    return SkillPack(tensors, **about, base=Checkpoint(folder).fingerprint(), **more)


def mixed() -> dict[str, Encoded]:
    """Every kind of tensor; what fits an adapter is Q, K, UP, DOWN and the head."""
    return {
        Q: low(32, 32, 5),
        K: quantised(16, 32, 2, 3),
        UP: codecs.sparse_top(torch.randn(40, 32), 100),
        DOWN: codecs.dense(torch.randn(32, 40) * 0.1),
        HEAD: codecs.sign_scale(torch.randn(48, 32), 0.01),
        EMBEDDING: codecs.dense(torch.randn(48, 32) * 0.1),
        NORM: codecs.dense(torch.randn(32) * 0.1),
    }


def with_adapter(base: Path, adapter: Path) -> Tensor:
    """Logits of the base with the adapter, as peft computes them."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    with torch.no_grad():
        return model.eval()(IDS).logits


def with_pack(base: Path, pack: SkillPack, only: list[str], out: Path) -> Tensor:
    """Logits of the base with some tensors of a pack in its weights."""
    chosen = {name: pack.tensors[name] for name in only}
    apply_pack(base, pack_for(base, chosen), out)
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(out).eval()(IDS).logits


# --- what peft makes of it ---------------------------------------------------------------------


def test_peft_computes_what_the_exported_tensors_do(base: Path, tmp_path: Path) -> None:
    pack = pack_for(base, mixed())
    rows = export_peft(pack, base, tmp_path / "adapter")
    kept = [row.name for row in rows if row.rank is not None]
    assert kept == [Q, K, UP, DOWN, HEAD]
    ours = with_adapter(base, tmp_path / "adapter")
    theirs = with_pack(base, pack, kept, tmp_path / "merged")
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert not torch.allclose(ours, with_pack(base, pack, [], tmp_path / "alone"), atol=1e-2)


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_transposed_layers_of_gpt2(prefix: str, tmp_path: Path) -> None:
    """Also where the names of the file leave out the prefix, as those of the published model do."""
    base = tmp_path / "base"
    gpt2().save_pretrained(base)
    weights = load_file(base / "model.safetensors")
    weights = {prefix + name.removeprefix("transformer."): t for name, t in weights.items()}
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    names = [f"{prefix}h.{i}.{n}.weight" for i in (0, 1) for n in ("attn.c_attn", "mlp.c_proj")]
    shapes = [Checkpoint(base).tensors[name].shape for name in names]
    tensors = {n: low(*s, 3 + i) for i, (n, s) in enumerate(zip(names, shapes, strict=True))}
    pack = pack_for(base, tensors | {f"{prefix}wpe.weight": codecs.dense(torch.randn(16, 32))})
    rows = export_peft(pack, base, tmp_path / "adapter")
    assert [row.rank for row in rows] == [3, 4, 5, 6, None]
    ours = with_adapter(base, tmp_path / "adapter")
    assert torch.allclose(ours, with_pack(base, pack, names, tmp_path / "merged"), atol=1e-5)


def test_every_module_has_its_own_rank_at_scaling_one(base: Path, tmp_path: Path) -> None:
    export_peft(pack_for(base, mixed()), base, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (32, 32)
    ranks = {Q.removesuffix(".weight"): 5, K.removesuffix(".weight"): 5}
    assert config["rank_pattern"] == config["alpha_pattern"] == ranks
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    prefix = "base_model.model.model.layers.0.self_attn.k_proj"
    assert shapes[f"{prefix}.lora_A.weight"] == (5, 32)
    assert shapes[f"{prefix}.lora_B.weight"] == (16, 5)
    assert len(shapes) == 10


# --- what it costs -----------------------------------------------------------------------------


def test_low_rank_codecs_give_their_factors_and_lose_nothing(base: Path, tmp_path: Path) -> None:
    pack = pack_for(base, {Q: low(32, 32, 5), K: quantised(16, 32, 2, 3)})
    rows = export_peft(pack, base, tmp_path / "adapter")
    assert all(row.rank == 5 and row.error is not None and row.error < 1e-6 for row in rows)
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    left = weights[f"base_model.model.{Q.removesuffix('.weight')}.lora_B.weight"]
    assert torch.equal(left, pack.tensors[Q].parts["left"].float())


def test_the_error_of_a_cut_is_that_of_the_singular_values_left_out(
    base: Path, tmp_path: Path
) -> None:
    pack = pack_for(base, {Q: low(32, 32, 9), K: quantised(16, 32, 4, 4), DOWN: mixed()[DOWN]})
    rows = export_peft(pack, base, tmp_path / "adapter", rank=4)
    for row in rows:
        values = torch.linalg.svdvals(pack.delta(row.name).double()) ** 2
        assert row.rank == 4
        assert row.error == pytest.approx(float((values[4:].sum() / values.sum()) ** 0.5), rel=1e-4)


def test_what_does_not_fit_says_why(base: Path, tmp_path: Path) -> None:
    tensors = mixed() | {
        "model.layers.0.self_attn.q_proj.bias": codecs.dense(torch.ones(32)),
        EMBEDDING: codecs.dense(torch.ones(50, 32)),
    }
    more = {"added": ["model.layers.0.self_attn.q_proj.bias"], "grown": {EMBEDDING: [48, 32]}}
    rows = export_peft(pack_for(base, tensors, **more), base, tmp_path / "adapter")
    notes = {row.name: row.note for row in rows if row.rank is None}
    assert notes.keys() == {EMBEDDING, NORM, "model.layers.0.self_attn.q_proj.bias"}
    assert "number of rows" in notes[EMBEDDING]
    assert "norm" in notes[NORM]
    assert "no such tensor" in notes["model.layers.0.self_attn.q_proj.bias"]
    assert [row.name for row in rows] == list(tensors)


def test_a_head_is_told_or_left_out(base: Path, tmp_path: Path) -> None:
    """vLLM refuses `lm_head` in an adapter for many models (vllm-project/vllm#9280); PEFT takes it."""
    pack = pack_for(base, mixed())
    (row,) = (r for r in export_peft(pack, base, tmp_path / "peft") if r.name == HEAD)
    assert row.rank and "--to vllm leaves it out" in row.note
    (row,) = (r for r in export_peft(pack, base, tmp_path / "vllm", head=False) if r.name == HEAD)
    assert row.rank is None and row.note.startswith("left out: vLLM")
    for form in ("peft", "vllm"):
        config = json.loads((tmp_path / form / "adapter_config.json").read_text())
        assert ("lm_head" in config["target_modules"]) == (form == "peft")
        with_adapter(base, tmp_path / form)


def test_a_tied_head_stays_with_its_embedding(tmp_path: Path) -> None:
    base = tmp_path / "base"
    llama(tied=True).save_pretrained(base)
    tensors = {EMBEDDING: codecs.dense(torch.ones(48, 32)), Q: low(32, 32, 2)}
    rows = export_peft(pack_for(base, tensors), base, tmp_path / "adapter")
    assert [(row.rank, row.note) for row in rows] == [(None, "left out: an embedding"), (2, "")]


def test_ranks_that_engines_refuse_are_told(base: Path, tmp_path: Path) -> None:
    pack = pack_for(base, {Q: low(32, 32, 513), UP: codecs.dense(torch.randn(40, 32))})
    wide, other = export_peft(pack, base, tmp_path / "adapter")
    assert (wide.rank, "512" in wide.note, other.note) == (513, True, "")
    (wide, _) = export_peft(pack, base, tmp_path / "cut", rank=16)
    assert (wide.rank, wide.note) == (16, "")


def test_a_delta_of_zero(base: Path, tmp_path: Path) -> None:
    pack = pack_for(base, {Q: low(32, 32, 0), K: codecs.dense(torch.zeros(16, 32))})
    rows = export_peft(pack, base, tmp_path / "adapter")
    assert [(row.rank, row.error) for row in rows] == [(1, None), (16, None)]
    alone = with_pack(base, pack, [], tmp_path / "alone")
    assert torch.equal(with_adapter(base, tmp_path / "adapter"), alone)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 12), st.integers(1, 9))
def test_both_ways_to_cut_are_the_best_approximation(
    rows: int, cols: int, inner: int, rank: int
) -> None:
    left, right = torch.randn(rows, inner), torch.randn(inner, cols)
    delta = left @ right
    u, s, v = torch.linalg.svd(delta, full_matrices=False)
    best = float((delta - (u[:, :rank] * s[:rank]) @ v[:rank]).norm())
    for found in (best_factors(delta, rank), cut(left, right, rank)):
        assert found[0].shape[0] == rows and found[1].shape[1] == cols
        assert found[0].shape[1] == found[1].shape[0] <= rank
        assert float((delta - found[0] @ found[1]).norm()) <= best + 1e-4


# --- what is refused ---------------------------------------------------------------------------


def test_a_pack_without_linear_layers(base: Path, tmp_path: Path) -> None:
    pack = pack_for(base, {NORM: codecs.dense(torch.ones(32))})
    with pytest.raises(NothingToExport, match="--to hf"):
        export_peft(pack, base, tmp_path / "adapter")
    with pytest.raises(NothingToExport, match="rank 0"):
        export_peft(pack_for(base, mixed()), base, tmp_path / "adapter", rank=0)
    assert not (tmp_path / "adapter").exists()


def test_another_base_and_a_folder_that_is_taken(base: Path, tmp_path: Path) -> None:
    pack = pack_for(base, mixed())
    llama().save_pretrained(tmp_path / "other")
    with pytest.raises(WrongBase):
        export_peft(pack, tmp_path / "other", tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="not empty"):
        export_peft(pack, base, tmp_path / "other")


def test_a_config_that_builds_no_model(base: Path, tmp_path: Path) -> None:
    pack = pack_for(base, mixed())
    (base / "config.json").write_text('{"model_type": "nonesuch"}')
    with pytest.raises(CLGraftError, match="nonesuch"):
        export_peft(pack, base, tmp_path / "adapter")
