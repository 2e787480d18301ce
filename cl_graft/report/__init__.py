"""Tables, figures and pages from the cells in a results folder."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cl_graft.report.significance import Reader

MANY = 100  # cells, whose report is made by several processes


@dataclass(frozen=True)
class ReportedCell:
    """A cell's folder, and what `cl-graft report DIR --json` prints of it."""

    path: Path
    cell: dict[str, Any]


def find(
    folders: Sequence[Path], left_out: Callable[[str], None] = warnings.warn
) -> list[ReportedCell]:
    """All cells at or below the folders, complete or not, in a stable order, as `aggregate.told_apart`.

    left_out: told, in one line, of each cell whose files cannot be read. Raises RecordError where there is no other.
    """
    from cl_graft.report.aggregate import told_apart
    from cl_graft.report.frequent import with_frequent
    from cl_graft.report.references import with_references
    from cl_graft.store.files import RecordError
    from cl_graft.store.record import cells
    from cl_graft.store.result import collect, kept

    read: dict[Path, dict[str, Any]] = {}
    failed: list[RecordError] = []
    for path in [path for folder in folders for path in cells(folder)]:
        try:
            read[path] = kept(path) or collect(path)
        except RecordError as error:
            failed.append(error)
    if not read:
        raise failed[0]
    for unread in failed:
        left_out(f"left out: {unread}")
    told = with_references(told_apart(with_frequent(read)))
    return [ReportedCell(path, dict(cell)) for path, cell in zip(read, told, strict=True)]


def gather(
    folders: Sequence[Path], left_out: Callable[[str], None] = warnings.warn
) -> list[dict[str, Any]]:
    """The result objects of `find`."""
    return [reported.cell for reported in find(folders, left_out)]


def write(reported: Sequence[ReportedCell], target: Path, tested: Reader | None = None) -> Path:
    """Tables, provenance, figures and pages; returns the page to open. Raises OSError where the disk refuses.

    tested: a `significance.reader` that may have read their test examples already.
    """
    from cl_graft.report.page import work
    from cl_graft.report.page import write as write_page
    from cl_graft.report.provenance import write_provenance
    from cl_graft.report.tables import write_tables

    if len(reported) > MANY:
        work.warm()  # while the tables are being made
    cells = [f.cell for f in reported]
    write_tables(cells, target)
    write_provenance(cells, target)
    return write_page(reported, target, tested)
