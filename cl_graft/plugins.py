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
import json
import sys
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from .errors import CLGraftError, UnknownName

FOLDERS = {"scenario": "scenarios", "strategy": "baselines"}
OURS = {"strategy": {"graftllm": "cl_graft.graftllm"}, "scenario": {}}


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
    """First line of the plugin's docstring, read without importing it."""
    if name in OURS[kind]:
        path = Path(__file__).parent / f"{OURS[kind][name].rsplit('.', 1)[1]}.py"
    else:
        path = folder(kind) / f"{name}.py"
    if not path.is_file():
        return "from an installed package"
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return text.split("\n", 1)[0]


def load(kind: str, name: str) -> Any:
    """The plugin object called `name`, or the one in the file `name` if it ends in `.py`.

    Raises UnknownName with the nearest names, or CLGraftError where a file does not hold a plugin.
    """
    if name.endswith(".py"):
        path = Path(name)
        if not path.is_file():
            raise CLGraftError(f"there is no file {name}; give the path of a {kind} file.")
        return _object(_import(path, f"cl_graft_user_{path.stem}"), kind, path.stem)
    if name in OURS[kind]:
        return _object(importlib.import_module(OURS[kind][name]), kind, name)
    path = folder(kind) / f"{name}.py"
    if path.is_file():
        return _object(_import(path, f"{FOLDERS[kind]}.{name}"), kind, name)
    for entry in metadata.entry_points(group=f"cl_graft.{FOLDERS[kind]}", name=name):
        return entry.load()
    raise UnknownName(kind, name, names(kind))


def _import(path: Path, module_name: str) -> ModuleType:
    if module_name in sys.modules and sys.modules[module_name].__file__ == str(path.resolve()):
        return sys.modules[module_name]
    spec = importlib.util.spec_from_file_location(module_name, path.resolve())
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except CLGraftError:
        raise
    except Exception as error:
        del sys.modules[module_name]
        raise CLGraftError(f"{path} does not import ({type(error).__name__}: {error}).") from error
    return module


def _object(module: ModuleType, kind: str, name: str) -> Any:
    found = getattr(module, name, None)
    if found is None:
        raise CLGraftError(
            f"{module.__file__} defines no {name!r}: name its {kind} after the file, so that it can be found."
        )
    return found


def options(plugin: Callable[..., Any]) -> dict[str, Any]:
    """Option -> default, read off the keyword-only arguments of the plugin's signature."""
    parameters = inspect.signature(getattr(plugin, "function", plugin)).parameters.values()
    given = {"seed", "data_dir"}  # filled in by the harness, not by the user
    return {
        p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in given
    }


def check_options(kind: str, name: str, plugin: Any, chosen: Mapping[str, Any]) -> dict[str, Any]:
    """`chosen` over the defaults. Raises UnknownName for an option the plugin does not have."""
    known = options(plugin)
    for option, value in chosen.items():
        if option not in known:
            raise UnknownName(f"option of {kind} {name}", option, known)
        default = known[option]
        if isinstance(default, (bool, int, float, str)) and not _same_kind(value, default):
            raise CLGraftError(
                f"{name}.{option}={value!r} should be {type(default).__name__} like its default {default!r}."
            )
    return {**known, **chosen}


def _same_kind(value: Any, default: Any) -> bool:
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(value, bool) and isinstance(default, bool)
    if isinstance(default, (int, float)):
        return isinstance(value, int if isinstance(default, int) else (int, float))
    return isinstance(value, str)


def parse_set(text: str) -> tuple[str, str, Any]:
    """`lora.rank=8` -> ("lora", "rank", 8); values are JSON, or else a plain word."""
    left, equals, value = text.partition("=")
    owner, dot, option = left.partition(".")
    if not (equals and dot and owner and option):
        raise CLGraftError(f"--set {text!r} should read name.option=value, such as lora.rank=8.")
    try:
        return owner, option, json.loads(value)
    except json.JSONDecodeError:
        return owner, option, value
