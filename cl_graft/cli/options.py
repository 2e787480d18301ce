"""The options of commands that run cells, made from the fields of RunConfig and Sweep, and the sweep that they say.

A command has them where its signature has `given: RunFields`, the fields of one cell, or `given: SweepFields`, in which
an axis is a comma-separated list. What is not given is None, so that a sweep file's own fields hold.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_origin

import typer

from cl_graft.cli import complete
from cl_graft.errors import CLGraftError

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from cl_graft.config import RunConfig
    from cl_graft.sweep_config import Sweep

File = Annotated[
    Path | None,
    typer.Argument(help="Sweep file, as `cl-graft init` writes one; options go before it."),
]
DataDir = Annotated[
    Path | None, typer.Option(help="Folder with the data sets that the scenario reads.")
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="name.option=value of a strategy, scenario or scorer; lora.rank=[8,32] is a grid.",
    ),
]


class RunFields(dict[str, Any]):
    """What was given of the fields of a RunConfig, under the names of a Sweep's."""

    without = ()


class SweepFields(dict[str, Any]):
    """What was given of the fields of a Sweep.

    without: fields that a command does not take.
    """

    without: tuple[str, ...] = ()


def spelled_out(command: Callable[..., None]) -> Callable[..., None]:
    """The command with an option for each field in place of its `given`, if it has one."""
    own = inspect.signature(command, eval_str=True).parameters
    if "given" not in own:
        return command
    kind = own["given"].annotation
    options = _options(kind)
    parameters = [
        p.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for name, q in own.items()
        for p in (options.values() if name == "given" else [q])
    ]

    @functools.wraps(command)
    def spelled(**words: Any) -> None:
        given = kind({name: words.pop(option.name) for name, option in options.items()})
        command(given=given, **words)

    spelled.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    spelled.__annotations__ = {p.name: p.annotation for p in parameters}
    return spelled


def _options(kind: type[RunFields | SweepFields]) -> dict[str, inspect.Parameter]:
    """{field of a Sweep, or set_: the option that says it}"""
    from cl_graft.config import CELL, Axes, RunConfig, several
    from cl_graft.sweep_config import Sweep

    parameters = {}
    fields = RunConfig.model_fields if kind is RunFields else Sweep.model_fields
    for name, field in fields.items():
        if name in CELL or name in kind.without:
            continue
        key = several(name) if kind is RunFields and name in Axes.model_fields else name
        parameters[key] = _option(name, field, kind is RunFields and field.is_required())
    parameters["set_"] = _parameter("set_", None, Set)
    return parameters


def _option(name: str, field: FieldInfo, needed: bool) -> inspect.Parameter:
    """The option that says a field. needed: a command without it is refused."""
    offers = getattr(complete, name, None) or complete.one_of(field)
    option = typer.Option(_flag(name), help=_help(field), autocompletion=offers)
    word = _word(field)
    default: Any = False if word is bool else None
    if needed:
        return _parameter(name, inspect.Parameter.empty, Annotated[word, option])
    return _parameter(name, default, Annotated[word if word is bool else word | None, option])


def _parameter(name: str, default: Any, annotation: Any) -> inspect.Parameter:
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, kind, default=default, annotation=annotation)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _word(field: FieldInfo) -> Any:
    """The type of what is typed for a field."""
    kind = field.annotation
    if kind in (bool, int):
        return kind
    if get_origin(kind) is dict:
        return list[str]
    return Path if kind in (Path, Path | None) else str


def _help(field: FieldInfo) -> str:
    """The field's help, how it is written, and its default."""
    from pydantic import BaseModel

    from cl_graft.config import told

    parts, kind, default = [told(field)], field.annotation, field.default
    if get_origin(kind) is list:
        parts.append("Comma-separated.")
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        example = ",".join(f"{k}={v}" for k, v in (field.examples or [{}])[0].items())
        parts.append(f"As {example}; settings: {', '.join(kind.model_fields)}.")
    if isinstance(default, str | int | Path | list) and default is not False and default != []:
        entries = default if isinstance(default, list) else [default]
        parts.append(f"[default: {','.join(map(str, entries))}]")
    return " ".join(parts)


def names(text: str) -> list[str]:
    """The different parts of a comma-separated list, in order. Raises CLGraftError if there is none."""
    names = [part.strip() for part in text.split(",") if part.strip()]
    if not names:
        raise CLGraftError(f"{text!r} names nothing to run; write names separated by commas.")
    return list(dict.fromkeys(names))


def cells_of(asked: Sweep, bare: bool = False) -> list[RunConfig]:
    """The cells of a sweep. Raises what can be refused of them before anything that takes seconds is imported.

    bare: as for `early.check`.
    """
    from cl_graft.experiment import early

    cells = asked.cells()
    early.check(cells, bare)
    return cells


def sweep_from(file: Path | None, given: Mapping[str, Any]) -> Sweep:
    """A sweep file's fields, under the options that a command was given: {field: what was typed}."""
    from cl_graft.plugins import parse_set
    from cl_graft.sweep_config import Sweep, read, sweep_of, with_options

    typed = {k: v for k, v in given.items() if v is not None and v is not False and v != []}
    fields = {
        name: _read(name, field, typed[name])
        for name, field in Sweep.model_fields.items()
        if name in typed
    }
    where = str(file) if file else "the command"
    everything = {**(read(file) if file else {}), **fields}
    sets = [parse_set(text) for text in typed.get("set_", [])]
    return sweep_of(with_options(everything, sets), where)


def _read(name: str, field: FieldInfo, typed: Any) -> Any:
    """The value of a field from what was typed. Raises CLGraftError where that is none."""
    from pydantic import BaseModel

    kind, flag = field.annotation, _flag(name)
    if get_origin(kind) is list:
        parts = names(str(typed))
        return [integer(part, flag) for part in parts] if kind == list[int] else parts
    if get_origin(kind) is dict:
        return dict(_pair(text, flag) for text in typed)
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return dict(_pair(part, flag) for part in names(typed))
    return typed


def integer(text: str, flag: str) -> int:
    """The integer that was typed for an option. Raises CLGraftError."""
    try:
        return int(text)
    except ValueError:
        what = flag.strip("-").removesuffix("s")
        raise CLGraftError(f"{what} {text!r} is not an integer; write {flag} 0,1,2.") from None


def _pair(text: str, option: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name.strip() or not value.strip():
        raise CLGraftError(f"{option} takes NAME=VALUE, not {text!r}.")
    return name.strip(), value.strip()
