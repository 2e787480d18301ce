"""Two folders -> one pack: on many architectures, within the budget, the same after a kill."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from cl_graft.errors import CLGraftError, OverBudget
from cl_graft.models import embedded
from cl_graft.skillpack.compress.create import Calibration, create
from cl_graft.skillpack.folders.apply import apply_pack, remove_pack
from cl_graft.skillpack.folders.checkpoint import Checkpoint
from cl_graft.skillpack.folders.pair import pair
from cl_graft.skillpack.format.file import SkillPack
from cl_graft.skillpack.live.grafted import Grafted
from tests.command import Call, assert_refused

SIZE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
OPT = {"ffn_dim": 48, "word_embed_proj_dim": 16}
KINDS: dict[str, dict[str, Any]] = {
    **{kind: SIZE for kind in ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text")},
    "phi": {**SIZE, "partial_rotary_factor": 0.5},
    "gpt_neox": {**SIZE, "rotary_pct": 0.5},
    "mixtral": {**SIZE, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt2": {**GPT2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
    "opt": {**SIZE, **OPT},
    "mamba": {**SIZE, "state_size": 8, "conv_kernel": 4},
}
TEXT = torch.randint(3, 96, (4, 24), generator=torch.Generator().manual_seed(0))
BATCH = {"input_ids": TEXT, "attention_mask": torch.ones_like(TEXT), "labels": TEXT}


def tuned(model: Any, size: float = 0.2) -> Any:
    g = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=g) * torch.logspace(0, -2, p.shape[-1])
            p += (size * p.float().abs().mean() * noise).to(p.dtype)
    return model


def folders(root: Path, kind: str = "llama", dtype: Any = torch.float32, **changes: Any):
    config = AutoConfig.for_model(kind, **{**KINDS[kind], **changes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    model.save_pretrained(root / "base")
    tuned(model).save_pretrained(root / "tuned")
    return root / "base", root / "tuned", root / "pack.safetensors"


def difference(one: Path, other: Path) -> float:
    """Euclidean distance of two folders' weights."""
    a, b = Checkpoint(one), Checkpoint(other)
    each = ((a.read(n).float() - b.read(n).float()).square().sum() for n in a.floating)
    return float(torch.stack(list(each)).sum().sqrt())


@pytest.mark.parametrize("kind", KINDS)
def test_any_architecture_is_packed_applied_and_taken_off(kind: str, tmp_path: Path) -> None:
    base, after, out = folders(tmp_path, kind, torch.bfloat16)
    for calibration in (None, Calibration([BATCH, BATCH])):
        found = create(base, after, out, budget="35%", calibration=calibration)
        assert found.bytes == out.stat().st_size
        assert 0.96 * found.limit <= found.bytes <= found.limit  # of 15 KB, half of it header
        pack = SkillPack.load(out)
        applied = tmp_path / f"applied{calibration is None}"
        apply_pack(base, pack, applied)
        assert remove_pack(applied, pack, base) > 0
        assert difference(applied, after) < 0.8 * difference(base, after)
        loaded = AutoModelForCausalLM.from_pretrained(applied)
        assert torch.isfinite(loaded(TEXT).logits).all()
    assert not list(tmp_path.glob("*.work"))


@pytest.mark.parametrize("method", ["graftllm_adaptive", "graftllm"])
def test_the_pack_goes_onto_the_live_base_as_onto_the_folder(method: str, tmp_path: Path) -> None:
    base, after, out = folders(tmp_path)
    create(base, after, out, budget="25%", method=method, calibration=Calibration([BATCH]))
    pack = SkillPack.load(out)
    assert pack.method == method and pack.options["calibrated"] is True
    apply_pack(base, pack, tmp_path / "applied")
    live = AutoModelForCausalLM.from_pretrained(base)
    Grafted(live).activate([pack])
    there = AutoModelForCausalLM.from_pretrained(tmp_path / "applied")
    assert torch.allclose(live(TEXT).logits, there(TEXT).logits, atol=1e-5)


def test_calibration_lowers_the_change_of_the_outputs(tmp_path: Path) -> None:
    base, after, out = folders(tmp_path)
    target = AutoModelForCausalLM.from_pretrained(after)(TEXT).logits
    errors = []
    for calibration in (Calibration([BATCH]), None):
        create(base, after, out, budget="25%", calibration=calibration)
        model = AutoModelForCausalLM.from_pretrained(base)
        Grafted(model).activate([SkillPack.load(out)])
        errors.append(float((model(TEXT).logits - target).norm()))
    assert errors[0] < errors[1]


def test_the_inputs_of_the_compressed_prefix_change_the_pack(tmp_path: Path) -> None:
    base, after, out = folders(tmp_path)
    digests = []
    for prefix in ("tuned", "compressed"):
        found = create(
            base, after, out, budget="8%", calibration=Calibration([BATCH], prefix=prefix)
        )
        assert found.bytes <= found.limit
        digests.append(SkillPack.load(out).digest)
    assert digests[0] != digests[1]


def test_a_larger_vocabulary_is_added_and_taken_off(tmp_path: Path) -> None:
    base, _, out = folders(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(3)
    model.resize_token_embeddings(104)
    shutil.rmtree(tmp_path / "tuned")
    tuned(model).save_pretrained(tmp_path / "tuned")
    create(base, tmp_path / "tuned", out, budget="60%", calibration=Calibration([BATCH]))
    pack = SkillPack.load(out)
    assert pack.grown == {"lm_head.weight": [96, 32], "model.embed_tokens.weight": [96, 32]}
    apply_pack(base, pack, tmp_path / "applied")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "applied")(TEXT).logits.shape[-1] == 104


class Killed(BaseException):
    pass


def test_a_kill_at_any_point_changes_no_byte_and_nothing_is_done_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, after, out = folders(tmp_path)
    options: dict[str, Any] = {"budget": "20%", "calibration": Calibration([BATCH])}
    create(base, after, tmp_path / "whole.safetensors", **options)
    counted: list[str] = []
    create(base, after, out, progress=lambda what, done: counted.append(what), **options)
    out.unlink()
    whole = (tmp_path / "whole.safetensors").read_bytes()
    for stop in range(1, len(counted), 5):
        seen: list[str] = []

        def die(what: str, done: float, seen: list[str] = seen, stop: int = stop) -> None:
            seen.append(what)
            if len(seen) == stop:
                raise Killed

        with pytest.raises(Killed):
            create(base, after, out, progress=die, **options)
        assert not out.exists()
        create(base, after, out, **options)
        assert out.read_bytes() == whole
        assert not list(tmp_path.glob("*.work"))
        out.unlink()
    with pytest.raises(Killed):
        create(base, after, out, progress=lambda what, done: _at_the_end(what, done), **options)
    pairing = pair(Checkpoint(base), Checkpoint(after))

    def never(*_: object) -> None:
        raise AssertionError("all is in the work store")

    monkeypatch.setattr(type(pairing), "delta", never)
    create(base, after, out, **options)
    assert out.read_bytes() == whole


def _at_the_end(what: str, done: float) -> None:
    if what == "compressing" and done == 1.0:
        raise Killed


def test_what_another_task_left_is_not_used(tmp_path: Path) -> None:
    base, after, out = folders(tmp_path)
    with pytest.raises(Killed):
        create(base, after, out, budget="20%", progress=_at_the_end)
    assert len(list(tmp_path.glob("*.work"))) == 1
    found = create(base, after, out, budget="10%")
    assert (
        found.bytes
        <= found.limit
        < 0.11 * 2 * sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(base).parameters())
    )
    assert len(list(tmp_path.glob("*.work"))) == 1  # the other task's, which can still go on


def test_a_budget_that_is_too_small_names_itself(tmp_path: Path) -> None:
    base, after, out = folders(tmp_path)
    with pytest.raises(OverBudget, match="300B"):
        create(base, after, out, budget="300B")
    with pytest.raises(CLGraftError, match="not a size"):
        create(base, after, out, budget="much")
    assert not out.exists()


# the command


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Folders with a tokenizer, and a calibration file."""
    root, source = tmp_path_factory.mktemp("nano"), str(embedded.obtain("nano-llama", None))
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source)
    for name in ("base", "tuned"):
        (model if name == "base" else tuned(model)).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    rows = [{"prompt": f"what is {i} plus {i}?", "completion": str(2 * i)} for i in range(12)]
    (root / "text.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root / "base", root / "tuned", root / "text.jsonl"


@pytest.fixture
def run(call: Call) -> Call:
    """`cl-graft pack` with these words."""
    return lambda *words: call("pack", *words)


def test_create_verify_apply_export_by_command(nano, run: Call, tmp_path: Path) -> None:
    base, after, text = nano
    out = tmp_path / "skill.safetensors"
    (tmp_path / "policy.toml").write_text("damping = 0.1\n")
    options = ["--calibration", text, "--policy", tmp_path / "policy.toml", "--budget", "12%"]
    made = run("create", "--base", base, "--tuned", after, "--out", out, "--task", "sums", *options)
    assert made.code == 0, made.err
    assert f"{out.stat().st_size:,} bytes of" in made.out and "peak memory" in made.out
    pack = SkillPack.load(out)
    assert (pack.task, pack.options["damping"], pack.options["budget"]) == ("sums", 0.1, "12%")
    checked = run("verify", out, "--base", base)
    assert checked.code == 0 and "is whole" in checked.out
    applied = run("apply", "--base", base, "--pack", out, "--out", tmp_path / "applied")
    assert applied.code == 0, applied.err
    again = run("create", "--base", base, "--tuned", tmp_path / "none", "--out", out)
    assert again.code == 1 and again.err.startswith("error: ") and "none" in again.err
    assert SkillPack.load(out).digest == pack.digest


def test_inspect_tells_the_error_of_every_tensor_and_role(nano, run: Call, tmp_path: Path) -> None:
    base, after, _ = nano
    out = tmp_path / "p.safetensors"
    create(base, after, out, budget="30%")
    done = run("inspect", out, "--base", base, "--tuned", after, "--json")
    found, pairing = json.loads(done.out), pair(Checkpoint(base), Checkpoint(after))
    pack, sums = SkillPack.load(out), {"mlp": [0.0, 0.0]}
    for row in found["tensors"]:
        delta = pairing.delta(row["tensor"])
        wrong = (delta - pack.delta(row["tensor"])).norm()
        assert row["error"] == pytest.approx(float(wrong / delta.norm()), abs=1e-3)
        if row["role"] == "mlp":
            sums["mlp"] = [
                a + float(b**2) for a, b in zip(sums["mlp"], (wrong, delta.norm()), strict=True)
            ]
    (mlp,) = (row for row in found["roles"] if row["role"] == "mlp")
    assert mlp["error"] == pytest.approx((sums["mlp"][0] / sums["mlp"][1]) ** 0.5, abs=1e-3)
    assert run("inspect", out, "--tuned", after).code == 1


KILLED = """
import os, signal
from cl_graft.cli import main
from cl_graft.skillpack.compress.work_store import Folder

def once(self, key, item, put=Folder.__setitem__):
    put(self, key, item)
    os.kill(os.getpid(), signal.SIGKILL)

Folder.__setitem__ = once
main()
"""


def test_a_killed_command_is_continued_by_the_same_command(nano, run: Call, tmp_path: Path) -> None:
    base, after, text = nano
    whole, out = tmp_path / "whole.safetensors", tmp_path / "killed.safetensors"
    words = ["create", "--base", base, "--tuned", after, "--calibration", text, "--out"]
    assert run(*words, whole).code == 0
    killed = [sys.executable, "-c", KILLED, "pack", *map(str, words), str(out)]
    process = subprocess.run(killed, stderr=subprocess.DEVNULL)
    assert process.returncode == -signal.SIGKILL
    assert not out.exists() and list(tmp_path.glob("killed*.work"))
    assert run(*words, out).code == 0
    assert out.read_bytes() == whole.read_bytes()
    assert not list(tmp_path.glob("*.work"))


def test_the_commands_of_the_readme(nano, run: Call, tmp_path: Path, monkeypatch) -> None:
    base, after, text = nano
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    block = next(b for b in re.findall(r"```bash\n(.*?)```", readme, re.S) if "pack remove" in b)
    monkeypatch.chdir(tmp_path)
    for source, name in ((base, "llama"), (after, "llama-math"), (text, "math.jsonl")):
        (tmp_path / name).symlink_to(source)
    create(base, after, tmp_path / "code.safetensors", budget="40%", method="graftllm")
    for line in block.strip().split("\n"):
        words = shlex.split(line.replace("--budget 5%", "--budget 40%"), comments=True)
        assert words[:2] == ["cl-graft", "pack"]
        found = run(*words[2:])
        assert found.code == 0, (line, found.err)


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["--method", "graftlm"], "did you mean graftllm"),
        (["--prefix", "none"], "no prefix named 'none'"),
        (["--budget", "ten"], "not a size"),
        (["--calibration", "gone.jsonl"], "gone.jsonl"),
    ],
)
def test_bad_options_are_one_sentence(nano, run: Call, tmp_path: Path, words, answer) -> None:
    base, after, _ = nano
    out = tmp_path / "x.safetensors"
    found = run("create", "--base", base, "--tuned", after, "--out", out, *words)
    assert_refused(found, answer)
