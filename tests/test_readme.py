"""The README's own listings are run as they stand."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import published_table

README = Path(__file__).parent.parent / "README.md"
SMALL = [
    "--model",
    "nano-llama",
    "--wandb",
    "off",
    "--set",
    "mini.steps=6",
    "--set",
    "mini.train_size=48",
]


def listing(containing: str) -> str:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    (block,) = [b for b in blocks if containing in b]
    return block


def test_the_table_has_the_published_figures() -> None:
    """And a figure of its own is put right: the table is what `make readme` makes of it."""
    text = README.read_text(encoding="utf-8")
    tables = published_table.TABLE.findall(text)
    assert "".join(table for *_, table in tables).count("±") > 50
    assert len(tables) == text.count("<!-- table of") and published_table.written(text) == text
    wrong = text.replace("| ewc | ", "| ewc | 99.9 ± 0.1 | ", 1)
    assert published_table.written(wrong) == text != wrong


def test_the_baseline_listing_is_under_40_lines_and_runs_from_a_path(tmp_path):
    text = listing("def signs")
    assert len(text.strip().split("\n")) < 40
    (tmp_path / "signs.py").write_text(text)
    command = [
        sys.executable,
        "-m",
        "cl_graft",
        "run",
        "--scenario",
        "mini",
        "--strategy",
        "./signs.py",
    ]
    command += [
        *SMALL,
        "--set",
        "mini.test_size=8",
        "--set",
        "signs.norms=false",
        "--allow-code-execution",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    packs = sorted(tmp_path.glob("results/*/packs/*.safetensors"))
    assert [p.stem for p in packs] == ["01-math", "02-code", "03-cipher"]
    from cl_graft import SkillPack

    assert {e.codec for e in SkillPack.load(packs[0]).tensors.values()} == {"sign_scale"}


def test_the_python_listing_has_ten_lines_at_most_and_runs(tmp_path):
    text = listing("cl_graft.run(")
    assert len(text.strip().split("\n")) <= 10
    done = subprocess.run(
        [sys.executable, "-c", text],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "WANDB_MODE": "disabled"},
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 3


@pytest.mark.parametrize(
    "line",
    re.findall(
        r"^cl-graft (?:list|report|pack|run|sweep|init|doctor|plan|cache|compare|bench|transfer).*$",
        README.read_text(),
        re.M,
    ),
)
def test_every_command_line_of_the_readme_parses(line):
    """Options and commands exist: `--help` after the command is answered without an error."""
    words = line.split("#")[0].split()
    command = words[1:3] if words[1] in ("pack", "cache", "transfer", "bench") else words[1:2]
    done = subprocess.run(
        [sys.executable, "-m", "cl_graft", *command, "--help"],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "200"},  # so that no option's name is cut
    )
    assert done.returncode == 0
    for option in (w for w in words if w.startswith("--")):
        assert option in done.stdout, option


def test_the_make_targets_named_exist():
    makefile = (README.parent / "Makefile").read_text()
    for target in re.findall(r"^make (\S+)", README.read_text(), re.M):
        assert re.search(rf"^{target}:", makefile, re.M), target
