"""Rows of a data set: of the Hugging Face hub by its id, or of a local folder that `datasets` reads.

`datasets` runs no code of a data set, so what is read is data only.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from cl_graft.data.columns import Misread
from cl_graft.data.readers import DataError, json_entries, sample
from cl_graft.errors import first_line

T = TypeVar("T")
HubRow = Mapping[str, Any]

JSON = re.compile(r"\.jsonl?(\.gz)?$")


def rows(
    place: str,
    adapt: Callable[[HubRow], T],
    columns: Sequence[str],
    *,
    config: str | None = None,
    split: str = "train",
    keep: Callable[[str], bool] | None = None,
    size: int | None = None,
    seed: str = "",
) -> list[T]:
    """What `adapt` makes of the rows, or of `size` of them drawn by the seed.

    place: a hub id, a folder, or a file of JSON. columns: those that must be there. config: left out where the place
    has none of that name. keep: which rows, by their first column. Raises DataError in one sentence: no such data,
    a column is missing, no row is kept, or a row is not what `adapt` needs.
    """
    table = read(place, config, split)
    if missing := [column for column in columns if column not in table.column_names]:
        raise DataError(
            f"{place} has no column {missing[0]!r} but {', '.join(table.column_names)}; the scenario needs "
            f"{', '.join(columns)}."
        )
    wanted = list(range(len(table)))
    if keep:
        marks = list(table[columns[0]])
        wanted = [i for i, mark in enumerate(marks) if keep(mark)]
        if not wanted:
            known = ", ".join(sorted(set(marks))[:20])
            raise DataError(
                f"no row of {place} is of the kind asked for by its column {columns[0]!r}, which holds {known}; "
                "choose another source."
            )
    if not wanted:
        raise DataError(f"{place} holds no row; choose another source.")
    chosen = wanted if size is None else sample(wanted, size, seed)
    adapted = []
    for number, row in zip(chosen, table.select(chosen), strict=True):
        where = table.places[number] if isinstance(table, Lines) else f"row {number} of {place}"
        try:
            adapted.append(adapt(row))
        except Misread as error:
            raise DataError(f"{where} {error}") from error
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            raise DataError(
                f"{where} does not have the form of its data set ({type(error).__name__}: {error}); "
                "mend it or choose another source."
            ) from error
    return adapted


class Lines:
    """Rows of local JSON files, asked as a table of `datasets` is. places: where each stands, for errors."""

    def __init__(self, files: Sequence[Path]):
        self.places: list[str] = []
        self.rows: list[HubRow] = []
        for file in files:
            for where, row in json_entries(file):
                if not isinstance(row, dict):
                    raise DataError(f"{file}, {where} is no object with columns; mend it.")
                self.places.append(f"{file}, {where}")
                self.rows.append(row)
        self.column_names = list(dict.fromkeys(name for row in self.rows for name in row))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, column: str) -> list[Any]:
        return [row.get(column) for row in self.rows]

    def select(self, numbers: Sequence[int]) -> list[HubRow]:
        return [self.rows[number] for number in numbers]


def read(place: str, config: str | None, split: str) -> Any:
    """The split as a table of `datasets`, or as Lines where it is a file or a folder of JSON. Raises DataError."""
    import datasets

    bars = datasets.utils.logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        if Path(place).is_file():
            return Lines([Path(place)])
        if Path(place).is_dir():
            if config is not None:
                names = datasets.get_dataset_config_names(place)
                config = config if config in names else None
            # which files are a split's, `datasets` says; what is in them, we read
            found = datasets.load_dataset_builder(place, config).config.data_files or {}
            files = [Path(file) for file in found.get(split, ())]
            if files and all(JSON.search(file.name) for file in files):
                return Lines(files)
        return datasets.load_dataset(place, config, split=split)
    except DataError:
        raise
    # no network, no such set, gated, torn files: each with errors of its own
    except Exception as error:
        reason = first_line(error)
        raise DataError(
            f"{place} cannot be read ({type(error).__name__}: {reason}); give the data set's hub id or a folder that "
            "`datasets` reads, and log in where it asks for that."
        ) from error
    finally:
        if bars:
            datasets.enable_progress_bars()
