"""`cl-graft cache`: what finished stages and evaluations take, and giving the room back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cl_graft.report.units import size

app = typer.Typer(help="Finished stages and evaluations that cells share.", no_args_is_help=True)

Folder = Annotated[Path, typer.Argument(help="A results folder, or the one that --cache named.")]


@app.command("ls")
def ls(folder: Folder = Path("results")) -> None:
    """List what a cache holds, the largest first."""
    from cl_graft.experiment.cache import entries

    listed = entries(_cache(folder))
    for entry in listed:
        state = "" if entry.current else "  of another version"
        typer.echo(
            f"{size(entry.bytes):>10}  {entry.kind:10}  {_ago(entry.age):>8}  {entry.about}{state}"
        )
    stale = [e for e in listed if not e.current]
    typer.echo(
        f"{size(sum(e.bytes for e in listed))} in {len(listed)}, "
        f"of which {size(sum(e.bytes for e in stale))} in {len(stale)} no run can recall"
    )


@app.command("prune")
def prune(
    folder: Folder = Path("results"),
    everything: Annotated[
        bool, typer.Option("--all", help="All of it; finished cells need none of it.")
    ] = False,
    older_than: Annotated[
        float | None, typer.Option(min=0, help="Also what was written so many days ago.")
    ] = None,
) -> None:
    """Remove what was made by other versions of the code, which no run can recall; results stay."""
    from cl_graft.experiment.cache import prune as remove

    days = None if older_than is None else 86400 * older_than
    removed = remove(_cache(folder), everything, days)
    typer.echo(f"removed {len(removed)}, {size(sum(e.bytes for e in removed))}")


def _cache(folder: Path) -> Path:
    return folder / "cache" if (folder / "cache").is_dir() else folder


def _ago(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
