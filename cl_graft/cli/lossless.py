"""`cl-graft pack create --lossless`."""

from __future__ import annotations

from pathlib import Path

import typer

from cl_graft.cli.progress import bars, interruptible
from cl_graft.errors import CLGraftError


def create_lossless(ctx: typer.Context, base: Path, tuned: Path, out: Path, task: str) -> None:
    """Create a lossless pack and print what it takes. Raises CLGraftError for an option that decides nothing there."""
    from cl_graft.skillpack.compress import lossless
    from cl_graft.store.digests import peak_memory_mb

    goes = ("base", "tuned", "out", "task", "lossless")
    given = [
        f"--{name.replace('_', '-')}"
        for name in ctx.params
        if name not in goes and getattr(ctx.get_parameter_source(name), "name", "") == "COMMANDLINE"
    ]
    if given:
        raise CLGraftError(
            f"--lossless keeps every bit, so that {', '.join(given)} would decide nothing; leave one or the other out."
        )
    with interruptible(), bars() as bar:
        created = lossless.create_lossless(
            base, tuned, out, task=task, progress=lambda what, done: bar(out.name, what, done)
        )
    for note in created.notes:
        typer.echo(note)
    share = created.bytes / created.tuned_bytes
    typer.echo(
        f"{out}: {created.bytes:,} bytes for {created.tuned_bytes:,} of the tuned model ({share:.1%}), bit for bit."
    )
    typer.echo(f"{created.seconds:.0f} s; peak memory {peak_memory_mb():,.0f} MiB.")
