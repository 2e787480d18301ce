"""Which files a source file is made of: itself, and what it imports from beside it, told without running any of it."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path


def closure(
    file: Path,
    roots: Sequence[Path],
    wanted: Callable[[Path], bool] = lambda file: True,
    package: str = "",
) -> list[Path]:
    """The file and all that it imports, directly or not, from the folders `roots` or from beside the importing file.

    An absolute import counts if any end of its dotted name leads to a file in one of those folders, as `baselines.x`
    and `x` both do to baselines/x.py. Imports by `importlib` are not seen. wanted: what is followed. package: the one
    dotted name that leads to the roots, where no other does.
    """
    met: dict[Path, None] = {}
    waiting = [file]
    while waiting:
        path = waiting.pop()
        if path not in met:
            met[path] = None
            waiting += [found for found in _imported(path, roots, package) if wanted(found)]
    return list(met)


def digest_of(file: Path) -> str:
    """BLAKE2b, 32 hex digits, of the file's bytes; read again once its size or its time of change is another."""
    stat = file.stat()
    return _digest(file, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=4096)
def _digest(file: Path, size: int, changed: int) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _imported(file: Path, roots: Sequence[Path], package: str) -> Iterator[Path]:
    if (own := file.parent / "__init__.py").is_file():
        yield own
    above = package.split(".") if package else []
    stat = file.stat()
    for level, parts in _names(file, stat.st_size, stat.st_mtime_ns):
        if level:
            yield from _found(file.parents[min(level, len(file.parents)) - 1], parts)
            continue
        if parts[: len(above)] != above:
            continue
        for folder in {file.parent, *roots}:
            for start in range(len(parts)) if not above else [len(above)]:
                yield from _found(folder, parts[start:])


@lru_cache(maxsize=4096)
def _names(file: Path, size: int, changed: int) -> list[tuple[int, list[str]]]:
    """(dots in front, parts) of every module, or name of one, that the file imports; none where it is no Python."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return []
    told = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            told += [(0, alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            before = node.module.split(".") if node.module else []
            told += [(node.level, [*before, alias.name]) for alias in node.names]
    return told


def _found(folder: Path, parts: Sequence[str]) -> Iterator[Path]:
    """Every file that importing `parts` from the folder would run: packages on the way, and the module itself."""
    place = folder
    for part in parts:
        module, package = place / f"{part}.py", place / part
        if module.is_file():
            yield module
        if not package.is_dir():
            return
        if (package / "__init__.py").is_file():
            yield package / "__init__.py"
        place = package
