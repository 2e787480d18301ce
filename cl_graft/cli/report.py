"""`cl-graft report` and `cl-graft compare`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from cl_graft.cli.show import print_tables, told
from cl_graft.cli.show import report as write_report


def report(
    folders: Annotated[list[Path], typer.Argument(help="Results folders.")],
    json_: Annotated[
        bool, typer.Option("--json", help="Print one object per cell instead.")
    ] = False,
    to: Annotated[
        Path | None,
        typer.Option(help="Folder for the page, tables and figures; FOLDER/report if not given."),
    ] = None,
    paper: Annotated[
        bool,
        typer.Option(
            "--paper",
            help="Write figures for a paper, too (PDF, SVG, PNG at 300 dpi, one and two columns wide), and LaTeX.",
        ),
    ] = False,
    named: Annotated[
        list[str] | None,
        typer.Option(
            help="A strategy to name in the figures of --paper, whatever its rank; may be repeated."
        ),
    ] = None,
) -> None:
    """A page that opens in a browser, tables (CSV, Markdown, LaTeX) and figures of all cells in the folders."""
    if json_:
        from cl_graft.report import gather

        typer.echo(json.dumps(gather(folders, told), indent=1))
    else:
        write_report(folders, to or folders[0] / "report", named or ([] if paper else None))


def compare(
    a: Annotated[Path, typer.Argument(help="A cell's folder, or a results folder.")],
    b: Annotated[Path, typer.Argument(help="Another.")],
    json_: Annotated[
        bool, typer.Option("--json", help="Print one object per table instead.")
    ] = False,
) -> None:
    """What differs between two runs: config, versions, data, and scores with intervals."""
    from cl_graft.report.compare import compare as compared

    tables = compared(a, b, told)
    if json_:
        shown = [{"title": t.title, "columns": t.columns, "rows": t.rows} for t in tables]
        typer.echo(json.dumps(shown, indent=1, ensure_ascii=False))
    else:
        print_tables(tables)
