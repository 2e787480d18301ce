"""The options of plug-ins: read off signatures, checked against them, and as the command line writes them."""

from __future__ import annotations

import ast
import inspect
import itertools
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cl_graft import ranges
from cl_graft.config import SOURCES
from cl_graft.data.stream_schema import FILES
from cl_graft.errors import AuthorMistake, CLGraftError, UnknownName
from cl_graft.plugins.authors import line_of
from cl_graft.plugins.find import file_of, load, names
from cl_graft.ranges import fits, require

# what annotations are made of, in a signature that is read without its module
WORDS = {
    **{kind.__name__: kind for kind in (bool, int, float, str, list, dict, tuple, Path)},
    **{name: getattr(typing, name) for name in ("Annotated", "Any", "Literal")},
    **{name: getattr(ranges, name) for name in ("Count", "Field", "NotNegative", "Part")},
    **{name: getattr(ranges, name) for name in ("Positive", "Rest", "Share", "Strength")},
    "Mapping": Mapping,
    "Sequence": Sequence,
}


def options(plugin: Callable[..., Any]) -> dict[str, Any]:
    """Option -> default, read off the keyword-only arguments of the plugin's signature.

    Raises CLGraftError for an option without a default.
    """
    function = getattr(plugin, "function", plugin)
    given = {"seed", "data_dir"}  # filled in by the harness, not by the user
    defaults = {
        p.name: p.default
        for p in inspect.signature(function).parameters.values()
        if p.kind is p.KEYWORD_ONLY and p.name not in given
    }
    for option, default in defaults.items():
        if default is inspect.Parameter.empty:
            where = line_of(plugin, plugin.__name__)
            raise AuthorMistake(
                f"{where}: option {option!r} of {plugin.__name__} has no default; give it one in the signature."
            )
    return defaults


def declared(kind: str, name: str) -> Callable[..., Any] | None:
    """A function with the options that the plug-in's source declares, read without importing it, which takes seconds.

    None where the source does not tell: options that are inherited, or whose defaults are no plain values.
    Raises UnknownName or CLGraftError as `load` does for a name or a file that there is none of.
    """
    if name.endswith(FILES):
        return load(kind, name)
    try:
        body = ast.parse(file_of(kind, name).read_bytes()).body
    except (OSError, SyntaxError, ValueError):
        return None
    short = Path(name).stem if name.endswith(".py") else name.rpartition(":")[2]
    inner = "__init__" if kind == "router" else "learn"
    for node in body:
        if isinstance(node, ast.ClassDef) and node.name == short:
            made = [f for f in node.body if isinstance(f, ast.FunctionDef) and f.name == inner]
            return _signature(made[0], short) if made else None
        if isinstance(node, ast.FunctionDef) and node.name == short:
            return _signature(node, short)
    return None


def _signature(function: ast.FunctionDef, name: str) -> Callable[..., Any] | None:
    """A function that does nothing, with the keyword-only arguments of another."""
    given = function.args
    try:
        defaults = {
            a.arg: ast.literal_eval(default)
            for a, default in zip(given.kwonlyargs, given.kw_defaults, strict=True)
            if default is not None
        }
    except ValueError:
        return None
    kinds = {a.arg: ast.unparse(a.annotation) for a in given.kwonlyargs if a.annotation}

    def stub() -> None: ...

    parameters = [
        inspect.Parameter(
            a.arg,
            inspect.Parameter.KEYWORD_ONLY,
            default=defaults.get(a.arg, inspect.Parameter.empty),
        )
        for a in given.kwonlyargs
    ]
    try:
        stub.__annotations__ = {option: _kind(text) for option, text in kinds.items()}
    except (SyntaxError, ValueError, TypeError, NameError):
        return None
    stub.__name__ = name
    stub.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return stub


def _kind(annotation: str) -> Any:
    """The type that an annotation says. Raises NameError where it takes more than plain words."""
    return eval(annotation, {"__builtins__": {}}, WORDS)


def check_options(kind: str, name: str, plugin: Any, chosen: Mapping[str, Any]) -> dict[str, Any]:
    """`chosen` over the defaults.

    Raises UnknownName for an option the plugin does not have, and as `ranges.require` for a value of another type or
    range than the signature says.
    """
    known, types = options(plugin), _types(plugin)
    for option, value in chosen.items():
        if option not in known:
            raise UnknownName(f"option of {kind} {name}", option, known)
        require(f"{name}.{option}", value, types[option], known[option])
    return {**known, **chosen}


def strength(plugin: Any) -> tuple[str, tuple[float, ...]] | None:
    """The option that the plugin's signature marks as its main strength, and the values that tuning tries of it.

    Raises AuthorMistake where it marks several.
    """
    marked = {o: v for o, kind in _types(plugin).items() if (v := ranges.strength_of(kind))}
    if len(marked) > 1:
        raise AuthorMistake(
            f"{line_of(plugin, plugin.__name__)}: {plugin.__name__} marks {' and '.join(marked)} as its strength; "
            "mark one of them."
        )
    return next(iter(marked.items()), None)


def choices(kind: str, name: str, chosen: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every combination of the options' values: a list, where the option's type takes none, is a grid.

    Raises UnknownName or CLGraftError as `load` and `check_options` do.
    """
    if not name.endswith(SOURCES) and name not in names(kind):
        raise UnknownName(kind, name, names(kind))
    if not chosen:  # without importing it
        return [{}]
    plugin = declared(kind, name) or load(kind, name)
    known = _types(plugin)
    for option in chosen:
        if option not in known:
            raise UnknownName(f"option of {kind} {Path(name).stem}", option, known)
        if chosen[option] == [] and not fits([], known[option]):
            raise CLGraftError(f"{name}.{option}=[] is a grid of no value; give some.")
    each = [
        value if isinstance(value, list) and not fits(value, known[option]) else [value]
        for option, value in chosen.items()
    ]
    combinations = [dict(zip(chosen, values, strict=True)) for values in itertools.product(*each)]
    for combination in combinations:
        check_options(kind, Path(name).stem, plugin, combination)
    return combinations


def _types(plugin: Any) -> dict[str, Any]:
    """Option -> its annotation, or else the type of a default that is a bool, number or text, or else Any."""
    try:
        function = getattr(plugin, "function", plugin)
        made = function.__init__ if inspect.isclass(function) else function
        hints = typing.get_type_hints(made, include_extras=True)
    except Exception:  # annotations that only a type checker can read
        hints = {}
    plain = (bool, int, float, str)
    return {
        option: hints.get(option, type(default) if isinstance(default, plain) else Any)
        for option, default in options(plugin).items()
    }


def parse_set(text: str) -> tuple[str, str, Any]:
    """`lora.rank=8` -> ("lora", "rank", 8); values are JSON, or else a plain word."""
    from cl_graft.config import json_or_word

    left, equals, value = text.partition("=")
    owner, dot, option = left.partition(".")
    if not (equals and dot and owner and option):
        raise CLGraftError(f"--set {text!r} should read name.option=value, such as lora.rank=8.")
    return owner, option, json_or_word(value)
