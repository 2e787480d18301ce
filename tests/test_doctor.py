"""`cl-graft doctor`: what it finds here, and what it says of a machine that lacks something."""

from __future__ import annotations

import importlib
import json
import os
from collections import namedtuple
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

from cl_graft.evaluation import sandbox
from cl_graft.planning import doctor
from cl_graft.planning.doctor import Finding, examine, sound
from tests.command import Call


def found(what: str, out: Path = Path("results")) -> Finding:
    (one,) = [f for f in examine(out) if f.what == what]
    return one


def test_this_machine_is_sound(call: Call) -> None:
    done = call("doctor")
    assert (done.code, done.err) == (0, "")
    states = {line.split()[0] for line in done.out.splitlines()}
    assert states <= {"ok", "weak", "missing"}
    for what in ("Python", "torch", "GPU", "W&B", "sandbox: network", "cores"):
        assert f" {what}" in done.out


def test_every_line_that_is_not_ok_names_a_cure(tmp_path: Path) -> None:
    findings = examine(tmp_path)
    assert all(f.cure for f in findings if f.state != "ok")
    assert all("\n" not in f.said + f.cure for f in findings)
    assert not [f for f in findings if f.state == "ok" and f.cure]


def test_json_says_the_same(call: Call) -> None:
    done = call("doctor", "--json")
    told = json.loads(done.out)
    assert told["sound"] is True
    assert [f["what"] for f in told["findings"]] == [f.what for f in examine(Path("results"))]


def test_what_every_run_needs_is_an_exit_code(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    version = metadata.version

    def without(name: str) -> str:
        if name in ("peft", "deepspeed"):
            raise metadata.PackageNotFoundError(name)
        return "0.1" if name == "trl" else version(name)

    examine(Path("results"))  # libraries ask for versions while they are imported
    monkeypatch.setattr(metadata, "version", without)
    done = call("doctor")
    assert done.code == 1
    lines = {line.split()[1]: line for line in done.out.splitlines()}
    assert lines["peft"].startswith("missing") and lines["peft"].endswith("(make env)")
    assert lines["trl"].startswith("weak") and "0.1, not >=" in lines["trl"]
    assert "cl-graft[deepspeed]" in lines["deepspeed"]


def test_a_library_that_does_not_load_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        if name == "cl_graft.strategy":
            raise RuntimeError("operator torchvision::nms does not exist\nand more")

    monkeypatch.setattr(importlib, "import_module", broken)
    one = found("import of cl_graft.strategy")
    assert one.said == "RuntimeError: operator torchvision::nms does not exist"
    assert "pip install --no-deps torchvision==0.16.2" in one.cure
    assert one.needed and not sound(examine(Path("results")))


def test_an_extra_is_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = Finding("ray", "missing", "not installed", "install it")
    assert sound([missing]) and not sound([missing, Finding("torch", "missing", "", "", True)])


def test_a_folder_that_cannot_be_written_is_missing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    one = found("results folder", tmp_path / "file" / "results")
    assert (one.state, one.needed) == ("missing", True)


def test_a_disk_that_is_nearly_full_is_weak(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage(10**12, 10**12, 10**9))
    one = found("results folder", tmp_path / "new" / "results")
    assert one.state == "weak" and "1 GB free" in one.said and not list(tmp_path.iterdir())


def test_a_processor_that_emulates_bfloat16_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"avx512_bf16": True})
    (own,) = doctor._bfloat16()
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"avx512_f": True})
    (emulated,) = doctor._bfloat16()
    assert own.state == "ok" and "avx512_bf16" in own.said
    assert emulated.state == "weak" and "float32" in emulated.cure and not emulated.needed


def test_the_sandbox_without_walls_is_weak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "strength", lambda: {"landlock": True, "memory_limit": True})
    states = {f.what: f for f in examine(Path("results")) if f.what.startswith("sandbox")}
    assert states["sandbox: files of others"].state == "ok"
    assert states["sandbox: network"].said == "no network_cut"
    assert states["sandbox: limits"].said == "no process_limit"


def test_a_sandbox_that_cannot_start_is_no_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused() -> None:
        raise sandbox.SandboxError("the sandbox needs Linux or macOS.")

    monkeypatch.setattr(sandbox, "strength", refused)
    one = found("sandbox")
    assert (one.state, one.needed) == ("missing", False)


@pytest.mark.parametrize(
    ("mode", "key", "state"),
    [("offline", "", "weak"), ("disabled", "", "weak"), ("", "x" * 40, "ok")],
)
def test_wandb_as_runs_decide_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, mode: str, key: str, state: str
) -> None:
    for name, value in (("WANDB_MODE", mode), ("WANDB_API_KEY", key)):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("NETRC", os.fspath(tmp_path / "none"))
    assert found("W&B").state == state


def test_a_compiler_is_asked_for_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    about = SimpleNamespace(name="a GPU", total_memory=2**30)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda number: about)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    findings = {f.what: f.state for f in doctor._gpus()}
    assert findings == {"GPU 0": "ok", "C++ compiler": "missing", "ninja": "missing"}
