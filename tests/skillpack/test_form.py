"""Grafted folders in every dtype and rounding: a small delta is kept, and the folder is recognised for what it is."""

from __future__ import annotations

import json
import math
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

from cl_graft.models.weights import CheckpointError
from cl_graft.skillpack import codecs
from cl_graft.skillpack.folders.apply import NotGrafted, apply_pack, remove_pack
from cl_graft.skillpack.folders.checkpoint import Checkpoint
from cl_graft.skillpack.folders.form import DTYPES, FILE, ROUNDINGS, Form
from cl_graft.skillpack.format.errors import NonFinite
from cl_graft.skillpack.format.file import SkillPack
from cl_graft.skillpack.live.grafted import Grafted
from cl_graft.skillpack.rounding import NARROW, compensated, in_reach, stochastic
from cl_graft.skillpack.tools.compensate import compensation

Q = "model.layers.0.self_attn.q_proj.weight"
NORM = "model.norm.weight"
EMBEDDING = "model.embed_tokens.weight"
UNTOUCHED = "model.layers.1.mlp.up_proj.weight"
DELTA = 1e-3  # of a weight: an eighth of bfloat16's spacing at most


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).eval()


def pack_on(base: Path, *names: str) -> SkillPack:
    """Deltas far below the spacing of bfloat16."""
    found, tensors = Checkpoint(base), {}
    for number, name in enumerate(names):
        weight = found.read(name).float()
        signs = torch.randn(weight.shape, generator=torch.Generator().manual_seed(number)).sign()
        tensors[name] = codecs.dense(DELTA * weight.abs() * signs, torch.float32)
    return SkillPack(tensors, "small", "test", {}, found.fingerprint())


@pytest.fixture(params=["float32", "float16", "bfloat16"])
def base(request: Any, tmp_path: Path) -> Path:
    llama().to(DTYPES[request.param]).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def narrow(tmp_path: Path) -> Path:
    llama().bfloat16().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def half(name: str, x: Tensor, dtype: torch.dtype, seed: int) -> Tensor | None:
    """Stands for calibration: rounds matrices but for the embedding's, under inputs that correlate."""
    if x.ndim != 2 or name == EMBEDDING:
        return None
    text = torch.randn(500, x.shape[1], generator=torch.Generator().manual_seed(1)).cumsum(1)
    return compensated(x, dtype, text.T @ text / 500, seed)


def kept(base: Path, out: Path, pack: SkillPack) -> float:
    """The share of the delta that was added, along it."""
    along = size = 0.0
    for name in pack.tensors:
        delta = pack.delta(name).double()
        added = Checkpoint(out).read(name).double() - Checkpoint(base).read(name).double()
        along += float((added * delta).sum())
        size += float(delta.square().sum())
    return along / size


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("dtype", [None, *DTYPES])
def test_a_folder_in_any_form_is_recognised_and_taken_off_bit_for_bit(
    dtype: str | None, rounding: Any, base: Path, tmp_path: Path
) -> None:
    pack, out = pack_on(base, Q, NORM, EMBEDDING), tmp_path / "out"
    pack.save(tmp_path / "pack")
    pack = SkillPack.load(tmp_path / "pack")
    form = Form(DTYPES[dtype] if dtype else None, rounding, half)
    assert apply_pack(base, pack, out, form=form) == []
    before, after = Checkpoint(base), Checkpoint(out)
    wanted = form.dtype or before.dtype
    assert {info.dtype for info in after.tensors.values()} == {wanted}
    assert after.config["dtype"] == str(wanted).removeprefix("torch.")
    assert torch.equal(after.read(UNTOUCHED), before.read(UNTOUCHED).to(wanted))
    assert AutoModelForCausalLM.from_pretrained(out, dtype="auto").dtype == wanted
    assert remove_pack(out, pack, base, tmp_path / "back") == 21
    back = Checkpoint(tmp_path / "back")
    assert back.config == before.config and back.tensors.keys() == before.tensors.keys()
    for name in before.tensors:
        assert torch.equal(back.read(name), before.read(name))
        assert back.read(name).dtype == before.read(name).dtype


def test_stochastic_rounding_keeps_what_nearest_loses(narrow: Path, tmp_path: Path) -> None:
    pack = pack_on(narrow, Q, EMBEDDING, UNTOUCHED)
    for rounding in ("nearest", "stochastic"):
        apply_pack(narrow, pack, tmp_path / rounding, form=Form(rounding=rounding))
    assert kept(narrow, tmp_path / "nearest", pack) == 0
    # entries (14,336): p = DELTA / spacing; the sum's standard error is about 0.05 of the delta
    assert kept(narrow, tmp_path / "stochastic", pack) == pytest.approx(1, abs=0.2)
    apply_pack(narrow, pack, tmp_path / "default")
    for name in pack.tensors:
        same = Checkpoint(tmp_path / "default").read(name)
        assert torch.equal(same, Checkpoint(tmp_path / "stochastic").read(name))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_folder_has_the_bits_of_a_grafted_model(dtype: str, tmp_path: Path) -> None:
    model = llama().to(DTYPES[dtype])
    model.save_pretrained(tmp_path / "base")
    pack = pack_on(tmp_path / "base", Q, NORM)
    apply_pack(tmp_path / "base", pack, tmp_path / "out")
    Grafted(model).activate([pack])
    for name, parameter in model.named_parameters():
        assert torch.equal(Checkpoint(tmp_path / "out").read(name), parameter)


def test_another_packs_rounding_is_another(narrow: Path, tmp_path: Path) -> None:
    pack = pack_on(narrow, Q)
    other = SkillPack(pack.tensors, "another", "test", {}, pack.base)
    for number, one in enumerate((pack, other)):
        apply_pack(narrow, one, tmp_path / str(number))
    folders = [Checkpoint(tmp_path / str(number)).read(Q) for number in (0, 1)]
    assert not torch.equal(*folders)
    # its own record says by which pack it was rounded, so a pack of the same deltas is one, too
    assert remove_pack(tmp_path / "0", other, narrow) == 21


def changed(folder: Path, name: str, row: int, step: int) -> None:
    """One entry, moved by steps of its dtype."""
    weights = load_file(folder / "model.safetensors")
    weights[name].view(torch.int16)[row, 0] += step
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_one_entry_that_differs_is_found(rounding: Any, narrow: Path, tmp_path: Path) -> None:
    pack, out = pack_on(narrow, Q, EMBEDDING), tmp_path / "out"
    apply_pack(narrow, pack, out, form=Form(rounding=rounding, compensate=half))
    for name in (Q, EMBEDDING, UNTOUCHED):
        changed(out, name, 5, 1)
        with pytest.raises(NotGrafted, match=rf"1 tensors differ \({name}\)"):
            remove_pack(out, pack, narrow)
        changed(out, name, 5, -1)
    assert remove_pack(out, pack, narrow) == 21


def test_a_fingerprint_alone_does_not_pass_for_the_sum(narrow: Path, tmp_path: Path) -> None:
    """Weights and record that fit each other, but not the pack."""
    pack, out = pack_on(narrow, Q), tmp_path / "out"

    def other(name: str, x: Tensor, dtype: torch.dtype, seed: int) -> Tensor:
        return compensated(x * 1.1, dtype, torch.eye(x.shape[1]), seed)

    apply_pack(narrow, pack, out, form=Form(rounding="compensated", compensate=other))
    with pytest.raises(NotGrafted, match="1 tensors differ"):
        remove_pack(out, pack, narrow)


def test_a_folder_without_a_record_is_one_of_nearest(narrow: Path, tmp_path: Path) -> None:
    pack, out = pack_on(narrow, Q), tmp_path / "out"
    apply_pack(narrow, pack, out, form=Form(rounding="nearest"))
    (out / FILE).unlink()
    assert remove_pack(out, pack, narrow) == 21
    apply_pack(narrow, pack, tmp_path / "other")
    (tmp_path / "other" / FILE).unlink()
    with pytest.raises(NotGrafted):
        remove_pack(tmp_path / "other", pack, narrow)


def test_the_record_and_a_damaged_one(narrow: Path, tmp_path: Path) -> None:
    pack, out = pack_on(narrow, Q), tmp_path / "out"
    apply_pack(narrow, pack, out)
    about = {"task": "small", "pack": pack.digest, "base": pack.base, "rounding": "stochastic"}
    assert json.loads((out / FILE).read_text()) == about | {"fingerprints": {}}
    for text in ("[]", "{", '{"task": 1}', json.dumps(about | {"rounding": "up"})):
        (out / FILE).write_text(text)
        with pytest.raises(CheckpointError, match=FILE):
            remove_pack(out, pack, narrow)


def test_a_pack_on_a_grafted_folder_leaves_its_own_record(narrow: Path, tmp_path: Path) -> None:
    first = pack_on(narrow, Q)
    apply_pack(narrow, first, tmp_path / "once")
    second = pack_on(tmp_path / "once", EMBEDDING)
    apply_pack(tmp_path / "once", second, tmp_path / "twice")
    assert json.loads((tmp_path / "twice" / FILE).read_text())["pack"] == second.digest
    remove_pack(tmp_path / "twice", second, tmp_path / "once", tmp_path / "back")
    assert remove_pack(tmp_path / "back", first, narrow) == 21


def test_what_float16_cannot_hold_is_refused_touched_or_not(tmp_path: Path) -> None:
    model = llama().bfloat16()
    with torch.no_grad():
        model.model.norm.weight[0] = 1e5
    model.save_pretrained(tmp_path / "base")
    pack = pack_on(tmp_path / "base", Q)
    with pytest.raises(NonFinite, match=rf"{NORM}.*float16"):
        apply_pack(tmp_path / "base", pack, tmp_path / "out", form=Form(torch.float16))
    assert not (tmp_path / "out").exists()


# --- under second moments ----------------------------------------------------------------------


def correlated(cols: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(2000, 8, generator=g) @ torch.randn(8, cols, generator=g)
    return x + 0.3 * torch.randn(2000, cols, generator=g)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("cols", [1, 7, 300])
def test_compensated_rounding_cancels_in_the_output(dtype: torch.dtype, cols: int) -> None:
    x = torch.randn(50, cols, generator=torch.Generator().manual_seed(cols)) * 0.02
    text = correlated(cols)
    made = compensated(x, dtype, text.T @ text / len(text), 1)
    assert made.dtype == dtype and in_reach(made, x).all()
    assert torch.equal(
        made, compensated(x, dtype, text.T @ text, 1, block=64)
    )  # whatever the scale
    errors = [float((text @ (w.float() - x).T).norm()) for w in (made, stochastic(x, dtype, 1))]
    if cols == 1:  # nothing to make up for
        assert torch.equal(made, stochastic(x, dtype, 1))
    else:
        assert errors[0] < (0.4 if cols == 300 else 0.9) * errors[1]


def test_compensated_rounding_by_hand() -> None:
    """Two inputs that are always equal, each weight 3/8 of a step above 1.5: together never less than none, nor more
    than one step, which two draws of their own would be in 9 of 64 rows."""
    step = 2.0**-7
    x = torch.full((2000, 2), 1.5 + 0.375 * step)
    made = compensated(x, torch.bfloat16, torch.ones(2, 2), 0, damping=1e-3)
    steps = (made.float() - 1.5).sum(1) / step
    assert set(steps.tolist()) == {0.0, 1.0}
    assert float(steps.mean()) == pytest.approx(0.75, abs=0.045)  # 4.6 sigma
    alone = compensated(x, torch.bfloat16, torch.eye(2), 0)
    assert torch.equal(
        alone, stochastic(x, torch.bfloat16, 0)
    )  # inputs that have nothing in common


def test_no_entry_of_compensated_rounding_has_a_direction() -> None:
    x = torch.rand(1, 30, generator=torch.Generator().manual_seed(0)).repeat(4000, 1) * 0.01 + 0.02
    text = correlated(30)
    missed = compensated(x, torch.bfloat16, text.T @ text, 3).double() - x.double()
    assert (missed.mean(0).abs() < 4.5 * missed.std(0) / math.sqrt(len(x))).all()


def test_compensated_rounding_leaves_what_the_dtype_holds_and_refuses_nonsense() -> None:
    x = torch.randn(9, 20, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    text = correlated(20)
    gram = (text.T @ text).double()
    before = gram.clone()
    assert torch.equal(compensated(x, torch.bfloat16, gram, 0).float(), x)
    assert torch.equal(gram, before)
    for bad in (gram[:5, :5], -gram):
        with pytest.raises(ValueError, match="second moments"):
            compensated(x, torch.bfloat16, bad, 0)
    fine = x + 1e-5
    never_read = compensated(fine, torch.bfloat16, torch.zeros(20, 20), 0)
    assert torch.equal(never_read, stochastic(fine, torch.bfloat16, 0))


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 48, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 16}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)).eval()


@pytest.mark.parametrize(
    ("make", "matrix", "table"),
    [(llama, Q, EMBEDDING), (gpt2, "transformer.h.0.attn.c_attn.weight", "transformer.wte.weight")],
)
def test_calibrated_on_the_inputs_of_base_and_pack(
    make: Any, matrix: str, table: str, tmp_path: Path
) -> None:
    """Also where a matrix multiplies from the right; what multiplies nothing is left to chance."""
    model = make().bfloat16()
    model.save_pretrained(tmp_path / "base")
    base = Checkpoint(tmp_path / "base")
    key = next(name for name in base.tensors if matrix.endswith(name))
    own = next(name for name in base.tensors if table.endswith(name))
    pack = pack_on(base.folder, key, own)
    ids = torch.randint(0, 4, (64, 2), generator=torch.Generator().manual_seed(0))  # alike
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    with compensation(base, pack, [batch], tmp_path) as compensate:
        assert compensate(own, torch.zeros(base.tensors[own].shape), torch.bfloat16, 0) is None
        form = Form(rounding="compensated", compensate=compensate)
        apply_pack(base.folder, pack, tmp_path / "out", form=form)
    assert {f.name for f in tmp_path.iterdir()} == {"base", "out"}
    assert list(json.loads((tmp_path / "out" / FILE).read_text())["fingerprints"]) == [key]
    assert remove_pack(tmp_path / "out", pack, base.folder) == len(base.tensors)
    apply_pack(base.folder, pack, tmp_path / "alone")
    missed = {}
    wanted = base.read(key).float() + pack.delta(key)
    layer = dict(model.float().named_modules())[matrix.removesuffix(".weight")]
    seen: list[Tensor] = []
    layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    with torch.no_grad():
        for name in pack.tensors:
            dict(model.named_parameters())[{key: matrix, own: table}[name]] += pack.delta(name)
        model(ids)
        for folder in ("out", "alone"):
            error = Checkpoint(tmp_path / folder).read(key).float() - wanted
            error = error if make is gpt2 else error.T
            missed[folder] = float((seen[0] @ error).norm())
    assert missed["out"] < 0.7 * missed["alone"]
