"""What commands print, and the report they write."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from cl_graft.errors import CLGraftError

if TYPE_CHECKING:
    from cl_graft.task import Scenario


def report(folders: list[Path], target: Path, named: list[str] | None = None) -> None:
    """Print the tables of all cells and write their report; figures for a paper, too, where `named` is a list: of
    strategies to name in them."""
    from cl_graft.cli.progress import interruptible
    from cl_graft.report import find, paper, write
    from cl_graft.report.orders import over_orders
    from cl_graft.report.overview import overview
    from cl_graft.report.paper import chosen
    from cl_graft.report.significance import reader
    from cl_graft.report.tables import matrices, ranking

    try:
        with interruptible():
            known = find(folders, told)
            cells = [f.cell for f in known]
            chosen.check(cells, named or [])
            tested, rankings = reader(), ranking(cells)
            several = [overview(known, tested)] if len(rankings) > 1 else []
            several += over_orders(cells).values()
            print_tables([*matrices(cells), *several, *rankings])
            index = write(known, target, tested)
            if named is not None:
                paper.write(known, target / "paper", tested, named)
    except OSError as error:
        raise CLGraftError(
            f"{target} cannot be written ({error.strerror or error}); free space or copy the results elsewhere."
        ) from error
    typer.echo(f"the page: {index}")
    typer.echo(f"tables (CSV, Markdown, LaTeX), figures (PNG, SVG) and provenance: {target}")
    if named is not None:
        typer.echo(f"for a paper (PDF, SVG, PNG; LaTeX): {target / 'paper'}")


def print_data(scenarios: Iterable[Scenario]) -> None:
    """A table for each scenario of what its data hold, and notes; once for all orders and seeds of the same sizes."""
    from cl_graft.data.survey import survey
    from cl_graft.report.data import data_table

    told: set[Any] = set()
    for scenario in scenarios:
        facts = survey(scenario)
        key = scenario.name, frozenset((f.task, f.train, f.test) for f in facts)
        if key not in told:
            told.add(key)
            print_tables([data_table(scenario.name, facts)])
            for fact in facts:
                for note in fact.notes:
                    typer.echo(f"{scenario.name}, {fact.task}: {note}.")


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
