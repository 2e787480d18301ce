"""A torchvision that was built for another torch, as PyPI's is beside a torch without CUDA: said where it is met."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cl_graft.errors import TORCHVISION, TorchvisionMismatch, matched_torchvision
from tests.refusals import one_sentence

# what torchvision 0.28.0 for CUDA raises when it is imported beside torch 2.13.0 for the CPU
SAID = "operator torchvision::nms does not exist"
RUN = ["run", "--scenario", "mini", "--set", "mini.tasks=cipher", "--strategy", "lora"]


def test_a_run_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(f"raise RuntimeError({SAID!r})\n")
    there = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "cl_graft", *RUN, "--model", "nano-llama", "--wandb", "off"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": there},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert SAID in done.stderr and done.stderr.endswith(f"{TORCHVISION}.\n"), done.stderr


def test_other_failures_of_an_import_are_not_taken_for_it() -> None:
    with pytest.raises(RuntimeError, match="no luck"), matched_torchvision():
        raise RuntimeError("no luck")

    def broken() -> None:
        with matched_torchvision():
            raise RuntimeError(SAID)

    assert SAID in one_sentence(broken, TorchvisionMismatch)
