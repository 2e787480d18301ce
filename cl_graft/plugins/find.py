"""Finds plug-ins: in folders of ours, at entry points of other packages, in a file of the user's.

A plug-in is a Python file whose name is the plug-in's name and which defines the one object this module
looks for: in `scenarios/`, a function of the file's name that returns a `Scenario`; in `baselines/`,
a `Strategy` (a subclass, or a function made one by `@compressor` or `@merger`); in `cl_graft/routing/`,
a `Router`. Its options and their defaults are the keyword-only arguments of its signature, its help is its docstring.
A scenario may be a YAML file, too, which stands for such a function.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from cl_graft.config import SOURCES
from cl_graft.data import stream_file
from cl_graft.data.stream_schema import FILES
from cl_graft.errors import AuthorMistake, CLGraftError, UnknownName
from cl_graft.plugins.authors import line_of, reason
from cl_graft.plugins.kinds import KINDS, PACKAGE
from cl_graft.store import source_files


def names(kind: str) -> list[str]:
    """Every name that `load` answers to, sorted; nothing is imported."""
    known = KINDS[kind]
    return sorted({*known.files(), *known.modules, *(entry.name for entry in known.entries())})


def about(kind: str, name: str) -> str:
    """First line of the docstring of the plug-in's file, read without importing it; a baseline's names its source."""
    place = _place(kind, name)
    if not place.file.is_file():
        return "(its file cannot be read without importing its package)"
    if name.endswith(FILES):
        return stream_file.about(place.file)
    text = ast.get_docstring(ast.parse(place.file.read_text(encoding="utf-8"))) or ""
    return text.split("\n", 1)[0]


def origin(kind: str, name: str) -> str:
    """Where the plug-in comes from: a file of ours, a package with its version, or a file of the user's.

    Raises UnknownName, or CLGraftError for a file that is not there.
    """
    return _place(kind, name).origin


def file_of(kind: str, name: str) -> Path:
    """The file that defines the plug-in; nothing is imported. Raises as `origin`."""
    return _place(kind, name).file


def sources(kind: str, name: str) -> dict[str, str]:
    """{file: digest of its bytes} of the plug-in's file and of all that it imports from the same folder or package.

    Of a module inside `cl_graft` it is that file alone. Raises UnknownName or CLGraftError as `load` does.
    """
    place = _place(kind, name)
    if place.entry and not place.file.is_file():
        place = _spelled_out(place, place.entry)
    return place.sources()


def sources_of(path: Path) -> dict[str, str]:
    """`sources` of a Python file."""
    return _user(path, str(path)).sources()


@dataclass(frozen=True)
class _Place:
    """The file that defines a plug-in, whose it is, and which files belong to it.

    roots: folders that it imports its own files from. prefix: of their names, when they are told.
    """

    file: Path
    origin: str
    roots: tuple[Path, ...] = ()
    prefix: str = ""
    entry: metadata.EntryPoint | None = None

    def files(self) -> list[Path]:
        if self.file.name.endswith(FILES):
            return stream_file.files(self.file)
        return sorted(source_files.closure(self.file, self.roots, self._follows, self._package))

    @property
    def _package(self) -> str:
        """The only name by which files of a folder inside `cl_graft/` can be imported; elsewhere there are others."""
        inside = self.prefix.startswith("cl_graft/")
        return self.prefix.strip("/").replace("/", ".") if inside else ""

    def sources(self) -> dict[str, str]:
        return {self._told(path): source_files.digest_of(path) for path in self.files()}

    def _follows(self, file: Path) -> bool:
        if self.entry:
            return self._of_package(file)
        if not file.resolve().is_relative_to(PACKAGE):
            return True
        own = any(root.is_relative_to(PACKAGE) and file.is_relative_to(root) for root in self.roots)
        return own and file.name not in ("__init__.py", "base.py")

    def _of_package(self, file: Path) -> bool:
        """Whether a file is of the package that the entry point is in, or, where that is none, a module beside it."""
        assert self.entry
        top = self.entry.module.partition(".")[0]
        site = self.roots[0]
        if (site / top).is_dir():
            return file.is_relative_to(site / top)
        return file.parent == site

    def _told(self, file: Path) -> str:
        for root in self.roots:
            if file.is_relative_to(root):
                return self.prefix + file.relative_to(root).as_posix()
        return self.prefix + file.name


def _variant(kind: str, name: str) -> str:
    """The plug-in of ours that `NAME:VARIANT` is: `number:lm-eval` is `number_lm_eval`; other names are as they are."""
    joined = name.replace(":", "_").replace("-", "_")
    return joined if ":" in name and KINDS[kind].file(joined) else name


def _user(path: Path, name: str) -> _Place:
    if path.resolve().is_relative_to(PACKAGE):
        return _Place(path.resolve(), name)
    return _Place(path, name, (path.parent,))


def _place(kind: str, name: str) -> _Place:
    """Raises UnknownName, or CLGraftError for a file that is not there."""
    known, name = KINDS[kind], _variant(kind, name)
    if known.host and ":" in name:
        return _place(known.host, name.rpartition(":")[0])
    if name.endswith(SOURCES):
        return _user(_user_file(kind, name), name)
    if name in known.modules:
        file = f"{known.modules[name].replace('.', '/')}.py"
        return _Place(PACKAGE.parent / file, file, prefix=f"{file.rpartition('/')[0]}/")
    if path := known.file(name):
        return _Place(path, f"{known.folder}/{path.name}", (known.path,), f"{known.folder}/")
    for entry in known.entries().select(name=name):
        file = entry.module.replace(".", "/") + ".py"
        path = Path(str(entry.dist.locate_file(file))) if entry.dist else Path(file)
        told = f"{entry.dist.name} {entry.dist.version}" if entry.dist else entry.value
        return _Place(path, told, (path.parents[entry.module.count(".")],), entry=entry)
    raise UnknownName(kind, name, names(kind))


def _spelled_out(place: _Place, entry: metadata.EntryPoint) -> _Place:
    """The place of an entry point whose module is a package, or is installed as a link to a folder elsewhere."""
    with _importing(f"{entry.module!r} of an installed package"):
        spec = importlib.util.find_spec(entry.module)
    if not spec or not spec.origin or not Path(spec.origin).is_file():
        raise CLGraftError(
            f"the file of {entry.value} ({place.origin}) is not there, so its changes would not be seen; install "
            "its package as files."
        )
    file, depth = Path(spec.origin), entry.module.count(".")
    root = file.parents[depth + (file.name == "__init__.py")]
    return replace(place, file=file, roots=(root,))


def load(kind: str, name: str) -> Any:
    """The plug-in object called `name`, or the one in the file `name` if it ends in `.py`.

    A file that was changed since it was loaded is loaded anew. Raises UnknownName with the nearest names, or
    CLGraftError where a file does not hold a plug-in.
    """
    known, name = KINDS[kind], _variant(kind, name)
    if known.host and ":" in name:
        host, _, name = name.rpartition(":")
        return _object(_module(known.host, host), kind, name)
    if name.endswith(FILES):
        return stream_file.stream(_user_file(kind, name))
    if name.endswith(".py") or name in known.modules or known.file(name):
        return _object(_module(kind, name), kind, Path(name).stem if name.endswith(".py") else name)
    for entry in known.entries().select(name=name):
        with _importing(f"{kind} {name!r} of an installed package ({entry.value})"):
            plugin = entry.load()
        known.check(plugin, name, entry.value)
        return plugin
    raise UnknownName(kind, name, names(kind))


def within(kind: str, name: str, host: str) -> str:
    """The name by which `load` finds what the plug-in `host`, of the kind that may define such, calls `name`.

    That is one defined in the host's file, or else a file beside it, or else `name`.
    """
    known = KINDS[kind]
    assert known.host
    if name.endswith(".py"):
        beside = Path(host).parent / name
        return str(beside) if host.endswith(".py") and beside.is_file() else name
    if ":" in name or host.endswith(FILES):
        return name
    module = _module(known.host, host)
    defined = getattr(module, name, None)
    try:
        known.check(defined, name, module.__file__)
    except AuthorMistake:
        raise
    except CLGraftError:
        return name
    return f"{host}:{name}" if defined.__module__ == module.__name__ else name


def _module(kind: str, name: str) -> ModuleType:
    """The module that defines a plug-in, imported. Raises UnknownName or CLGraftError."""
    known = KINDS[kind]
    if name.endswith(".py"):
        place = _place(kind, name)
        return _import(place, f"cl_graft_user_{place.file.stem}")
    if name in known.modules:
        return importlib.import_module(known.modules[name])
    if known.file(name):
        module = f"{known.folder.replace('/', '.')}.{name}"
        if known.inside:
            return importlib.import_module(module)
        return _import(_place(kind, name), module)
    for entry in known.entries().select(name=name):
        with _importing(f"{kind} {name!r} of an installed package ({entry.value})"):
            return importlib.import_module(entry.module)
    raise UnknownName(kind, name, names(kind))


def _user_file(kind: str, name: str) -> Path:
    path = Path(name)
    if name.endswith(FILES) and kind != "scenario":
        raise CLGraftError(
            f"{name} is YAML, which can be a scenario alone; give the {kind} as a .py file."
        )
    if not path.is_file():
        raise CLGraftError(f"there is no file {name}; give the path of a {kind} file.")
    return path


def import_file(path: Path, module_name: str) -> ModuleType:
    """The module of a Python file, as it is now, under this name. Raises CLGraftError where it does not import."""
    return _import(_user(path, str(path)), module_name)


def _import(place: _Place, module_name: str) -> ModuleType:
    """The module of a file, as it is now: with what it imports from beside it, where one of them was changed."""
    path, made_of = place.file, place.sources()
    loaded = sys.modules.get(module_name)
    if loaded and loaded.__file__ == str(path.resolve()):
        if vars(loaded).get("__made_of__") == made_of:
            return loaded
        parts = {str(part.resolve()) for part in place.files()}
        for name, module in list(sys.modules.items()):
            if getattr(module, "__file__", None) in parts:
                del sys.modules[name]
    spec = importlib.util.spec_from_file_location(module_name, path.resolve())
    assert spec
    module = importlib.util.module_from_spec(spec)
    vars(module)["__made_of__"] = made_of
    sys.modules[module_name] = module
    try:
        with _importing(str(path)):
            # not by the bytecode beside it, which is told from the source's by size and second alone
            exec(compile(path.read_bytes(), str(path.resolve()), "exec"), vars(module))
    except BaseException:
        sys.modules.pop(module_name, None)  # half a module must not be found the next time
        raise
    return module


@contextmanager
def _importing(what: str) -> Iterator[None]:
    try:
        yield
    except CLGraftError:
        raise
    except (Exception, SystemExit) as error:
        raise CLGraftError(f"{what} does not import ({reason(error)}); mend it.") from error


def _object(module: ModuleType, kind: str, name: str) -> Any:
    plugin = getattr(module, name, None)
    if plugin is None:
        raise CLGraftError(
            f"{module.__file__} defines no {name!r}: name its {kind} after the file, so that it can be found."
        )
    KINDS[kind].check(plugin, name, line_of(plugin, str(module.__file__)))
    return plugin
