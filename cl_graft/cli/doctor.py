"""`cl-graft doctor`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def doctor(
    out: Annotated[Path, typer.Option(help="Folder that results are to be written into.")] = Path(
        "results"
    ),
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """What this machine has of what runs need, and the cure for what is missing."""
    from dataclasses import asdict

    from cl_graft.planning.doctor import examine, sound

    findings = examine(out)
    if json_:
        typer.echo(
            json.dumps({"sound": sound(findings), "findings": [*map(asdict, findings)]}, indent=1)
        )
    else:
        width = max(len(f.what) for f in findings)
        for f in findings:
            typer.echo(f"{f.state:8} {f.what:{width}}  {f.said}{f' ({f.cure})' if f.cure else ''}")
    if not sound(findings):
        raise typer.Exit(1)
