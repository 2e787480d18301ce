"""Packs as LoRA adapters: peft loads them, others by their own layout; what fits is exact, the cost of the rest is told."""

from __future__ import annotations

import json
import sys
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
    Qwen2Config,
    Qwen2ForCausalLM,
)

from cl_graft.errors import CLGraftError
from cl_graft.skillpack import codecs
from cl_graft.skillpack.codecs import Encoded
from cl_graft.skillpack.codecs.quant import round_to_nearest
from cl_graft.skillpack.folders.apply import apply_pack
from cl_graft.skillpack.folders.checkpoint import Checkpoint, CheckpointError
from cl_graft.skillpack.format.errors import WrongBase
from cl_graft.skillpack.format.file import SkillPack
from cl_graft.skillpack.tools.adapter import RANKS, Exported, NothingToExport, adapter_of, totals
from cl_graft.skillpack.tools.gguf_adapter import export_gguf
from cl_graft.skillpack.tools.low_rank import best_factors, cut
from cl_graft.skillpack.tools.peft_adapter import export_mlx, export_peft

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
    """Every kind of tensor; what fits any adapter is Q, K, UP and DOWN."""
    return {
        Q: low(32, 32, 5),
        K: quantised(16, 32, 2, 3),
        UP: codecs.sparse_top(torch.randn(40, 32), 100),
        DOWN: codecs.dense(torch.randn(32, 40) * 0.1),
        HEAD: codecs.sign_scale(torch.randn(48, 32), 0.01),
        EMBEDDING: codecs.dense(torch.randn(48, 32) * 0.1),
        NORM: codecs.dense(torch.randn(32) * 0.1),
    }


LINEAR = [Q, K, UP, DOWN]


def peft(
    pack: SkillPack, base: Path, out: Path, rank: int | None = None, tables: Any = "none"
) -> list[Exported]:
    return export_peft(adapter_of(pack, base, rank, tables), out)


def config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


def kept(rows: list[Exported]) -> list[str]:
    return [row.name for row in rows if row.kept]


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


@pytest.mark.parametrize("tables", ["none", "lora", "rows"])
def test_peft_computes_what_the_exported_tensors_do(
    tables: Any, base: Path, tmp_path: Path
) -> None:
    pack = pack_for(base, mixed())
    rows = peft(pack, base, tmp_path / "adapter", tables=tables)
    assert kept(rows) == LINEAR + ([HEAD, EMBEDDING] if tables != "none" else [])
    ours = with_adapter(base, tmp_path / "adapter")
    theirs = with_pack(base, pack, kept(rows), tmp_path / "merged")
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert not torch.allclose(ours, with_pack(base, pack, [], tmp_path / "alone"), atol=1e-2)


@pytest.mark.parametrize("tables", ["none", "lora", "rows"])
def test_tied_tables(tables: Any, tmp_path: Path) -> None:
    """One delta of the pack is that of the embedding and that of the head."""
    base = tmp_path / "base"
    llama(tied=True).save_pretrained(base)
    pack = pack_for(
        base, {EMBEDDING: codecs.sparse_top(torch.randn(48, 32), 99), Q: low(32, 32, 2)}
    )
    rows = peft(pack, base, tmp_path / "adapter", tables=tables)
    assert kept(rows) == ([Q] if tables == "none" else [EMBEDDING, Q])
    assert ("tied" in rows[0].note) == (tables == "lora")
    ours = with_adapter(base, tmp_path / "adapter")
    assert torch.allclose(ours, with_pack(base, pack, kept(rows), tmp_path / "merged"), atol=1e-5)


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
    pack = pack_for(base, {n: low(*s, 3) for n, s in zip(names, shapes, strict=True)})
    rows = peft(pack, base, tmp_path / "adapter")
    assert [row.rank for row in rows] == [3] * 4 and config(tmp_path / "adapter")["fan_in_fan_out"]
    ours = with_adapter(base, tmp_path / "adapter")
    assert torch.allclose(ours, with_pack(base, pack, names, tmp_path / "merged"), atol=1e-5)


def test_changed_rows_alone_are_written(base: Path, tmp_path: Path) -> None:
    """Indices strictly increasing, rows whole: base and delta."""
    delta = torch.zeros(48, 32)
    delta[40], delta[3, 7] = 1.5, -2.0
    pack = pack_for(base, {EMBEDDING: codecs.dense(delta), Q: low(32, 32, 2)})
    rows = peft(pack, base, tmp_path / "adapter", tables="rows")
    assert rows[0].note == "2 of 48 rows, whole" and rows[0].error == 0 and rows[0].rank is None
    assert config(tmp_path / "adapter")["trainable_token_indices"] == {
        "model.embed_tokens": [3, 40]
    }
    (found,) = (
        t
        for n, t in load_file(tmp_path / "adapter" / "adapter_model.safetensors").items()
        if "token" in n
    )
    assert torch.equal(found, (Checkpoint(base).read(EMBEDDING) + delta)[[3, 40]])


def table(rows: int, cols: int, own: list[int]) -> Encoded:
    """What all rows share, of rank 2, and some rows of their own."""
    generator = torch.Generator().manual_seed(rows)
    draw = lambda *size: torch.randint(-9, 10, size, generator=generator).short()  # noqa: E731
    shifts = torch.zeros(rows).short(), torch.zeros(cols).short()
    scales, alive = torch.tensor([1e-3, 2e-3, 0.1]), torch.tensor(own, dtype=torch.int64)
    mine = alive, draw(len(own), cols)
    return codecs.coded_table(draw(2, rows), draw(2, cols), scales, shifts, mine)


@pytest.mark.parametrize("own", [[], [3, 40]])
def test_of_a_table_that_changes_in_all_rows_those_that_change_most_are_written(
    own: list[int], base: Path, tmp_path: Path
) -> None:
    """As many as have the numbers of two ranks, 2 (48 + 32) / 32, and of the rows of their own."""
    pack = pack_for(base, {EMBEDDING: table(48, 32, own), Q: low(32, 32, 2)})
    delta = pack.delta(EMBEDDING)
    assert delta.any(1).all()
    row, _ = peft(pack, base, tmp_path / "adapter", tables="rows")
    most = sorted(range(48), key=lambda i: float(delta[i].norm()))[-5 - len(own) :]
    assert config(tmp_path / "adapter")["trainable_token_indices"] == {
        "model.embed_tokens": sorted(most)
    }
    assert row.note == f"{5 + len(own)} of 48 rows, whole: those that change most"
    written = torch.zeros(48, 32)
    written[most] = delta[most]
    lost = float((delta - written).norm() / delta.norm())
    assert row.error == pytest.approx(lost, rel=1e-5) and lost > 0.01
    only = pack_for(base, {EMBEDDING: codecs.dense(written, torch.float32), Q: pack.tensors[Q]})
    wanted = with_pack(base, only, [EMBEDDING, Q], tmp_path / "merged")
    assert torch.allclose(with_adapter(base, tmp_path / "adapter"), wanted, atol=1e-5)


def test_the_factors_of_a_table_have_a_rank_for_each_row_of_its_own(
    base: Path, tmp_path: Path
) -> None:
    pack = pack_for(base, {EMBEDDING: table(48, 32, [3, 9, 40]), HEAD: table(48, 32, [])})
    pack.tensors[Q] = low(32, 32, 2)
    rows = peft(pack, base, tmp_path / "adapter", tables="lora")
    assert [row.rank for row in rows] == [5, 2, 2]
    assert all(row.error == pytest.approx(0, abs=1e-5) for row in rows)
    wanted = with_pack(base, pack, list(pack.tensors), tmp_path / "merged")
    assert torch.allclose(with_adapter(base, tmp_path / "adapter"), wanted, atol=1e-5)
    cut_short = peft(pack, base, tmp_path / "less", rank=3, tables="lora")
    assert cut_short[0].rank == 3 and cut_short[0].error > 0.01


# --- one rank for all --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ranks", "most", "one"),
    [((1, 5), None, 8), ((8, 2), None, 8), ((9, 2), None, 16), ((9, 2), 4, 8), ((30, 17), 20, 32)],
)
def test_every_module_has_the_smallest_rank_that_holds_the_largest(
    ranks: tuple[int, int], most: int | None, one: int, base: Path, tmp_path: Path
) -> None:
    pack = pack_for(base, {Q: low(32, 32, ranks[0]), UP: low(40, 32, ranks[1])})
    rows = peft(pack, base, tmp_path / "adapter", most)
    assert [row.rank for row in rows] == [min(rank, most or 99) for rank in ranks]
    found = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {t.shape["lora_A" not in name] for name, t in found.items()} == {one}
    said = config(tmp_path / "adapter")
    assert said["r"] == said["lora_alpha"] == one and "rank_pattern" not in said
    assert one in RANKS and [*RANKS] == [8, 16, 32, 64, 128, 256, 320, 512]


def test_more_than_512_ranks_are_cut(tmp_path: Path) -> None:
    base = tmp_path / "base"
    settings = {"vocab_size": 8, "hidden_size": 600, "intermediate_size": 8}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    LlamaForCausalLM(LlamaConfig(**settings, **heads)).save_pretrained(base)
    pack = pack_for(base, {Q: low(600, 600, 550), K: low(300, 600, 2)})
    wide, narrow = peft(pack, base, tmp_path / "adapter")
    values = torch.linalg.svdvals(pack.delta(Q).double()) ** 2
    wanted = float((values[512:].sum() / values.sum()) ** 0.5)
    assert (wide.rank, narrow.rank) == (512, 2) and config(tmp_path / "adapter")["r"] == 512
    assert wide.error == pytest.approx(wanted, rel=1e-3) and wanted > 1e-3


def test_the_error_of_a_cut_is_that_of_the_singular_values_left_out(
    base: Path, tmp_path: Path
) -> None:
    pack = pack_for(base, {Q: low(32, 32, 9), K: quantised(16, 32, 4, 4), DOWN: mixed()[DOWN]})
    for row in peft(pack, base, tmp_path / "adapter", rank=4):
        values = torch.linalg.svdvals(pack.delta(row.name).double()) ** 2
        assert row.rank == 4
        assert row.error == pytest.approx(float((values[4:].sum() / values.sum()) ** 0.5), rel=1e-4)


def test_what_is_lost_is_told_by_role(base: Path, tmp_path: Path) -> None:
    """Of what is kept and of the whole pack, which left-out tensors miss altogether."""
    pack = pack_for(base, mixed())
    rows = peft(pack, base, tmp_path / "adapter", rank=3)
    deltas = {name: pack.delta(name) for name in pack.tensors}
    found = {total.role: total for total in totals(rows)}
    assert found["norm"][1:] == (1, 0, None, 1.0) and found["embedding"].missing == 1.0
    lost = {
        n: (r.error * deltas[n].norm()) ** 2 for r in rows if (n := r.name) and r.error is not None
    }
    whole = sum(d.square().sum() for d in deltas.values())
    out = sum(d.square().sum() for n, d in deltas.items() if n not in LINEAR)
    inside = sum(deltas[n].square().sum() for n in LINEAR)
    assert found["all"].kept == 4 and found["all"].tensors == 7
    assert found["all"].error == pytest.approx(
        float((sum(lost.values()) / inside) ** 0.5), rel=1e-5
    )
    assert found["all"].missing == pytest.approx(
        float(((sum(lost.values()) + out) / whole) ** 0.5), rel=1e-5
    )


def test_what_does_not_fit_says_why(base: Path, tmp_path: Path) -> None:
    bias = "model.layers.0.self_attn.q_proj.bias"
    tensors = mixed() | {
        bias: codecs.dense(torch.ones(32)),
        EMBEDDING: codecs.dense(torch.ones(50, 32)),
    }
    pack = pack_for(base, tensors, added=[bias], grown={EMBEDDING: [48, 32]})
    rows = peft(pack, base, tmp_path / "adapter")
    notes = {row.name: row.note for row in rows if not row.kept}
    assert notes.keys() == {EMBEDDING, HEAD, NORM, bias}
    assert all(note.startswith("left out: ") for note in notes.values())
    for name, word in {
        EMBEDDING: "number of rows",
        NORM: "norm",
        bias: "no such",
        HEAD: "--embeddings",
    }.items():
        assert word in notes[name]
    assert [row.name for row in rows] == list(tensors)


def test_a_delta_of_zero(base: Path, tmp_path: Path) -> None:
    pack = pack_for(base, {Q: low(32, 32, 0), K: codecs.dense(torch.zeros(16, 32))})
    rows = peft(pack, base, tmp_path / "adapter")
    assert [(row.rank, row.error) for row in rows] == [(1, None), (16, None)]
    assert totals(rows)[-1][3:] == (None, None)
    alone = with_pack(base, pack, [], tmp_path / "alone")
    assert torch.equal(with_adapter(base, tmp_path / "adapter"), alone)


# --- llama.cpp and MLX -------------------------------------------------------------------------


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    gguf = pytest.importorskip("gguf")
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {t.name: torch.from_numpy(t.data.copy()) for t in reader.tensors}


def rotated_back(rows: Tensor, heads: int) -> Tensor:
    """Rows of q or k as transformers has them: 2 b + a of a head is its a-th half's b-th."""
    size = len(rows) // heads
    order = [h * size + 2 * b + a for h in range(heads) for a in (0, 1) for b in range(size // 2)]
    return rows[order]


def test_a_gguf_adapter_holds_the_deltas(base: Path, tmp_path: Path) -> None:
    """As llama.cpp reads it: y += alpha / r * lora_b lora_a x, the rows of q and k in its order."""
    pytest.importorskip("gguf")
    pack = pack_for(base, mixed() | {HEAD: table(48, 32, [4, 7])})
    rows = export_gguf(adapter_of(pack, base, tables="lora"), tmp_path / "a.gguf")
    assert kept(rows) == [*LINEAR, HEAD, EMBEDDING] and [
        f.name for f in tmp_path.iterdir() if f.is_file()
    ] == ["a.gguf"]
    fields, found = read_gguf(tmp_path / "a.gguf")
    assert fields["general.architecture"] == "llama" and fields["general.type"] == "adapter"
    assert fields["adapter.type"] == "lora" and fields["adapter.lora.alpha"] == 32
    names = {
        Q: "blk.0.attn_q", K: "blk.0.attn_k", UP: "blk.1.ffn_up", DOWN: "blk.1.ffn_down",
        HEAD: "output", EMBEDDING: "token_embd",
    }  # fmt: skip
    assert set(found) == {f"{n}.weight.lora_{s}" for n in names.values() for s in "ab"}
    for name, short in names.items():
        a, b = (found[f"{short}.weight.lora_{side}"] for side in "ab")
        assert a.dtype == b.dtype == torch.float32 and b.shape[1] == 32
        delta = a @ b.T if name == EMBEDDING else b @ a
        if name in (Q, K):
            delta = rotated_back(delta, 2 if name == Q else 1)
        assert torch.allclose(delta, pack.delta(name), atol=1e-5), name


def test_transformers_turns_q_and_k_of_llama_cpp_back_in_the_same_way() -> None:
    """The formula of the test above is that of a reader of GGUF models."""
    pytest.importorskip("gguf")
    from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

    rows = torch.randn(24, 5)
    theirs = LlamaTensorProcessor({})._reverse_permute_weights(rows.numpy(), 3, 3)
    assert torch.equal(torch.from_numpy(theirs), rotated_back(rows, 3))


def test_architectures_that_keep_q_and_k_as_they_are(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    base = tmp_path / "base"
    sizes = {"vocab_size": 48, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True}
    Qwen2ForCausalLM(Qwen2Config(**sizes, **heads)).save_pretrained(base)
    pack = pack_for(base, {Q: low(32, 32, 3), EMBEDDING: codecs.dense(torch.randn(48, 32))})
    one, table = export_gguf(adapter_of(pack, base, tables="lora"), tmp_path / "a.gguf")
    assert not table.kept and "tied" in table.note
    fields, found = read_gguf(tmp_path / "a.gguf")
    assert fields["general.architecture"] == "qwen2"
    a, b = (found[f"blk.0.attn_q.weight.lora_{side}"] for side in "ab")
    assert one.kept and torch.allclose(b @ a, pack.delta(Q), atol=1e-5)


def test_what_llama_cpp_does_not_take(base: Path, tmp_path: Path) -> None:
    """Norms are never written: its loader skips them in silence; unknown architectures and taken files are refused."""
    pytest.importorskip("gguf")
    pack = pack_for(base, {Q: low(32, 32, 2), NORM: codecs.dense(torch.ones(32))})
    _, norm = export_gguf(adapter_of(pack, base), tmp_path / "a.gguf")
    assert not norm.kept and not any("norm" in name for name in read_gguf(tmp_path / "a.gguf")[1])
    with pytest.raises(CheckpointError, match="exists"):
        export_gguf(adapter_of(pack, base), tmp_path / "a.gguf")
    with pytest.raises(CheckpointError, match="No such file"):
        export_gguf(adapter_of(pack, base), tmp_path / "no" / "a.gguf")
    gpt2().save_pretrained(tmp_path / "gpt2")
    name = "transformer.h.0.attn.c_attn.weight"
    other = pack_for(tmp_path / "gpt2", {name: low(32, 96, 2)})
    with pytest.raises(NothingToExport, match="'gpt2' is not known.*convert_lora_to_gguf"):
        export_gguf(adapter_of(other, tmp_path / "gpt2"), tmp_path / "b.gguf")
    assert kept(peft(other, tmp_path / "gpt2", tmp_path / "adapter")) == [name]
    llama(tied=True).save_pretrained(tmp_path / "tied")
    table = pack_for(tmp_path / "tied", {EMBEDDING: codecs.dense(torch.ones(48, 32))})
    with pytest.raises(NothingToExport, match="--to hf"):
        export_gguf(adapter_of(table, tmp_path / "tied", tables="lora"), tmp_path / "b.gguf")
    apply_pack(tmp_path / "tied", table, tmp_path / "whole")
    made = {"a.gguf", "adapter", "base", "gpt2", "tied", "whole"}
    assert {f.name for f in tmp_path.iterdir()} == made


def test_gguf_without_its_package(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(CLGraftError, match=r"pip install cl-graft\[gguf\]"):
        export_gguf(adapter_of(pack_for(base, mixed()), base), tmp_path / "a.gguf")


def test_an_mlx_adapter_holds_the_deltas(base: Path, tmp_path: Path) -> None:
    """mlx_lm computes y += scale * (x lora_a) lora_b, for an embedding lora_a[ids] lora_b."""
    pack = pack_for(base, mixed())
    export_mlx(adapter_of(pack, base, tables="lora"), tmp_path / "mlx")
    said = config(tmp_path / "mlx")
    assert said["fine_tune_type"] == "lora" and said["num_layers"] == 2
    about = said["lora_parameters"]
    assert (about["rank"], about["scale"], about["dropout"]) == (32, 1.0, 0.0)
    inner = ["self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.down_proj"]
    assert about["keys"] == sorted([*inner, "lm_head", "model.embed_tokens"])
    found = load_file(tmp_path / "mlx" / "adapters.safetensors")
    for name in [*LINEAR, HEAD, EMBEDDING]:
        a, b = (found.pop(f"{name.removesuffix('.weight')}.lora_{side}") for side in "ab")
        delta = pack.delta(name) if name == EMBEDDING else pack.delta(name).T
        assert a.shape[1] == b.shape[0] == 32 and torch.allclose(a @ b, delta, atol=1e-5)
    assert not found


# --- the best of a rank ------------------------------------------------------------------------


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


def test_a_pack_without_linear_layers(base: Path) -> None:
    pack = pack_for(base, {NORM: codecs.dense(torch.ones(32))})
    with pytest.raises(NothingToExport, match="--to hf"):
        adapter_of(pack, base)
    with pytest.raises(NothingToExport, match="rank 0"):
        adapter_of(pack_for(base, mixed()), base, rank=0)


def test_another_base_and_a_folder_that_is_taken(base: Path, tmp_path: Path) -> None:
    pack = pack_for(base, mixed())
    llama().save_pretrained(tmp_path / "other")
    with pytest.raises(WrongBase):
        adapter_of(pack, tmp_path / "other")
    for export in (export_peft, export_mlx):
        with pytest.raises(CheckpointError, match="not empty"):
            export(adapter_of(pack, base), tmp_path / "other")


def test_a_config_that_builds_no_model(base: Path) -> None:
    pack = pack_for(base, mixed())
    (base / "config.json").write_text('{"model_type": "nonesuch"}')
    with pytest.raises(CLGraftError, match="nonesuch"):
        adapter_of(pack, base)
