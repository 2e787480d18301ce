"""What docs/architecture.md says of the tree is so: the rooms, and which of them may import which."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
FLOORS = [
    line.split(" | ")
    for line in re.search(r"```text\n(.*?)```", PAGE, re.DOTALL)[1].split("\n")
    if line
]
LEVEL = {room: len(FLOORS) - number for number, rooms in enumerate(FLOORS) for room in rooms}
WITHIN = [
    "memory",
    "threads",
    "compiled",
    "rounding",
    "codecs",
    "format",
    "folders",
    "compress",
    "live",
    "tools",
]  # of skillpack, from the ground up
FILES = sorted((ROOT / "cl_graft").rglob("*.py"))


def name_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(file): file for file in FILES}


def imports(file: Path, at_start: bool = False) -> Iterator[str]:
    """Modules of the package that a file imports, wherever in it; `at_start`: when it is itself imported."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        for child in ast.iter_child_nodes(node):
            child.above = [*getattr(node, "above", []), node]  # type: ignore[attr-defined]
    for node in ast.walk(tree):
        above = getattr(node, "above", [])
        late = any(isinstance(a, ast.FunctionDef | ast.AsyncFunctionDef) for a in above)
        typing = any(isinstance(a, ast.If) and "TYPE_CHECKING" in ast.dump(a.test) for a in above)
        if at_start and (late or typing):
            continue
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: imports are spelled out"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in MODULES else str(node.module)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def room(module: str) -> str:
    return module.split(".")[1]


def test_every_room_and_file_of_the_first_level_is_on_the_page():
    first = {
        p.stem
        for p in (ROOT / "cl_graft").iterdir()
        if p.suffix == ".py" or (p / "__init__.py").is_file()
    }
    assert first - {"__init__", "__main__"} == set(LEVEL)
    for name in first - {"__init__", "__main__"}:
        assert f"{name}/`" in PAGE or f"{name}.py`" in PAGE, f"{name} has no line in the tree"


@pytest.mark.parametrize("module", [m for m in MODULES if m.count(".") and room(m) in LEVEL])
def test_a_module_imports_from_its_own_room_or_from_below(module):
    for other in imports(MODULES[module]):
        if other.startswith("cl_graft.") and room(other) != room(module):
            assert LEVEL[room(other)] < LEVEL[room(module)], f"{module} imports {other}"


def test_the_pack_library_could_be_lifted_out():
    for module, file in MODULES.items():
        if not module.startswith("cl_graft.skillpack."):
            continue
        place = WITHIN.index(module.split(".")[2])
        for other in imports(file):
            if other.startswith("cl_graft.skillpack."):
                assert WITHIN.index(other.split(".")[2]) <= place, f"{module} imports {other}"
            elif other.startswith("cl_graft."):
                assert room(other) in ("models", "budget", "errors", "atomic", "version"), (
                    f"{module} imports {other}"
                )


def test_no_module_is_imported_by_what_it_imports():
    graph = {
        module: {o for o in imports(file, True) if o in MODULES} - {module}
        for module, file in MODULES.items()
    }
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path, module))
        if module not in done:
            for other in graph[module]:
                if not module.startswith(f"{other}."):  # a package is there before what is in it
                    visit(other, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize(
    "file", sorted([*(ROOT / "baselines").glob("*.py"), *(ROOT / "scenarios").glob("*.py")])
)
def test_a_plug_in_needs_nothing_of_what_runs_it(file):
    for other in imports(file):
        assert not other.startswith(("baselines", "scenarios")), other
        if other.startswith("cl_graft."):
            assert room(other) not in ("cli", "experiment", "planning", "bench"), other
