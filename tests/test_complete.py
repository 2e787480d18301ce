"""What the shell offers when Tab is pressed."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from cl_graft import plugins
from cl_graft.cli import complete
from cl_graft.models.embedded import SPECS
from cl_graft.models.published import PUBLISHED

START = """
import sys
sys.argv = ["cl-graft"]
from cl_graft.cli import main
try:
    main()
finally:
    heavy = [m for m in ("torch", "transformers", "wandb", "rich") if m in sys.modules]
    print(heavy, file=sys.stderr)
"""


def offered(*words: str) -> list[str]:
    """By bash, at the end of these words."""
    asked = {"COMP_WORDS": " ".join(words), "COMP_CWORD": str(len(words) - 1)}
    done = subprocess.run(
        [sys.executable, "-c", START],
        capture_output=True,
        text=True,
        env={**os.environ, "_CL_GRAFT_COMPLETE": "complete_bash", **asked},
    )
    assert done.stderr.splitlines()[-1] == "[]", done.stderr
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (("cl-graft", "run", "--strategy", "graf"), ["graftllm", "graftllm_adaptive"]),
        (("cl-graft", "sweep", "--strategies", "lora,ti"), ["lora,ties"]),
        (("cl-graft", "plan", "--scenarios", "math"), ["math_code", "math_then_code"]),
        (("cl-graft", "sweep", "--models", "nano"), ["nano-llama", "nano-gpt2"]),
        (("cl-graft", "list", "st"), ["strategies"]),
        (("cl-graft", "doc"), ["doctor"]),
        (("cl-graft", "plan", "--task-ids", "given,"), ["given,inferred"]),
        (("cl-graft", "run", "--track", "csv,"), ["csv,tensorboard"]),
        (("cl-graft", "pack", "ins"), ["inspect"]),
    ],
)
def test_bash_is_offered_real_names_and_nothing_heavy_is_imported(
    words: tuple[str, ...], wanted: list[str]
) -> None:
    assert offered(*words) == wanted


def test_nothing_typed_is_answered_with_everything() -> None:
    assert [n for n, _ in complete.strategies("")] == plugins.names("strategy")
    assert [n for n, _ in complete.scenario("")] == plugins.names("scenario")
    assert [n for n, _ in complete.models("")] == [*SPECS, *PUBLISHED]
    assert all(about for _, about in complete.strategies(""))


def test_a_name_is_offered_once_in_a_list() -> None:
    names = [name for name, _ in complete.strategies("lora,graftllm,")]
    assert "lora,graftllm,ties" in names
    assert not [name for name in names if name.endswith((",lora", ",graftllm"))]
