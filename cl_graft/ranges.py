"""Ranges of numbers, as annotations of options and recipes, and the sentence about a value that is outside.

`rank: Count | None = None` in a signature says all: what reads the options refuses any other value before anything is
computed. A range of one place alone is written there, as `Annotated[int, Field(ge=2, le=8)]`.
"""

from __future__ import annotations

import inspect
import json
import operator
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, reduce
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import Field, PydanticUserError, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from cl_graft.errors import CLGraftError, UnknownName

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Part = Annotated[float, Field(gt=0, le=1)]  # a share that is not nothing
Rest = Annotated[float, Field(ge=0, lt=1)]  # a share that is not all, as dropout is


@dataclass(frozen=True, init=False)
class Strength:
    """Annotation of the one option that a method's effect hangs on most: the values that tuning tries, in order.

    `weight: Annotated[NotNegative, Strength(1e2, 1e3, 1e4)] = 1e3` says all that `cl-graft tune` needs to know.
    """

    values: tuple[float, ...]

    def __init__(self, *values: float):
        object.__setattr__(self, "values", values)


BOUNDS = ("ge", "gt", "le", "lt")


def strength_of(kind: Any) -> tuple[float, ...]:
    """The values of a `Strength` in an annotation, or none."""
    told = [known for part in _parts(kind, Annotated) for known in get_args(part)[1:]]
    return next((known.values for known in told if isinstance(known, Strength)), ())


def fits(value: Any, wanted: Any) -> bool:
    """Whether a JSON value is of the type, in its range: 8 is a float, but 8.0 no int, True no number, NaN nothing."""
    return _wrong(value, wanted) is None


def require(what: str, value: Any, wanted: Any, default: Any) -> None:
    """Raise UnknownName for a JSON value that is none of a `Literal`'s, CLGraftError for another type or range.

    what: the name of the value, as `lora.rank`. default: told as a value that is right.
    """
    wrong = _wrong(value, wanted)
    if wrong is None:
        return
    known = [choice for part in _parts(wanted, Literal) for choice in get_args(part)]
    if known and isinstance(value, str):
        raise UnknownName(f"value of {what}", value, map(str, known))
    if known and isinstance(value, type(known[0])):
        nearest = min(known, key=lambda choice: abs(choice - value))
        listed = ", ".join(map(str, known))
        raise CLGraftError(f"{what}={value!r} is none of {listed}; the nearest is {nearest}.")
    for error in wrong.errors() if isinstance(wrong, ValidationError) else ():
        for bound in BOUNDS:
            if bound in error.get("ctx", {}):
                cure = "give one" if default is None else f"give one such as {default:g}"
                if bound in ("ge", "le"):
                    cure = f"the nearest is {error['ctx'][bound]:g}"
                raise CLGraftError(f"{what}={value!r} is not {_range(wanted, bound)}; {cure}.")
    told = inspect.formatannotation(_plain(wanted))
    raise CLGraftError(f"{what}={value!r} should be {told}, as its default {default!r} is.")


def require_fields(record: Any, name: str) -> None:
    """Do the same for each field of a data class whose annotation gives a range. name: what the record is called."""
    kind: Any = type(record)
    for field, wanted in _ranged(kind).items():
        require(f"{name}.{field}", getattr(record, field), wanted, getattr(kind, field))


@cache
def _ranged(kind: type) -> dict[str, Any]:
    hints = typing.get_type_hints(kind, include_extras=True)
    return {name: hint for name, hint in hints.items() if any(_parts(hint, Annotated))}


def _wrong(value: Any, wanted: Any) -> Exception | None:
    try:
        TypeAdapter(wanted).validate_json(json.dumps(value, allow_nan=False), strict=True)
    except PydanticUserError:  # a type that only the plug-in understands
        return None
    except (ValidationError, TypeError, ValueError) as error:
        return error
    return None


def _parts(kind: Any, origin: Any) -> Iterator[Any]:
    """The parts of a type that are `Literal` or `Annotated`, itself included."""
    if get_origin(kind) is origin:
        yield kind
    for part in get_args(kind) if get_origin(kind) is not Literal else ():
        yield from _parts(part, origin)


def _range(wanted: Any, broken: str) -> str:
    """The range in words: the one of the type's with the bound that was broken."""
    known: dict[str, float] = {}
    for part in _parts(wanted, Annotated):
        fields = [info for info in get_args(part)[1:] if isinstance(info, FieldInfo)]
        told = [said for field in fields for said in field.metadata]
        known = {b: getattr(said, b) for said in told for b in BOUNDS if hasattr(said, b)}
        if broken in known:
            break
    low, high = known.get("ge", known.get("gt")), known.get("le", known.get("lt"))
    least = "" if low is None else f"{'from' if 'ge' in known else 'above'} {low:g}"
    if high is None:
        return f"{low:g} or more" if "ge" in known else f"a number {least}"
    most = f"{'up to' if 'le' in known else 'below'} {high:g}"
    return f"a number {f'{least}, {most}' if least else most}"


def _plain(kind: Any) -> Any:
    """The type without its ranges."""
    if get_origin(kind) is Annotated:
        return _plain(get_args(kind)[0])
    if get_origin(kind) in (types.UnionType, typing.Union):
        return reduce(operator.or_, map(_plain, get_args(kind)))
    return kind
