"""Which program an answer gives: its Python blocks, or its text as far as that is a program."""

from __future__ import annotations

import ast
import builtins
import re
import textwrap
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from cl_graft.evaluation.final_answer import without_thinking

_OPENS = re.compile(r"(?P<fence>`{3,}|~{3,})[ \t]*(?P<info>\{?[.\w][^`\n]*)?[ \t]*$")
_PYTHON = re.compile(r"(?:i?python|py)[\d.]*$")
# Where the body of a function that a prompt began ends: HumanEval's stop strings (Chen et al. 2021, arXiv 2107.03374).
_BODY_STOPS = re.compile(r"\n(?=class|def|#|if|print)")
# What ends a whole program that is not fenced: MBPP's stop strings in bigcode-evaluation-harness, but for "class".
_PROGRAM_STOPS = re.compile(r"\n(?=assert|\"\"\"|print|if|<\||```)")
# MBPP's own (Austin et al. 2021, arXiv 2108.07732).
_DONE = "[DONE]"
_STARTS = re.compile(r"^(?:async def|def|class|import|from|@)\b|^@", re.MULTILINE)


class Block(NamedTuple):
    """Fenced code, and the first word after the fence, in small letters."""

    language: str
    code: str


def program_of(answer: str, setup: str = "", tests: Sequence[str] = ()) -> str:
    """The program in an answer, without what the model thought.

    All Python blocks together, or else all blocks that name no language; without a block the text, from where a
    program begins to where it last parses and defines what the tests call. What begins indented is the body of the
    function that `setup` ends with, and goes on from there.
    """
    text = without_thinking(answer).split(_DONE, 1)[0].replace("\r\n", "\n").replace("\r", "\n")
    wanted = _wanted(tests, setup)
    fenced = [block for block in blocks(text) if block.code.strip()]
    python = [block.code for block in fenced if _PYTHON.match(block.language)]
    code = python or [block.code for block in fenced if not block.language]
    if not code or not (python or _is_in(code, text, wanted)):
        return _body(text, setup) if _indented(text) else _longest(text, wanted)
    program = _joined(code, wanted)
    if _indented(program):
        return _body(program, setup)
    return program if _parsed(program) else _longest(program, wanted)


def blocks(text: str) -> list[Block]:
    """Fenced blocks in their order, freed of the indentation of a list; the last one may be cut off."""
    found, opened, lines = [], None, list[str]()
    for line in text.split("\n"):
        if opened is None:
            start = _OPENS.search(line)
            if start and "`" not in line[: start.start()]:
                opened, lines = start, []
            continue
        inner, fence = line.rstrip(), opened["fence"]
        if inner.endswith(fence) and not inner.strip().strip(fence[0]):
            found.append(_block(opened, [*lines, ""]))
            opened = None
        elif inner.endswith(fence) and fence not in inner[: -len(fence)]:
            found.append(_block(opened, [*lines, inner[: -len(fence)]]))
            opened = None
        else:
            lines.append(line)
    return found + ([_block(opened, lines)] if opened else [])


def _block(opened: re.Match[str], lines: Sequence[str]) -> Block:
    words = re.findall(r"[\w+#-]+", opened["info"] or "")
    column = len(opened.string[: opened.start()])
    listed = bool(column) and not opened.string[:column].strip(" \t0123456789.)*+->")
    code = "\n".join(lines)
    # a fence that stands in a list has its code indented; one at the margin may hold a function's body
    return Block(words[0].lower() if words else "", textwrap.dedent(code) if listed else code)


def _is_in(code: Sequence[str], text: str, wanted: frozenset[str]) -> bool:
    """Whether blocks of no language hold the program; else a fence only ends it, and it stands before the fence."""
    before = text.split("```", 1)[0]
    ended = _indented(before) or _defines(before, wanted)
    return not ended or any(_defines(block, wanted) for block in code)


def _joined(fenced: Sequence[str], wanted: frozenset[str]) -> str:
    """The blocks as one program, without those that only use what another one defines."""
    defining = [bool(wanted and _defines(code, wanted)) for code in fenced]
    if len(fenced) == 1 or _indented(fenced[0]):
        return fenced[0]
    # one that uses the function and defines it not is an example of its use
    kept = [
        code
        for code, defines in zip(fenced, defining, strict=True)
        if defines or (_adds(code) and not (any(defining) and _uses(code, wanted)))
    ]
    return "\n".join(kept or fenced[:1])


def _body(body: str, setup: str) -> str:
    """The function that `setup` begins with this body, cut where the body ends."""
    lines = _BODY_STOPS.split(body, maxsplit=1)[0].split("\n")
    for end in range(len(lines), 0, -1):
        program = setup + "\n".join(lines[:end])
        if "".join(lines[:end]).strip() and _parsed(program):
            return program
    return setup + body


def _longest(text: str, wanted: frozenset[str]) -> str:
    """What of a text is the program; all of it where no part defines what is called."""
    if not wanted or not all(name in text for name in wanted):
        return text
    for start in [0, *(match.start() for match in _STARTS.finditer(text))]:
        rest = text[start:]
        stops = [match.start() for match in _PROGRAM_STOPS.finditer(rest)]
        lines = [match.start() for match in re.finditer(r"\n|\Z", rest)]
        for end in [*stops, *reversed(lines)]:
            if _defines(rest[:end], wanted):
                return rest[:end]
    return text


def _indented(program: str) -> bool:
    first = next((line for line in program.split("\n") if line.strip()), "")
    return first[:1].isspace()


def _parsed(program: str) -> ast.Module | None:
    try:
        return ast.parse(program)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _defined(tree: ast.Module) -> Iterator[str]:
    """The names that a program binds at its top."""
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from ((name.asname or name.name).partition(".")[0] for name in node.names)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            yield from (n.id for n in ast.walk(node) if isinstance(n, ast.Name) and _stored(n))


def _stored(node: ast.Name) -> bool:
    return isinstance(node.ctx, ast.Store)


def _defines(program: str, wanted: frozenset[str]) -> bool:
    tree = _parsed(program)
    return tree is not None and bool(tree.body) and wanted <= set(_defined(tree))


def _adds(program: str) -> bool:
    tree = _parsed(program)
    return tree is not None and any(True for _ in _defined(tree))


def _uses(program: str, wanted: frozenset[str]) -> bool:
    tree = _parsed(program)
    return tree is not None and any(
        isinstance(n, ast.Name) and n.id in wanted for n in ast.walk(tree)
    )


def _wanted(tests: Sequence[str], setup: str) -> frozenset[str]:
    """The names that tests use and neither they nor `setup` define; a function without a body is not defined."""
    trees = [tree for tree in map(_parsed, tests) if tree]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    used = {node.id for node in nodes if isinstance(node, ast.Name)}
    own = {node.id for node in nodes if isinstance(node, ast.Name) and _stored(node)}
    own |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    own |= {name for tree in trees for name in _defined(tree)}
    begun = _parsed(setup)
    if begun and begun.body and _is_empty(begun.body[-1]):
        begun.body.pop()
    given = set(_defined(begun)) if begun else set()
    return frozenset(used - own - given - set(dir(builtins)))


def _is_empty(node: ast.stmt) -> bool:
    """Whether it is a function that says nothing but its docstring."""
    return isinstance(node, ast.FunctionDef) and all(
        isinstance(s, (ast.Expr, ast.Pass)) for s in node.body
    )
