"""What a cell's numbers depend on beside its config: data, versions, machine."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import resource
import sys
from contextlib import suppress
from dataclasses import asdict
from functools import cache
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from cl_graft.task import Example, Pair, Scenario, Task
from cl_graft.version import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def digest(*parts: Any) -> str:
    """BLAKE2b, 32 hex digits, of JSON values."""
    hashed = hashlib.blake2b(digest_size=16)
    for part in parts:
        hashed.update(json.dumps(part, sort_keys=True).encode() + b"\0")
    return hashed.hexdigest()


@cache
def code_digest(*modules: ModuleType) -> str:
    """Digest of the source files of these modules: what was computed by other code is another thing."""
    hashed = hashlib.blake2b(digest_size=16)
    for module in modules:
        hashed.update(Path(str(module.__file__)).read_bytes())
    return hashed.hexdigest()


@cache
def package_digest() -> str:
    """Digest of this package's source, which tells two working copies of one version apart."""
    hashed = hashlib.blake2b(digest_size=8)
    root = Path(__file__).parents[1]
    for file in sorted(root.rglob("*.py")):
        hashed.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes())
    return hashed.hexdigest()


def vocabulary(tokenizer: PreTrainedTokenizerBase) -> str:
    """Digest of which token has which id, and of which one ends an answer where that is not the tokenizer's own."""
    tokens = sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    own, end = str(tokenizer.init_kwargs.get("eos_token")), str(tokenizer.eos_token)
    return digest(tokens) if own == end else digest(tokens, end)


def place() -> str:
    """The kind of device and, on a CPU, the number of threads, on which the last digits of sums depend."""
    import torch

    return "cuda" if torch.cuda.is_available() else f"cpu, {torch.get_num_threads()} threads"


def data_fingerprint(scenario: Scenario) -> str:
    """Digest of every example, recipe and scorer's options of the scenario."""
    digest = hashlib.blake2b(digest_size=16)

    def add(task: Task) -> None:
        recipe = asdict(task.training)
        # cells and presets from before there was the choice are of the same data
        if not recipe["freeze_embeddings"]:
            del recipe["freeze_embeddings"]
        about: list[Any] = [task.name, task.metrics, recipe]
        if any(scoring.options for scoring in task.scorings):
            about.append([dict(scoring.options) for scoring in task.scorings])
        if task.logits:
            about.append(task.logits.digest)
        digest.update(json.dumps(about).encode())
        items: list[Example | Pair] = [*task.train, *task.test, *task.pairs]
        for item in (*items, *task.validation):
            digest.update(json.dumps(asdict(item)).encode())
        digest.update(json.dumps([len(task.train), len(task.validation)]).encode())

    for task in scenario.examined:
        add(task)
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Versions that a result depends on."""
    names = ("torch", "transformers", "trl", "peft", "avalanche-lib", "safetensors", "math-verify")
    return {
        "cl_graft": __version__,
        "python": platform.python_version(),
        **{name: _installed(name) for name in names},
    }


@cache  # reads a file
def _installed(name: str) -> str:
    return metadata.version(name)


def machine() -> dict[str, str]:
    """What the times of a cell depend on."""
    import torch

    lines = Path("/proc/cpuinfo").read_text().split("\n") if Path("/proc/cpuinfo").is_file() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    about = {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": models[0] if models else platform.processor() or "unknown",
        "cores": str(os.cpu_count()),
        "threads a run": str(torch.get_num_threads()),
    }
    if torch.cuda.is_available():
        about["gpu"] = torch.cuda.get_device_name()
    return about


def peak_memory_mb() -> float:
    """Peak resident memory of this process so far, in MiB."""
    with suppress(OSError):
        return resident_bytes("VmHWM") / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1024 * 1024 if sys.platform == "darwin" else 1024)


def resident_bytes(key: str) -> int:
    """Memory of this process, now (VmRSS) or at most (VmHWM), from Linux: its getrusage carries over the parent's peak.

    Raises OSError on other systems.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")


def forget_peak_memory() -> None:
    """Count the peak from here on, where the system can: proc(5), clear_refs."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
