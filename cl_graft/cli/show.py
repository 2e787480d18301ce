"""What commands print, and the report they write."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import typer

from cl_graft.errors import CLGraftError


def report(folders: list[Path], target: Path) -> None:
    from cl_graft.cli.progress import interruptible
    from cl_graft.report import find, write
    from cl_graft.report.overview import overview
    from cl_graft.report.significance import reader
    from cl_graft.report.tables import matrices, ranking

    try:
        with interruptible():
            known = find(folders, told)
            cells = [f.cell for f in known]
            tested, rankings = reader(), ranking(cells)
            several = [overview(known, tested)] if len(rankings) > 1 else []
            print_tables([*matrices(cells), *several, *rankings])
            index = write(known, target, tested)
    except OSError as error:
        raise CLGraftError(
            f"{target} cannot be written ({error.strerror or error}); free space or copy the results elsewhere."
        ) from error
    typer.echo(f"the page: {index}")
    typer.echo(f"tables (CSV, Markdown, LaTeX), figures (PNG, SVG) and provenance: {target}")


def print_finished(results: list[dict[str, Any]], out: Path) -> None:
    from cl_graft.report.tables import matrices, ranking

    print_tables([*matrices(results), *ranking(results)])
    typer.echo(f"finished already; figures and provenance: {out / 'report'}")


def told(line: str) -> None:
    """A line on stderr, beside what is printed."""
    typer.echo(line, err=True)


def print_tables(tables: list[Any]) -> None:
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 160)
    for table in tables:
        console.print(table.rich())
