"""Lossless packs of two folders: every tensor comes back as the tuned folder has it, and through the commands, too."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from cl_graft.skillpack import codecs
from cl_graft.skillpack.compress import lossless as module
from cl_graft.skillpack.compress.lossless import CreatedLossless, create_lossless
from cl_graft.skillpack.folders.apply import apply_pack, remove_pack
from cl_graft.skillpack.folders.bits import identical
from cl_graft.skillpack.folders.checkpoint import Checkpoint
from cl_graft.skillpack.folders.pair import PairError
from cl_graft.skillpack.format.file import CorruptPack, NonFinite, SkillPack
from tests.command import Call, assert_refused
from tests.model_folders import llama, rewrite, saved, tensors, tokenizer, tuned
from tests.refusals import refusal

Q, NORM = "model.layers.0.self_attn.q_proj.weight", "model.norm.weight"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture
def call(call: Call) -> Call:
    """Run `cl-graft pack` with these words in this process."""
    return partial(call, "pack")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return saved(llama(), tmp_path / "base")


@pytest.fixture
def after(tmp_path: Path) -> Path:
    return saved(tuned(llama()), tmp_path / "tuned")


def comes_back(base: Path, after: Path, place: Path) -> tuple[CreatedLossless, SkillPack]:
    """Make a pack, apply it, and hold tensor after tensor against the tuned folder's."""
    place.mkdir()
    created = create_lossless(base, after, place / "pack")
    pack = SkillPack.load(place / "pack")
    apply_pack(base, pack, place / "result")
    found, wanted = Checkpoint(place / "result"), Checkpoint(after)
    assert found.tensors.keys() == wanted.tensors.keys()
    for name in wanted.tensors:
        assert identical(found.read(name), wanted.read(name)), name
    assert remove_pack(place / "result", pack, base) == len(wanted.tensors)
    assert created.bytes == (place / "pack").stat().st_size
    assert sorted(path.name for path in place.iterdir()) == ["pack", "result"]
    return created, pack


@pytest.mark.parametrize("own", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kept", ["float32", "bfloat16", "float16"])
def test_any_two_dtypes(own: str, kept: str, tmp_path: Path) -> None:
    """The tuned dtype comes back whatever the base's is."""
    saved(llama().to(getattr(torch, own)), tmp_path / "base")
    saved(tuned(llama()).to(getattr(torch, kept)), tmp_path / "tuned")
    created, pack = comes_back(tmp_path / "base", tmp_path / "tuned", tmp_path / "o")
    assert created.tuned_bytes == 17056 * (4 if kept == "float32" else 2)
    assert pack.method == "lossless" and pack.lossless
    assert {e.codec for e in pack.tensors.values()} == {"lossless"}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "o" / "result").state_dict()
    assert all(identical(loaded[n], t) for n, t in tensors(tmp_path / "tuned").items())


def test_what_else_tuning_changed_comes_along(base: Path, tmp_path: Path) -> None:
    after = saved(tuned(llama(rope_parameters={"rope_theta": 5e5})), tmp_path / "tuned")
    tokenizer("<|end|>", "{{ messages }}").save_pretrained(after)
    created, pack = comes_back(base, after, tmp_path / "o")
    assert "config.json" in pack.files and "chat_template.jinja" in pack.files
    assert any("chat template" in note for note in created.notes)
    for name in pack.files.keys() - {"config.json"}:
        assert (tmp_path / "o" / "result" / name).read_bytes() == (after / name).read_bytes()
    found = AutoConfig.from_pretrained(tmp_path / "o" / "result")
    assert found.rope_parameters["rope_theta"] == 5e5


def test_values_that_only_bits_tell_apart(base: Path, after: Path, tmp_path: Path) -> None:
    """-0 beside 0, subnormals, the largest; what is the same is not stored."""
    found = tensors(base)
    norm = torch.zeros_like(found[NORM])
    rewrite(base, found | {NORM: norm})
    norm[:4] = torch.tensor([-0.0, 2.0**-149, -torch.finfo(torch.float32).max, 2.0**-126])
    rewrite(after, tensors(base) | {NORM: norm})
    created, pack = comes_back(base, after, tmp_path / "o")
    assert list(pack.tensors) == [NORM] and "20 of 21 tensors are the base's" in created.notes[-1]
    rewrite(after, tensors(base) | {NORM: -torch.zeros_like(norm)})
    assert list(comes_back(base, after, tmp_path / "p")[1].tensors) == [NORM]


def test_a_dtype_that_changes_alone_takes_next_to_nothing(base: Path, tmp_path: Path) -> None:
    saved(llama().bfloat16(), tmp_path / "tuned")
    _, pack = comes_back(base, tmp_path / "tuned", tmp_path / "o")
    assert all(e.parts["code"].numel() == 0 for e in pack.tensors.values())


def test_rows_more_and_less(base: Path, after: Path, tmp_path: Path) -> None:
    for rows in (50, 40):
        saved(tuned(llama(vocab_size=rows)), tmp_path / f"tuned{rows}")
        _, pack = comes_back(base, tmp_path / f"tuned{rows}", tmp_path / f"o{rows}")
        assert pack.grown == {EMBEDDING: [48, 32], HEAD: [48, 32]}
        config = json.loads((tmp_path / f"o{rows}" / "result" / "config.json").read_text())
        assert config["vocab_size"] == rows


@pytest.mark.parametrize("ours", ["tied", "copy", "own"])
@pytest.mark.parametrize("theirs", ["tied", "copy", "own"])
def test_heads_come_back_as_they_are_stored(ours: str, theirs: str, tmp_path: Path) -> None:
    """A head of its own, one that is tied, and one that is tied and stored all the same."""

    def folder(kind: str, name: str, change: bool) -> Path:
        made = llama(tie_word_embeddings=kind != "own")
        place = saved(tuned(made) if change else made, tmp_path / name)
        if kind == "copy":
            found = tensors(place)
            rewrite(place, found | {HEAD: found[EMBEDDING].clone()})
        return place

    base, after = folder(ours, "base", False), folder(theirs, "tuned", True)
    if (ours, theirs) == ("own", "tied"):
        refusal(PairError, lambda: create_lossless(base, after, tmp_path / "pack"), repr(HEAD))
        return
    comes_back(base, after, tmp_path / "o")
    config = json.loads((tmp_path / "o" / "result" / "config.json").read_text())
    assert config["tie_word_embeddings"] is (theirs != "own")


def test_a_head_that_is_the_bases_stays_although_it_repeats_the_embedding(tmp_path: Path) -> None:
    base, after = (saved(llama(tie_word_embeddings=True), tmp_path / n) for n in ("b", "t"))
    found = tensors(base)
    found[HEAD] = found[EMBEDDING].clone()
    rewrite(base, found)
    rewrite(after, found | {NORM: found[NORM] + 1})
    assert list(comes_back(base, after, tmp_path / "o")[1].tensors) == [NORM]


def test_buffers_come_back_and_go(base: Path, after: Path, tmp_path: Path) -> None:
    ours, theirs = tensors(base), tensors(after)
    old, new = "model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"
    rewrite(base, ours | {old: torch.ones(8), "ids.position_ids": torch.arange(4)})
    rewrite(after, theirs | {new: torch.ones(8) / 3, "ids.position_ids": torch.arange(4)})
    created, pack = comes_back(base, after, tmp_path / "o")
    assert pack.options["absent"] == [old] and pack.added == [new]
    assert any(f"1 tensors of the base are not in the result ({old}" in n for n in created.notes)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({NORM: torch.full((32,), torch.nan)}, NonFinite, [NORM, "NaN or Inf"]),
        ({NORM: torch.ones(32).double()}, PairError, [NORM, "torch.float64", "bfloat16; save"]),
        ({"x.position_ids": torch.arange(3)}, PairError, ["x.position_ids", "integers"]),
        ({Q: torch.ones(32, 31)}, PairError, [Q, "(32, 31)"]),
        ({}, PairError, ["no tensor of", "would be empty"]),
        ({NORM: None}, PairError, [NORM, "lacks"]),
    ],
)
def test_what_no_lossless_pack_can_hold(
    change: dict[str, Tensor | None], error: Any, words: list[str], base: Path, tmp_path: Path
) -> None:
    after = tmp_path / "other"
    shutil.copytree(base, after)
    found = tensors(base) | change
    rewrite(after, {n: t for n, t in found.items() if t is not None})
    refusal(error, lambda: create_lossless(base, after, tmp_path / "pack"), *words)
    assert not (tmp_path / "pack").exists()


def test_a_killed_run_is_continued(
    base: Path, after: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []

    def stopping(x: Tensor, before: Tensor | None) -> codecs.Encoded:
        made.append(x)
        if len(made) == 12:
            raise KeyboardInterrupt
        return codecs.lossless(x, before)

    monkeypatch.setattr(module, "lossless", stopping)
    place = tmp_path / "o"
    place.mkdir()
    with pytest.raises(KeyboardInterrupt):
        create_lossless(base, after, place / "pack")
    create_lossless(base, after, place / "pack")
    assert len(made) == 22  # one of 21 was begun twice
    assert [path.name for path in place.iterdir()] == ["pack"]
    monkeypatch.undo()
    create_lossless(base, after, place / "whole")
    assert (place / "whole").read_bytes() == (place / "pack").read_bytes()


def test_a_stream_that_does_not_come_back_is_never_written(
    base: Path, after: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "restore", lambda encoded, before: -codecs.restore(encoded, before))
    refusal(
        CorruptPack, lambda: create_lossless(base, after, tmp_path / "pack"), "did not come back"
    )
    assert not (tmp_path / "pack").exists()


# commands


@pytest.fixture
def pack(base: Path, after: Path, tmp_path: Path, call: Call) -> Path:
    words = ["--base", base, "--tuned", after, "--out", tmp_path / "pack", "--task", "math"]
    done = call("create", *words, "--lossless")
    assert done.code == 0, done
    size = (tmp_path / "pack").stat().st_size
    assert f"pack: {size:,} bytes for {4 * 17056:,} of the tuned model" in done.out
    return tmp_path / "pack"


def test_the_commands(pack: Path, base: Path, after: Path, tmp_path: Path, call: Call) -> None:
    on = ["--base", base, "--pack", pack]
    done = call("apply", *on, "--out", tmp_path / "result", "--dtype", "float16")
    assert_refused(done, "'math'", "each in its own dtype", "without --dtype")
    done = call("apply", *on, "--out", tmp_path / "result")
    assert done.code == 0
    weights = "model.safetensors"
    assert (tmp_path / "result" / weights).read_bytes() == (after / weights).read_bytes()
    done = call("verify", pack, "--base", base)
    assert done.code == 0 and "21 tensors of task 'math', for base" in done.out
    done = call("verify", pack)
    assert done.code == 0 and "--base" in done.out and "21 tensors" in done.out
    done = call("remove", *on, "--grafted", tmp_path / "result", "--out", tmp_path / "again")
    assert done.code == 0 and "21 tensors, bit for bit" in done.out
    assert (tmp_path / "again" / weights).read_bytes() == (base / weights).read_bytes()
    assert_refused(call("remove", *on, "--grafted", base), "is not", str(base))
    done = call("export", *on, "--to", "hf", "--out", tmp_path / "hf")
    assert done.code == 0
    assert (tmp_path / "hf" / weights).read_bytes() == (after / weights).read_bytes()
    done = call("export", *on, "--to", "peft", "--out", tmp_path / "lora")
    assert_refused(done, "'math'", "bit for bit and no delta", "`cl-graft pack apply`")
    assert not (tmp_path / "lora").exists()


def test_inspect_and_diff(pack: Path, base: Path, after: Path, tmp_path: Path, call: Call) -> None:
    found = json.loads(call("inspect", pack, "--json").out)
    assert found["method"] == "lossless" and {t["codec"] for t in found["tensors"]} == {"lossless"}
    done = call("inspect", pack, "--base", base, "--tuned", after, "--json")
    assert {row["error"] for row in json.loads(done.out)["tensors"]} == {0.0}
    words = ["--base", base, "--tuned", after, "--out", tmp_path / "lossy"]
    assert call("create", *words, "--budget", "400%").code == 0
    assert_refused(call("diff", pack, tmp_path / "lossy"), "no delta to compare", "--base")
    done = call("diff", pack, tmp_path / "lossy", "--base", base, "--json")
    totals = json.loads(done.out)["totals"]
    assert totals[-1]["cosine"] == pytest.approx(1, abs=1e-3)
    saved(tuned(llama(seed=5)), tmp_path / "other")
    assert_refused(call("diff", pack, pack, "--base", tmp_path / "other"), "'math' is for base")


@pytest.mark.parametrize(
    "budget", ["--budget", "--policy", "--calibration", "--prefix", "--method"]
)
def test_lossless_decides_everything(
    budget: str, base: Path, after: Path, tmp_path: Path, call: Call
) -> None:
    words = ["--base", base, "--tuned", after, "--out", tmp_path / "pack", "--lossless"]
    value = {"--budget": "5%", "--prefix": "tuned", "--method": "graftllm"}.get(budget, "x")
    assert_refused(call("create", *words, budget, value), "--lossless", budget, "leave")
    assert not (tmp_path / "pack").exists()


def test_a_damaged_pack_is_refused(pack: Path, base: Path, tmp_path: Path, call: Call) -> None:
    data = bytearray(pack.read_bytes())
    data[8 + int.from_bytes(data[:8], "little")] ^= 1  # the first byte of the payload
    pack.write_bytes(data)
    done = call("apply", "--base", base, "--pack", pack, "--out", tmp_path / "result")
    assert_refused(done, str(pack), "checksum")
