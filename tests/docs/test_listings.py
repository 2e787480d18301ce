"""What the tutorials tell a reader to type is typed here, page by page, in an empty folder."""

from __future__ import annotations

import ast
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.command import Call

DOCS = Path(__file__).parents[2] / "docs"
BLOCK = re.compile(r"(?:<!-- (.*?) -->\n)?^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: str) -> Iterator[tuple[str, str, str]]:
    """(mark above it, language, text) of each block."""
    yield from BLOCK.findall((DOCS / page).read_text("utf-8"))


def words(line: str) -> list[str]:
    """As a shell gives them: quotes, comments, patterns of files."""
    found = []
    for word in shlex.split(line, comments=True):
        files = sorted(map(str, Path().glob(word))) if "*" in word else []
        found += files or [word]
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    [
        "first-sweep.md",
        "adding-a-baseline.md",
        "adding-a-scenario.md",
        "adding-a-scorer.md",
        "adding-a-router.md",
    ],
)
def test_the_page_can_be_followed(
    page: str, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    said, ran = "", 0
    for mark, language, text in blocks(page):
        if mark.startswith("file: "):
            Path(mark.removeprefix("file: ")).write_text(text, encoding="utf-8")
        elif mark == "output":
            assert set(text.splitlines()) <= set(said.splitlines()), said
        elif language == "bash":
            said = ""
            for line in text.replace("\\\n", " ").splitlines():
                program, *rest = words(line)
                assert program == "cl-graft", line
                done = call(*rest)
                assert done.code == 0, f"{line}\n{done.err}"
                said, ran = said + done.out, ran + 1
    assert ran >= 2


@pytest.mark.slow
def test_the_notebook_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As Jupyter runs it: what a cell's last line comes to is shown, as a picture if it is one."""
    monkeypatch.chdir(tmp_path)
    cells = json.loads((DOCS / "quickstart.ipynb").read_text("utf-8"))["cells"]
    assert len(cells) <= 10 and not [c for c in cells if c.get("outputs")]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    names: dict[str, Any] = {}
    shown = []
    for text in code:
        lines = ast.parse(text)
        last = lines.body.pop() if isinstance(lines.body[-1], ast.Expr) else None
        exec(compile(lines, "cell", "exec"), names)
        if isinstance(last, ast.Expr):
            shown.append(eval(compile(ast.Expression(last.value), "cell", "eval"), names))
    said = capsys.readouterr().out
    assert re.search(r"^graftllm +OP \d\.\d+ .*^sequential +OP", said, re.M | re.S)
    assert "quantized_low_rank" in said
    (picture,) = (value for value in shown if hasattr(value, "_repr_png_"))
    assert picture._repr_png_()[:4] == b"\x89PNG"
