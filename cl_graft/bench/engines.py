"""The pack engine of one checkout, as its users run it: a pack by its own command, decoded by its own code.

So two checkouts need not agree on a format: what comes back is the delta, a float32 safetensors file.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from cl_graft.bench.deltas import CALIBRATION, Delta
from cl_graft.bench.size import bytes_over_entropy
from cl_graft.errors import CLGraftError
from cl_graft.store.digests import digest

HERE = Path(__file__).parents[2]
DECODE = """
import sys
from time import process_time
from safetensors.torch import save_file
from cl_graft import SkillPack

pack = SkillPack.load(sys.argv[1])
begun = process_time()
deltas = {name: pack.delta(name).float().contiguous() for name in pack.tensors}
seconds = process_time() - begun
save_file(deltas, sys.argv[2])
print(seconds)
"""


@dataclass(frozen=True)
class Made:
    """An approximation of a delta. bytes: on disk. make, apply: processor seconds, of which `apply` decodes all of it.

    deltas: {tensor: float32}; what is not there is zero. entropy: bytes at the measured entropy of its whole numbers,
    where this code reads the file.
    """

    bytes: int
    make: float
    apply: float | None
    deltas: dict[str, Tensor]
    entropy: int | None = None

    @property
    def about(self) -> dict[str, Any]:
        return {
            "bytes": self.bytes,
            "make_seconds": self.make,
            "apply_seconds": self.apply,
            "entropy_bytes": self.entropy,
        }


@dataclass(frozen=True)
class Engine:
    """A checkout of this project. Raises CLGraftError for a folder that is none."""

    name: str
    folder: Path

    def __post_init__(self) -> None:
        if not (self.folder / "cl_graft" / "skillpack").is_dir():
            raise CLGraftError(
                f"{self.folder} is no checkout of the source; make one of the earlier commit by "
                "`git worktree add FOLDER COMMIT`."
            )

    @cached_property
    def digest(self) -> str:
        """Digest of the code that packs are made by."""
        files = sorted((self.folder / "cl_graft" / "skillpack").rglob("*.py"))
        return digest([[str(f.relative_to(self.folder)), f.read_text("utf-8")] for f in files])

    def make(self, delta: Delta, budget: str, place: Path) -> Made:
        """The pack of a delta within a budget, in the folder `place`; calibrated. `make` is with Python's own start."""
        calibration, out = delta.calibration(place / "calibration.jsonl"), place / "made.pack"
        words = ["pack", "create", "--base", delta.base, "--tuned", delta.tuned, "--out", out]
        text = [
            "--calibration",
            calibration,
            "--samples",
            CALIBRATION,
            "--length",
            delta.max_length,
        ]
        before = _spent()
        self._run("-m", "cl_graft", *words, "--budget", budget, *text)
        made = _spent() - before
        told = self._run("-c", DECODE, out, place / "deltas.safetensors")
        return Made(
            out.stat().st_size,
            made,
            float(told.splitlines()[-1]),
            load_file(place / "deltas.safetensors"),
            bytes_over_entropy(out)["entropy_bytes"] if self.folder == HERE else None,
        )

    def _run(self, *words: Any) -> str:
        """Standard output of Python in this checkout. Raises CLGraftError with what it said where it failed."""
        threads = str(torch.get_num_threads())
        environment = os.environ | {"PYTHONPATH": str(self.folder), "OMP_NUM_THREADS": threads}
        done = subprocess.run(
            [sys.executable, *map(str, words)],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1].rstrip(".")
            raise CLGraftError(f"the engine in {self.folder} failed: {said}.")
        return done.stdout


def this_engine() -> Engine:
    """The engine of the checkout that this code runs in."""
    return Engine("this", HERE)


def _spent() -> float:
    """Processor seconds of the processes that this one has started and waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
