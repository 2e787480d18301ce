"""Docstrings that stand alone: each begins with a verb or a noun, and needs nothing above it to be understood."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(
    file
    for folder in ("cl_graft", "scenarios", "baselines")
    for file in (ROOT / folder).rglob("*.py")
)

# What leans on the name above: a preposition, a conjunction of time or cause, a pronoun, a participle, "the same".
LEANING = {
    *("of", "as", "in", "at", "by", "with", "for", "to", "from", "on", "under", "within"),
    *("after", "before", "until", "when", "while", "since", "than", "so", "if", "without"),
    *("these", "those", "this", "that", "such", "it", "its", "they", "them", "their", "he", "she"),
    *("held", "told", "left", "taken", "given", "made", "called", "none", "not", "also", "there"),
}
OF_WHAT_IS_ABOVE = {("the", word) for word in ("same", "other", "others", "rest", "like")}


def docstrings(tree: ast.AST) -> Iterator[tuple[str, str]]:
    for node in ast.walk(tree):
        named = isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if (named or isinstance(node, ast.Module)) and (text := ast.get_docstring(node)):
            yield getattr(node, "name", "the module"), text


def leans(text: str) -> bool:
    words = [word.strip("`,.:;()").lower() for word in re.split(r"\s+", text)[:2]]
    return words[0] in LEANING or tuple(words) in OF_WHAT_IS_ABOVE


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_docstrings_begin_with_a_verb_or_a_noun(file: Path) -> None:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    found = [f"{name}: {text.splitlines()[0]}" for name, text in docstrings(tree) if leans(text)]
    assert not found, f"say first what it does or what it is: {found}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("By KINDS.", True),
        ("The same, never going back.", True),
        ("Of the processes: this one's.", True),
        ("`path` is held while it is made.", False),
        ("Whether a process holds the lock.", False),
        ("The shape of a parameter.", False),
    ],
)
def test_the_rule(text: str, expected: bool) -> None:
    assert leans(text) is expected
