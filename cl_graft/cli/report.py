"""`cl-graft report`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .show import report as write_report


def report(
    folders: Annotated[list[Path], typer.Argument(help="Results folders.")],
    json_: Annotated[
        bool, typer.Option("--json", help="Print one object per cell instead.")
    ] = False,
    to: Annotated[
        Path | None, typer.Option(help="Folder for tables and figures; FOLDER/report if not given.")
    ] = None,
) -> None:
    """Tables in the terminal, as CSV and Markdown, and figures, for all cells in the folders."""
    if json_:
        from ..report import gather

        typer.echo(json.dumps(gather(folders), indent=1))
    else:
        write_report(folders, to or folders[0] / "report")
