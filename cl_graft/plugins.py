"""Finds scenarios and strategies: our folders, entry points of other packages, a file of the user's.

A plugin is a Python file whose name is the plugin's name and which defines the one object this module
looks for: in `scenarios/`, a function of the file's name that returns a `Scenario`; in `baselines/`,
a `Strategy` (a subclass, or a function made one by `@compressor` or `@merger`). Its options and their
defaults are the keyword-only arguments of its signature, its help is its docstring.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import itertools
import json
import sys
import typing
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from cl_graft.errors import CLGraftError, UnknownName

FOLDERS = {"scenario": "scenarios", "strategy": "baselines"}
OURS = {"strategy": {"graftllm": "cl_graft.strategy.graftllm"}, "scenario": {}}


def folder(kind: str) -> Path:
    """`scenarios/` or `baselines/`: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).parent
    inside = package / FOLDERS[kind]
    return inside if inside.is_dir() else package.parent / FOLDERS[kind]


def names(kind: str) -> list[str]:
    """Every name that `load` answers to, sorted; nothing is imported."""
    files = (p.stem for p in folder(kind).glob("*.py") if not p.stem.startswith("_"))
    entries = (entry.name for entry in metadata.entry_points(group=f"cl_graft.{FOLDERS[kind]}"))
    return sorted({*files, *OURS[kind], *entries})


def about(kind: str, name: str) -> str:
    """First line of the docstring of the plugin's file, read without importing it; a baseline's names its source."""
    path, _ = _place(kind, name)
    if path is None or not path.is_file():
        return "(its file cannot be read without importing its package)"
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return text.split("\n", 1)[0]


def origin(kind: str, name: str) -> str:
    """Where the plugin comes from: a file of ours, a package with its version, or a file of the user's."""
    return _place(kind, name)[1]


def _place(kind: str, name: str) -> tuple[Path | None, str]:
    """The file that defines a plugin, where that can be told, and whose it is. Raises UnknownName."""
    if name.endswith(".py"):
        return _user_file(kind, name), name
    if name in OURS[kind]:
        file = f"{OURS[kind][name].replace('.', '/')}.py"
        return Path(__file__).parents[1] / file, file
    path = folder(kind) / f"{name}.py"
    if path.is_file():
        return path, f"{FOLDERS[kind]}/{path.name}"
    for entry in metadata.entry_points(group=f"cl_graft.{FOLDERS[kind]}", name=name):
        if entry.dist is None:
            return None, entry.value
        file = entry.module.replace(".", "/") + ".py"
        return Path(str(entry.dist.locate_file(file))), f"{entry.dist.name} {entry.dist.version}"
    raise UnknownName(kind, name, names(kind))


def load(kind: str, name: str) -> Any:
    """The plugin object called `name`, or the one in the file `name` if it ends in `.py`.

    Raises UnknownName with the nearest names, or CLGraftError where a file does not hold a plugin.
    """
    if name.endswith(".py"):
        path = _user_file(kind, name)
        return _object(_import(path, f"cl_graft_user_{path.stem}"), kind, path.stem)
    if name in OURS[kind]:
        return _object(importlib.import_module(OURS[kind][name]), kind, name)
    path = folder(kind) / f"{name}.py"
    if path.is_file():
        return _object(_import(path, f"{FOLDERS[kind]}.{name}"), kind, name)
    for entry in metadata.entry_points(group=f"cl_graft.{FOLDERS[kind]}", name=name):
        with _importing(f"{kind} {name!r} of an installed package ({entry.value})"):
            found = entry.load()
        return _checked(found, kind, name, entry.value)
    raise UnknownName(kind, name, names(kind))


def _user_file(kind: str, name: str) -> Path:
    path = Path(name)
    if not path.is_file():
        raise CLGraftError(f"there is no file {name}; give the path of a {kind} file.")
    return path


def _import(path: Path, module_name: str) -> ModuleType:
    if module_name in sys.modules and sys.modules[module_name].__file__ == str(path.resolve()):
        return sys.modules[module_name]
    spec = importlib.util.spec_from_file_location(module_name, path.resolve())
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        with _importing(str(path)):
            spec.loader.exec_module(module)
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
        reason = f"{type(error).__name__}: {error}".strip().split("\n", 1)[0]
        raise CLGraftError(f"{what} does not import ({reason}); mend it.") from error


def _object(module: ModuleType, kind: str, name: str) -> Any:
    found = getattr(module, name, None)
    if found is None:
        raise CLGraftError(
            f"{module.__file__} defines no {name!r}: name its {kind} after the file, so that it can be found."
        )
    return _checked(found, kind, name, module.__file__)


def _checked(found: Any, kind: str, name: str, where: str | None) -> Any:
    """`found`, if it is what the harness can use as a scenario or strategy."""
    if kind == "scenario":
        try:
            inspect.signature(found).bind(seed=0, data_dir=None)
        except TypeError as error:
            raise CLGraftError(
                f"{where}: {name!r} is no scenario ({error}); make it a function with the keyword-only "
                "arguments seed and data_dir, and with defaults for the others."
            ) from error
    elif not inspect.isclass(found) or inspect.isabstract(found):
        raise CLGraftError(
            f"{where}: {name!r} is no strategy; make it one by @compressor or @merger, or as a subclass "
            "of Strategy with a `learn`."
        )
    return found


def options(plugin: Callable[..., Any]) -> dict[str, Any]:
    """Option -> default, read off the keyword-only arguments of the plugin's signature.

    Raises CLGraftError for an option without a default.
    """
    function = getattr(plugin, "function", plugin)
    given = {"seed", "data_dir"}  # filled in by the harness, not by the user
    found = {
        p.name: p.default
        for p in inspect.signature(function).parameters.values()
        if p.kind is p.KEYWORD_ONLY and p.name not in given
    }
    for option, default in found.items():
        if default is inspect.Parameter.empty:
            raise CLGraftError(
                f"option {option!r} of {plugin.__name__} has no default; give it one in the signature."
            )
    return found


def check_options(kind: str, name: str, plugin: Any, chosen: Mapping[str, Any]) -> dict[str, Any]:
    """`chosen` over the defaults.

    Raises UnknownName for an option the plugin does not have, CLGraftError for a value of another type than
    the signature says.
    """
    known, types = options(plugin), _types(plugin)
    for option, value in chosen.items():
        if option not in known:
            raise UnknownName(f"option of {kind} {name}", option, known)
        if not _fits(value, types[option]):
            wanted = inspect.formatannotation(types[option])
            raise CLGraftError(
                f"{name}.{option}={value!r} should be {wanted}, as its default {known[option]!r} is."
            )
    return {**known, **chosen}


def choices(kind: str, name: str, chosen: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every combination of the options' values: a list, where the option's type takes none, is a grid.

    Raises UnknownName or CLGraftError as `load` and `check_options` do.
    """
    if not name.endswith(".py") and name not in names(kind):
        raise UnknownName(kind, name, names(kind))
    if not chosen:  # without importing it
        return [{}]
    plugin = load(kind, name)
    known = _types(plugin)
    for option in chosen:
        if option not in known:
            raise UnknownName(f"option of {kind} {Path(name).stem}", option, known)
        if chosen[option] == [] and not _fits([], known[option]):
            raise CLGraftError(f"{name}.{option}=[] is a grid of no value; give some.")
    each = [
        value if isinstance(value, list) and not _fits(value, known[option]) else [value]
        for option, value in chosen.items()
    ]
    found = [dict(zip(chosen, values, strict=True)) for values in itertools.product(*each)]
    for combination in found:
        check_options(kind, Path(name).stem, plugin, combination)
    return found


def _types(plugin: Any) -> dict[str, Any]:
    """Option -> its annotation, or else the type of a default that is a bool, number or text, or else Any."""
    try:
        hints = typing.get_type_hints(getattr(plugin, "function", plugin))
    except Exception:  # annotations that only a type checker can read
        hints = {}
    plain = (bool, int, float, str)
    return {
        option: hints.get(option, type(default) if isinstance(default, plain) else Any)
        for option, default in options(plugin).items()
    }


def _fits(value: Any, wanted: Any) -> bool:
    """Whether a JSON value is of the type: 8 is a float, but 8.0 no int, True no number, NaN nothing."""
    from pydantic import PydanticUserError, TypeAdapter, ValidationError

    try:
        TypeAdapter(wanted).validate_json(json.dumps(value, allow_nan=False), strict=True)
    except PydanticUserError:  # a type that only the plugin understands
        return True
    except (ValidationError, TypeError, ValueError):
        return False
    return True


def parse_set(text: str) -> tuple[str, str, Any]:
    """`lora.rank=8` -> ("lora", "rank", 8); values are JSON, or else a plain word."""
    left, equals, value = text.partition("=")
    owner, dot, option = left.partition(".")
    if not (equals and dot and owner and option):
        raise CLGraftError(f"--set {text!r} should read name.option=value, such as lora.rank=8.")
    try:
        return owner, option, json.loads(value, parse_constant=_no_number)
    except (ValueError, RecursionError):
        return owner, option, value


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is a word here")


def sources_of(path: Path) -> dict[str, str]:
    import hashlib

    return {path.name: hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()}
