"""`cl-graft pack apply` in every dtype and rounding, as a user types it."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from cl_graft.skillpack import codecs
from cl_graft.skillpack.folders.checkpoint import Checkpoint
from cl_graft.skillpack.format.file import SkillPack
from cl_graft.skillpack.rounding import seed_of, stochastic
from tests.command import Call, assert_refused
from tests.model_folders import llama, saved

Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return saved(llama().bfloat16(), tmp_path / "base")


def pack_of(base: Path, size: float) -> SkillPack:
    checkpoint = Checkpoint(base)
    change = torch.randn(32, 32, generator=torch.Generator().manual_seed(0)) * size
    tensors = {Q: codecs.dense(change, torch.float32)}
    return SkillPack(tensors, "small", "test", {}, checkpoint.fingerprint())


@pytest.fixture
def apply(base: Path, tmp_path: Path, call: Call) -> Call:
    """Run `cl-graft pack apply` on the base with the pack, into `out`."""
    pack_of(base, 1e-5).save(tmp_path / "pack")
    words = ["--base", base, "--pack", tmp_path / "pack", "--out", tmp_path / "out"]
    return partial(call, "pack", "apply", *words)


def removed(call: Call, tmp_path: Path) -> int:
    words = ["--grafted", tmp_path / "out", "--pack", tmp_path / "pack", "--base"]
    return call("pack", "remove", *words, tmp_path / "base", "--out", tmp_path / "back").code


def test_by_default_a_small_delta_is_rounded_stochastically(
    apply: Call, base: Path, tmp_path: Path, call: Call
) -> None:
    done = apply()
    assert (done.code, done.out) == (0, f"{tmp_path / 'out'}: {base} with task 'small'.\n")
    pack = SkillPack.load(tmp_path / "pack")
    wanted = Checkpoint(base).read(Q).float() + pack.delta(Q)
    found = Checkpoint(tmp_path / "out").read(Q)
    assert torch.equal(
        found, stochastic(wanted, torch.bfloat16, seed_of([pack.base, pack.task], Q))
    )
    assert removed(call, tmp_path) == 0


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_a_dtype_of_ones_own(
    dtype: str, rounding: str, apply: Call, tmp_path: Path, call: Call
) -> None:
    assert apply("--dtype", dtype, "--rounding", rounding).code == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert model.dtype == getattr(torch, dtype)
    wanted = Checkpoint(tmp_path / "base").read(Q).float() + pack_of(tmp_path / "base", 1e-5).delta(
        Q
    )
    found = model.get_parameter(Q).detach()
    if rounding == "nearest" or dtype == "float32":
        assert torch.equal(found, wanted.to(found.dtype))
    else:
        assert (found != wanted.to(found.dtype)).any()
    assert removed(call, tmp_path) == 0


def test_what_overflows_goes_into_a_wider_dtype(apply: Call, tmp_path: Path) -> None:
    pack_of(tmp_path / "base", 1e6).save(tmp_path / "pack")
    refused = apply("--dtype", "float16")
    assert_refused(refused, Q, "float16", "apply the pack with --dtype float32")
    assert apply("--dtype", "float32").code == 0


def test_compensated_rounding_by_calibration_text(apply: Call, tmp_path: Path, call: Call) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"{w}hello"}) + "\n" for w in "abcdefgh"))
    for words in (["--rounding", "compensated"], ["--calibration", text]):
        assert_refused(apply(*words), "--rounding compensated and --calibration FILE")
    assert not (tmp_path / "out").exists()
    assert apply("--rounding", "compensated", "--calibration", text).code == 0
    record = json.loads((tmp_path / "out" / "skillpack.json").read_text())
    assert (record["rounding"], list(record["fingerprints"])) == ("compensated", [Q])
    assert removed(call, tmp_path) == 0


def test_typing_errors_name_what_there_is(apply: Call, tmp_path: Path) -> None:
    assert_refused(apply("--dtype", "bf16"), "bf16", "bfloat16")
    assert_refused(apply("--rounding", "stochastik"), "stochastik", "stochastic")
    assert not (tmp_path / "out").exists()
