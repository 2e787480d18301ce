"""`cl-graft pack`: what a user types, what comes back, and what is on disk afterwards."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig

from cl_graft import SkillPack
from cl_graft.models.load import locate
from cl_graft.skillpack import codecs
from cl_graft.skillpack.codecs import payload_bytes
from cl_graft.skillpack.folders.checkpoint import Checkpoint
from cl_graft.skillpack.format.file import fingerprint
from tests.command import Call, assert_refused

Q, NORM = "model.layers.0.self_attn.q_proj.weight", "model.norm.weight"


@pytest.fixture
def call(call: Call) -> Call:
    """Run `cl-graft pack` with these words in this process."""
    return partial(call, "pack")


def save_llama(folder: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    sizes = {"vocab_size": 48, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads)).save_pretrained(folder)
    return folder


def encode(name: str, shape: tuple[int, ...]) -> codecs.Encoded:
    if "self_attn" in name:
        left, right = torch.randn(shape[0], 3), torch.randn(3, shape[1])
        return codecs.low_rank(left * 0.1, right * 0.1)
    if "norm" in name:
        return codecs.dense(torch.randn(shape) * 0.1)
    if "embed" in name:
        rows, cols = shape
        left, right, own = (torch.randint(-9, 10, (2, n)).short() for n in (rows, cols, cols))
        shifts = torch.zeros(rows).short(), torch.zeros(cols).short()
        scales = torch.full((3,), 1e-3)
        return codecs.coded_table(left, right, scales, shifts, (torch.tensor([4, 7]), own))
    return codecs.sparse_top(torch.randn(shape) * 0.1, 50)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_llama(tmp_path / "base")


@pytest.fixture
def pack(base: Path, tmp_path: Path) -> Path:
    checkpoint = Checkpoint(base)
    tensors = {name: encode(name, info.shape) for name, info in checkpoint.tensors.items()}
    about: dict[str, Any] = {"task": "code", "method": "by hand", "options": {"rank": 3}}
    SkillPack(tensors, **about, base=checkpoint.fingerprint()).save(tmp_path / "code.pack")
    return tmp_path / "code.pack"


# --- inspect -----------------------------------------------------------------------------------


def test_inspect_shows_the_header_and_every_tensor(pack: Path, call: Call) -> None:
    done, held = call("inspect", pack), SkillPack.load(pack)
    assert done.code == 0
    for word in ("code", "by hand", held.base, held.digest, f"{pack.stat().st_size:,}"):
        assert word in done.out
    for name, tensor in held.tensors.items():
        (line,) = (line for line in done.out.splitlines() if f"│ {name} " in line)
        assert tensor.codec in line
        assert f" {payload_bytes(*tensor.spec):,} " in line
    assert "Bytes by role" not in done.out


def test_inspect_with_a_base_sums_by_role(pack: Path, base: Path, call: Call) -> None:
    done = call("inspect", pack, "--base", base)
    assert done.code == 0
    table = done.out.partition("Bytes by role")[2]
    for role in ("attention", "mlp", "norm", "embedding", "head"):
        assert f"│ {role} " in table


def test_inspect_as_json(pack: Path, base: Path, call: Call) -> None:
    found = json.loads(call("inspect", pack, "--base", base, "--json").out)
    held = SkillPack.load(pack)
    assert (found["task"], found["options"], found["digest"]) == ("code", {"rank": 3}, held.digest)
    assert found["bytes"] == pack.stat().st_size
    tensors = {row["tensor"]: row for row in found["tensors"]}
    assert tensors.keys() == held.tensors.keys()
    bits = 8 * 2 * 3 * (32 + 32) / 32**2
    assert (tensors[Q]["role"], tensors[Q]["rank"], tensors[Q]["bits"]) == ("attention", 3, bits)
    assert sum(row["share"] for row in found["roles"]) == pytest.approx(1.0)
    roles = {row["role"]: row for row in found["roles"]}
    assert (roles["attention"]["tensors"], roles["attention"]["codec"]) == (8, "low_rank")
    assert roles["norm"]["bytes"] == 5 * 32 * 2
    assert json.loads(call("inspect", pack, "--json").out)["roles"] == []


# --- verify ------------------------------------------------------------------------------------


def test_verify_a_whole_pack(pack: Path, base: Path, call: Call) -> None:
    done = call("verify", pack)
    assert (done.code, done.out) == (0, f"{pack} is whole: 21 tensors of task 'code'.\n")
    done = call("verify", pack, "--base", base)
    assert done.out.endswith(f"of task 'code', for base {base}.\n")


def test_verify_names_a_folder_that_is_not_the_base(pack: Path, tmp_path: Path, call: Call) -> None:
    other = save_llama(tmp_path / "other", seed=1)
    assert_refused(call("verify", pack, "--base", other), "'code' is for base", str(other))


def test_verify_against_a_model_by_name(tmp_path: Path, call: Call) -> None:
    """The fingerprint of a folder is that of the model that is loaded from it."""
    folder = Path(locate("nano-llama"))
    tensors = {NORM: codecs.dense(torch.ones(48))}
    pack = SkillPack(
        tensors, task="t", method="m", options={}, base=Checkpoint(folder).fingerprint()
    )
    pack.save(tmp_path / "pack")
    done = call("verify", tmp_path / "pack", "--model", "nano-llama")
    assert done.out.endswith("of task 't', for base nano-llama.\n")
    replace(pack, base="0" * 32).save(tmp_path / "other")
    done = call("verify", tmp_path / "other", "--model", "nano-llama")
    assert_refused(done, "model 'nano-llama' is not the base", str(tmp_path / "other"))


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_a_damaged_pack(pack: Path, command: str, call: Call, tmp_path: Path) -> None:
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(pack.read_bytes()[:-7])
    assert_refused(call(command, torn), str(torn), "make the pack again")


# --- diff --------------------------------------------------------------------------------------


def test_diff(pack: Path, base: Path, tmp_path: Path, call: Call) -> None:
    held = SkillPack.load(pack)
    fewer = {name: encoded for name, encoded in held.tensors.items() if name != NORM}
    fewer[Q] = codecs.dense(-held.delta(Q), torch.float32)
    replace(held, tensors=fewer, base="0" * 32).save(tmp_path / "other")
    done = call("diff", pack, tmp_path / "other")
    assert done.code == 0
    assert "different bases" in done.out
    (line,) = (line for line in done.out.splitlines() if Q in line)
    assert "low_rank" in line and "dense" in line and " -1 " in line
    (line,) = (line for line in done.out.splitlines() if NORM in line)
    assert "only in a" in line
    found = json.loads(call("diff", pack, tmp_path / "other", "--json").out)
    assert found["same_base"] is False
    assert {row["name"] for row in found["tensors"]} == held.tensors.keys()
    assert [row["name"] for row in found["totals"]] == ["all"]
    roles = json.loads(call("diff", pack, pack, "--base", base, "--json").out)
    assert {row["name"] for row in roles["totals"]} >= {"attention", "mlp", "norm", "all"}
    assert all(row["difference"] == 0 for row in roles["totals"])


# --- apply, remove, export ---------------------------------------------------------------------


def test_apply_and_remove(pack: Path, base: Path, tmp_path: Path, call: Call) -> None:
    out, back = tmp_path / "out", tmp_path / "back"
    done = call("apply", "--base", base, "--pack", pack, "--out", out)
    assert (done.code, done.out) == (0, f"{out}: {base} with task 'code'.\n")
    delta = SkillPack.load(pack).delta(NORM)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(model.model.norm.weight.detach(), Checkpoint(base).read(NORM) + delta)
    words = ["remove", "--grafted", out, "--pack", pack, "--base", base]
    done = call(*words)
    assert (done.code, "21 tensors, bit for bit" in done.out) == (0, True)
    assert not back.exists()
    assert call(*words, "--out", back).code == 0
    assert Checkpoint(back).fingerprint() == Checkpoint(base).fingerprint()
    assert_refused(call("apply", "--base", base, "--pack", pack, "--out", out), "not empty")
    wrong = call("remove", "--grafted", base, "--pack", pack, "--base", base)
    assert_refused(wrong, "21 tensors differ")


def test_export(pack: Path, base: Path, tmp_path: Path, call: Call) -> None:
    words = ["export", "--pack", pack, "--base", base]
    done = call(*words, "--out", tmp_path / "peft", "--to", "peft", "--rank", "2")
    assert done.code == 0
    assert f"{tmp_path / 'peft'}: an adapter of rank 8 with 14 of 21 tensors, " in done.out
    assert "Error by role" in done.out and "--to hf writes all" in done.out
    (line,) = (line for line in done.out.splitlines() if NORM in line)
    assert "left out" in line
    assert (tmp_path / "peft" / "adapter_model.safetensors").exists()
    for form in ("peft", "mlx"):
        out = tmp_path / f"{form}-tables"
        done = call(*words, "--out", out, "--to", form, "--embeddings", "--rank", "2")
        assert f"{out}: an adapter of rank 8 with 16 of 21 tensors, " in done.out
    done = call(*words, "--out", tmp_path / "rows", "--to", "token-rows", "--rank", "2")
    assert f"{tmp_path / 'rows'}: an adapter of rank 8 with 16 of 21 tensors, " in done.out
    assert "7 of 48 rows, whole: those that change most" in done.out
    pytest.importorskip("gguf")
    done = call(*words, "--out", tmp_path / "a.gguf", "--to", "gguf", "--rank", "2")
    size = (tmp_path / "a.gguf").stat().st_size
    assert f"a.gguf: an adapter of rank 8 with 14 of 21 tensors, {size:,} bytes." in done.out
    done = call(*words, "--out", tmp_path / "hf", "--to", "hf")
    assert done.code == 0
    assert (tmp_path / "hf" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["inspect", "nowhere"], ["no file nowhere"]),
        (["verify", "."], [". is no regular file"]),
        (["inspect", "PACK", "--base", "nowhere"], ["no folder nowhere"]),
        (["diff", "PACK", "nowhere"], ["no file nowhere"]),
        (["apply", "--base", "nowhere", "--pack", "PACK", "--out", "x"], ["no folder nowhere"]),
        (["export", "--pack", "PACK", "--base", "BASE", "--out", "x", "--to", "pefd"], ["peft"]),
        (
            [
                "export",
                "--pack",
                "PACK",
                "--base",
                "BASE",
                "--out",
                "x",
                "--to",
                "hf",
                "--rank",
                "3",
            ],
            ["--rank"],
        ),
        (
            [
                "export",
                "--pack",
                "PACK",
                "--base",
                "BASE",
                "--out",
                "x",
                "--to",
                "hf",
                "--embeddings",
            ],
            ["--embeddings is for adapters"],
        ),
        (["remove", "--grafted", "nowhere", "--pack", "PACK", "--base", "BASE"], ["no folder"]),
    ],
)
def test_commands_refuse_in_a_sentence(
    words: list[str], told: list[str], pack: Path, base: Path, call: Call
) -> None:
    places = {"PACK": pack, "BASE": base}
    assert_refused(call(*(places.get(word, word) for word in words)), *told)
    assert not Path("x").exists()


def test_experts_that_a_folder_keeps_apart(call: Call, tmp_path: Path) -> None:
    """transformers 5.23 stacks experts in memory and writes them one by one, unless asked not to; its sentence works."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=48,
        hidden_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_experts=4,
    )
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "base")
    name = "model.layers.0.mlp.experts.down_proj"
    delta = torch.randn(model.get_parameter(name).shape) / 8
    pack = tmp_path / "code.pack"
    base = fingerprint(model.named_parameters())
    SkillPack({name: codecs.dense(delta)}, "code", "by hand", {}, base, {}).save(pack)
    words = ["apply", "--pack", pack, "--out", tmp_path / "out", "--base"]
    refused = call(*words, tmp_path / "base")
    assert_refused(refused, "one stack", "save_original_format=False")
    AutoModelForCausalLM.from_pretrained(tmp_path / "base").save_pretrained(
        tmp_path / "new", save_original_format=False
    )
    assert call(*words, tmp_path / "new").code == 0
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "out").get_parameter(name)
    torch.testing.assert_close(read, model.get_parameter(name) + delta.bfloat16().float())


# --- layouts -----------------------------------------------------------------------------------


@pytest.fixture
def both(base: Path, tmp_path: Path) -> tuple[Path, Path]:
    """One policy's packs of the same delta, made in either layout by the command."""
    rng = torch.Generator().manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.02 * torch.randn(weight.shape, generator=rng)
    model.save_pretrained(tmp_path / "tuned")
    return tmp_path / "small.pack", tmp_path / "fast.pack"


def test_a_pack_goes_from_one_layout_to_the_other_and_back_to_the_byte(
    both: tuple[Path, Path], base: Path, tmp_path: Path, call: Call
) -> None:
    small, fast = both
    words = ["create", "--base", base, "--tuned", tmp_path / "tuned", "--budget", "60%"]
    for file, options in ((small, []), (fast, ["--layout", "fast"])):
        assert call(*words, "--out", file, *options).code == 0
        (line,) = (
            line for line in call("inspect", file).out.splitlines() if line.startswith("layout ")
        )
        assert line.split() == ["layout", file.stem]
        pack = SkillPack.load(file)
        assert "coded_table" in {encoded.codec for encoded in pack.tensors.values()}
        norm = codecs.dense(pack.delta("model.norm.weight"))
        replace(pack, tensors={**pack.tensors, "model.norm.weight": norm}).save(file)
    for first, layout in ((small, "fast"), (fast, "small")):
        other, again = tmp_path / "other.pack", tmp_path / "again.pack"
        done = call("convert", first, "--layout", layout, "--out", other)
        assert done.code == 0, done.err
        said = f"{other}: {other.stat().st_size:,} bytes in layout {layout}; {first} has {first.stat().st_size:,}."
        assert done.out.splitlines()[0] == said
        a, b = SkillPack.load(first), SkillPack.load(other)
        assert json.loads(call("inspect", other, "--json").out)["layout"] == layout
        assert all(torch.equal(a.delta(name), b.delta(name)) for name in a.tensors)
        assert (a.options, a.task, a.base, a.files) == (b.options, b.task, b.base, b.files)
        assert "as they were: model.norm.weight." in done.out
        assert call("convert", other, "--layout", first.stem, "--out", again).code == 0
        assert again.read_bytes() == first.read_bytes() != other.read_bytes()


def test_layouts_that_cannot_be(pack: Path, base: Path, tmp_path: Path, call: Call) -> None:
    out, held = tmp_path / "out.pack", SkillPack.load(pack)
    tensors = {n: e for n, e in held.tensors.items() if e.codec != "coded_table"}
    replace(held, tensors=tensors).save(pack)
    convert = ["convert", pack, "--out", out, "--layout"]
    assert_refused(call(*convert, "tiny"), "no layout named 'tiny'", "small")
    assert_refused(call(*convert, "fast"), "no tensor", "graftllm_adaptive")
    create = ["create", "--base", base, "--tuned", base, "--out", out, "--layout"]
    assert_refused(call(*create, "tiny"), "layout is 'tiny'", "small or fast")
    assert_refused(call(*create, "fast", "--method", "graftllm"), "no option of graftllm", "layout")
    assert not out.exists()
