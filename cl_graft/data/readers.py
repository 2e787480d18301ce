"""Reading data files that the user names: JSON lists and JSON lines, every record checked."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any, TypeVar

from cl_graft.errors import CLGraftError

T = TypeVar("T")


class DataError(CLGraftError):
    """A data file is missing, or a record in it is not what the scenario needs."""


Fields = Mapping[str, type | tuple[type, ...]] | Sequence[str]


def records(data_dir: Path | None, name: str, fields: Fields) -> list[dict[str, Any]]:
    """Records of `data_dir/name` (.json list, .jsonl, .jsonl.gz), each with the fields.

    fields: the names, or {name: type of the value}.
    Raises DataError naming the file, the line or the record, and the cure.
    """
    path = _existing(data_dir, name)
    entries = json_entries(path)
    types = fields if isinstance(fields, Mapping) else dict.fromkeys(fields, object)
    for where, record in entries:
        for field, wanted in types.items():
            if not isinstance(record, dict) or field not in record:
                raise DataError(
                    f"{path}, {where} has no field {field!r}; the scenario needs {', '.join(fields)}."
                )
            if not isinstance(record[field], wanted):
                raise DataError(
                    f"{path}, {where} has {type(record[field]).__name__} in field {field!r}; "
                    f"write {_names(wanted)} there."
                )
    if not entries:
        raise DataError(f"{path} holds no record; put the data set's file there.")
    return [record for _, record in entries]


def json_entries(path: Path) -> list[tuple[str, Any]]:
    """(where, value) of each record of a .json list, or of JSON lines, either perhaps .gz; where: "line 3", say.

    Every file of JSON that a user gives is read here, and a value is what is written there: `datasets` (5.2) makes
    a datetime of an answer "2024-01-05". Raises DataError naming the path, the line and the cure.
    """
    text = _text(path)
    kind = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    return _list(path, text) if kind == ".json" and not _in_lines(text) else json_lines(path, text)


def _in_lines(text: str) -> bool:
    """Whether it is objects, one a line, under whatever name."""
    first, _, rest = text.strip().partition("\n")
    try:
        return bool(rest) and isinstance(json.loads(first), dict)
    except ValueError:
        return False


def labels(data_dir: Path | None, name: str) -> list[str]:
    """A JSON list of strings. Raises DataError for anything else."""
    path = _existing(data_dir, name)
    values = [value for _, value in _list(path, _text(path))]
    if not values or not all(isinstance(value, str) for value in values):
        raise DataError(f"{path} should hold a JSON list of strings; mend or replace the file.")
    return values


def document(
    data_dir: Path | None, name: str, fields: Mapping[str, type | tuple[type, ...]]
) -> Any:
    """A JSON object with these fields of these types. Raises DataError for anything else."""
    path = _existing(data_dir, name)
    try:
        value = json.loads(_text(path))
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}); mend or replace the file.") from error
    for field, wanted in fields.items():
        found = value.get(field) if isinstance(value, dict) else None
        if not isinstance(found, wanted):
            raise DataError(
                f"{path} should hold a JSON object with {_names(wanted)} in field {field!r}; mend or replace the file."
            )
    return value


def _text(path: Path) -> str:
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig") as file:
            return file.read()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}); mend or replace the file.") from error


def _names(wanted: type | tuple[type, ...]) -> str:
    kinds = wanted if isinstance(wanted, tuple) else (wanted,)
    return " or ".join(kind.__name__ for kind in kinds)


def _existing(data_dir: Path | None, name: str) -> Path:
    if data_dir is None:
        raise DataError(
            f"this scenario reads {name}; give the folder that holds it with --data-dir."
        )
    path = data_dir / name
    if not path.is_file():
        raise DataError(f"there is no {path}; give the folder that holds {name} with --data-dir.")
    return path


def _list(path: Path, text: str) -> list[tuple[str, Any]]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}); mend or replace the file.") from error
    if not isinstance(value, list):
        raise DataError(f"{path} should hold a JSON list; mend or replace the file.")
    return [(f"record {i}", record) for i, record in enumerate(value, 1)]


def json_lines(path: Path, text: str) -> list[tuple[str, Any]]:
    """("line N", value) of each line that is not blank. Raises DataError naming `path` and the line."""
    values = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                values.append((f"line {number}", json.loads(line)))
            except ValueError as error:
                raise DataError(
                    f"{path}, line {number} is not JSON ({error}); mend or remove the line."
                ) from error
    return values


def sample(items: Sequence[T], size: int, seed: str) -> list[T]:
    """`size` of the items in a random order that depends on the seed alone; all of them if there are fewer.

    Raises DataError where that is none at all.
    """
    if size < 1 or not items:
        raise DataError(
            f"a sample of {size} from {len(items)} for {seed!r} is empty; ask for at least 1, from data that "
            "hold some."
        )
    return Random(seed).sample(list(items), min(size, len(items)))
