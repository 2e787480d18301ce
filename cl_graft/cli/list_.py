"""`cl-graft list`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from ..errors import UnknownName


def list_(
    what: Annotated[str, typer.Argument(help="scenarios, strategies or models.")],
    verbose: Annotated[bool, typer.Option(help="Options and their defaults, too.")] = False,
) -> None:
    """What there is, with a line on each."""
    from .. import plugins
    from ..models.embedded import SPECS

    kinds = {"scenarios": "scenario", "strategies": "strategy"}
    if what == "models":
        for name, spec in SPECS.items():
            typer.echo(f"{name:16} {spec.about}")
        typer.echo(f"{'FOLDER':16} a Hugging Face causal LM on this machine")
        typer.echo(f"{'owner/model':16} a Hugging Face causal LM on the hub")
        return
    if what not in kinds:
        raise UnknownName("list", what, [*kinds, "models"])
    for name in plugins.names(kinds[what]):
        typer.echo(f"{name:20} {plugins.about(kinds[what], name)}")
        if verbose:
            plugin = plugins.load(kinds[what], name)
            for option, default in plugins.options(plugin).items():
                typer.echo(f"    --set {name}.{option}={json.dumps(default)}")
            typer.echo("    " + " ".join((plugin.__doc__ or "").split()))
