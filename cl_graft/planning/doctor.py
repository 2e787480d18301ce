"""What this machine has of what runs need: packages, GPUs, compiler, W&B, sandbox, disk. Nothing is changed."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from cl_graft.errors import TORCHVISION, CLGraftError

State = Literal["ok", "weak", "missing"]
ROOM = 5e9  # bytes free below which the disk is said to be short
EXTRAS = {
    "gptq": "the solver that ours is tested against, on Python 3.11 alone",
    "deepspeed": "stages of several processes (--launch)",
    "ray": "sweeps on a cluster (executor: ray)",
    "vllm": "faster sampling (transfer build --backend vllm)",
    "lm-eval": "tasks of lm-evaluation-harness (--general hellaswag)",
    "gguf": "adapters of llama.cpp (pack export --to gguf), and packs of GGUF models",
    "docs": "building the documentation (make docs)",
}


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    said: what was found. cure: what to do, in a few words. needed: nothing runs without it.
    """

    what: str
    state: State
    said: str
    cure: str = ""
    needed: bool = False


def examine(out: Path) -> list[Finding]:
    """Everything, in the order in which it is shown. out: where results are going to be written."""
    from cl_graft.models.embedded import cache_root

    checks: list[Callable[[], Iterator[Finding]]] = [
        _python,
        _packages,
        _imports,
        _gpus,
        _bfloat16,
        _wandb,
        _sandbox,
        lambda: _disk("results folder", out),
        lambda: _disk("model cache", cache_root()),
        _cores,
    ]
    return [finding for check in checks for finding in check()]


def sound(findings: list[Finding]) -> bool:
    """Whether all is there that every run needs."""
    return not any(f.needed and f.state == "missing" for f in findings)


def _python() -> Iterator[Finding]:
    old = sys.version_info < (3, 11)
    cure = "install Python 3.11 or newer" if old else ""
    yield Finding("Python", "missing" if old else "ok", platform.python_version(), cure, True)


def _packages() -> Iterator[Finding]:
    """What the package itself asks for, and then the extras that add to what it can do."""
    from packaging.requirements import Requirement

    asked = [Requirement(text) for text in metadata.requires("cl-graft") or []]
    for extra in ("", *EXTRAS):
        for requirement in asked:
            marker = requirement.marker
            of_extra = marker is not None and "extra" in str(marker)
            if of_extra == bool(extra) and (marker is None or marker.evaluate({"extra": extra})):
                yield _package(requirement.name, requirement.specifier, extra)


def _package(name: str, wanted: object, extra: str) -> Finding:
    install = f"pip install 'cl-graft[{extra}]', for {EXTRAS[extra]}" if extra else "make env"
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Finding(name, "missing", "not installed", install, needed=not extra)
    if not wanted.contains(version, prereleases=True):  # type: ignore[attr-defined]
        return Finding(name, "weak", f"{version}, not {wanted}", install)
    return Finding(name, "ok", version)


def _imports() -> Iterator[Finding]:
    """An installed library may still not load, as a torchvision that was built for another torch."""
    # Avalanche before TRL: it is what names a torchvision that does not fit
    for module in ("torch", "cl_graft.stream", "trl", "cl_graft.strategy"):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of libraries to each other
                importlib.import_module(module)
        except Exception as error:  # each library fails in its own way
            reason = f"{type(error).__name__}: {error}".split("\n", 1)[0]
            cure = TORCHVISION if "torchvision" in reason else "make env"
            yield Finding(f"import of {module}", "missing", reason, cure, needed=True)
            return
    yield Finding("imports", "ok", "all that a run needs can be imported")


def _gpus() -> Iterator[Finding]:
    try:
        import torch
    except Exception:  # told above
        return
    for number in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(number)
        yield Finding(f"GPU {number}", "ok", f"{about.name}, {about.total_memory / 2**30:.0f} GiB")
    if torch.cuda.device_count():
        yield from _compiler()
    else:
        cure = "fine for the embedded models; for others, a CUDA device and the torch built for it"
        yield Finding("GPU", "weak", "none that torch sees; everything runs on the CPU", cure)


def _bfloat16() -> Iterator[Finding]:
    """Torch computes in bfloat16 on every processor: without instructions for it a product took 49 times as long."""
    try:
        from torch import cpu

        can = cpu.get_capabilities()
    except Exception:  # told above
        return
    has = [name for name in ("avx512_bf16", "amx_bf16", "bf16") if can.get(name)]
    if has:
        said = f"the processor multiplies it ({', '.join(has)}); stages on a CPU are in float32"
        yield Finding("bfloat16", "ok", said)
        return
    cure = "keep models and training in float32 on the CPU, as CL-Graft does by itself"
    yield Finding("bfloat16", "weak", "emulated by this processor, many times slower", cure)


def _compiler() -> Iterator[Finding]:
    """What DeepSpeed may compile parts of itself with, on GPUs; on a CPU nothing of it is compiled."""
    compiler = next(
        filter(None, map(shutil.which, (os.environ.get("CXX", ""), "c++", "g++"))), None
    )
    for what, path in (("C++ compiler", compiler), ("ninja", shutil.which("ninja"))):
        if path:
            yield Finding(what, "ok", path)
        else:
            cure = "install it and have it on PATH, for DeepSpeed (--launch)"
            yield Finding(what, "missing", "not on PATH", cure)


def _wandb() -> Iterator[Finding]:
    from cl_graft.tracking.wandb import resolve

    mode = resolve("auto")
    cure = {"offline": "`wandb login`, to see runs as they go", "off": "unset WANDB_MODE"}.get(
        mode, ""
    )
    said = {"online": "logged in", "offline": "not logged in: runs are kept offline"}
    yield Finding("W&B", "weak" if cure else "ok", said.get(mode, "switched off"), cure)


def _sandbox() -> Iterator[Finding]:
    """The walls of docs/sandbox.md in four questions; a weak answer names the walls that are not there."""
    from cl_graft.evaluation.sandbox import strength

    try:
        walls = strength()
    except CLGraftError as error:
        cure = "scenarios with programs cannot be scored here"
        yield Finding("sandbox", "missing", str(error).rstrip("."), cure)
        return
    asked = {
        "files of others": ("private_files", "own_user", "landlock"),
        "network": ("network_cut",),
        "other processes": ("signals_kept_in",),
        "limits": ("memory_limit", "process_limit"),
    }
    for what, any_of in asked.items():
        has = [wall for wall in any_of if walls.get(wall)]
        held = len(has) == len(any_of) if what == "limits" else bool(has)
        said = (
            ", ".join(has) if held else f"no {' and no '.join(w for w in any_of if w not in has)}"
        )
        cure = (
            ""
            if held
            else "allow user namespaces, or use a throw-away machine; see docs/sandbox.md"
        )
        yield Finding(f"sandbox: {what}", "ok" if held else "weak", said, cure)


def _disk(what: str, folder: Path) -> Iterator[Finding]:
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    if not (there.is_dir() and os.access(there, os.W_OK)):
        cure = "choose another --out" if what.startswith("results") else "set CL_GRAFT_CACHE"
        yield Finding(what, "missing", f"{there} cannot be written", cure, needed=True)
        return
    free = shutil.disk_usage(there).free
    short = free < ROOM
    cure = "free some; `cl-graft plan` says what a sweep takes" if short else ""
    yield Finding(what, "weak" if short else "ok", f"{folder}, {free / 1e9:.0f} GB free", cure)


def _cores() -> Iterator[Finding]:
    from cl_graft.experiment.executors.local import default_workers

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    said = f"{os.cpu_count()}, {memory:.0f} GiB of memory; a sweep runs {default_workers(1)} cells at a time"
    yield Finding("cores", "ok", said)
