"""What libraries say to each other never reaches a user's terminal."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

LOUD = '''"""A scenario whose libraries are loud while it is made."""

import logging
import warnings

from cl_graft import plugins
from transformers.utils import logging as hf


def loud(seed=0, data_dir=None):
    """Warns in every way that libraries do."""
    for kind in (UserWarning, FutureWarning, DeprecationWarning, RuntimeWarning):
        warnings.warn("LOUD warning", kind, stacklevel=1)
    hf.get_logger("transformers.modeling_utils").warning("LOUD log")
    return plugins.load("scenario", "mini")(seed=seed, test_size=4, train_size=16, tasks="math")
'''


def validated(folder: Path, *flags: str) -> str:
    (folder / "loud.py").write_text(LOUD)
    (folder / "sweep.yaml").write_text(
        f"scenarios: [{folder / 'loud.py'}]\nstrategies: [lora]\nmodels: [nano-llama]\n"
    )
    done = subprocess.run(
        [sys.executable, *flags, "-m", "cl_graft", "validate", folder / "sweep.yaml"],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    assert "is valid: 1 cells" in done.stdout
    return done.stderr


def test_warnings_and_logs_of_libraries_stay_out_of_the_terminal(tmp_path: Path) -> None:
    assert validated(tmp_path) == ""


@pytest.mark.slow
def test_a_probe_of_real_stages_prints_nothing_but_its_plan(tmp_path: Path) -> None:
    """transformers 5 warns of `is_gradient_checkpointing` whenever a trainer looks at a model."""
    words = ("--scenarios", "mini", "--strategies", "lora", "--models", "nano-llama", "--probe")
    more = ("--set", "mini.tasks=math", "--set", "mini.steps=4", "--out", str(tmp_path / "out"))
    done = subprocess.run(
        [sys.executable, "-m", "cl_graft", "plan", *words, *more],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
