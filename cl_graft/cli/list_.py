"""`cl-graft list`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated

import typer

from cl_graft.cli import complete
from cl_graft.errors import UnknownName

KINDS = {
    "scenarios": "scenario",
    "strategies": "strategy",
    "scorers": "scorer",
    "routers": "router",
}
BUDGETS = (
    ("10%", "ten per cent of the base's bytes in bf16, all of a pack's file counted; the default"),
    ("10%:weights", "the paper's comparison: ten per cent of the base's weights, 16 bits each"),
    ("800MB", "bytes: B, KB, MB or GB"),
)


def list_(
    what: Annotated[
        str,
        typer.Argument(help=f"One of {', '.join(complete.LISTS)}.", autocompletion=complete.lists),
    ],
    which: Annotated[
        list[str] | None, typer.Argument(help="Only these; paths of files, too.")
    ] = None,
    verbose: Annotated[bool, typer.Option(help="Options and their defaults, too.")] = False,
) -> None:
    """What there is: where it comes from, and a line on it."""
    if what not in complete.LISTS:
        raise UnknownName("list", what, complete.LISTS)
    if what == "budgets":
        rows = [(name, "", about) for name, about in BUDGETS]
    elif what in KINDS:
        rows = list(_plugins(KINDS[what], which))
    else:
        rows = list({"models": _models, "fields": _fields, "metrics": _metrics}[what]())
    widths = [max((len(row[i]) for row in rows), default=0) for i in (0, 1)]
    for name, origin, about in rows:
        start = f"{name:{widths[0]}}  " + (f"{origin:{widths[1]}}  " if widths[1] else "")
        typer.echo(start + about)
        if verbose and what in KINDS:
            _options(KINDS[what], name)


def _plugins(kind: str, which: list[str] | None) -> Iterator[tuple[str, str, str]]:
    from cl_graft import plugins

    for name in which or plugins.names(kind):
        yield name, plugins.origin(kind, name), plugins.about(kind, name)


def _models() -> Iterator[tuple[str, str, str]]:
    from cl_graft.models.embedded import SPECS
    from cl_graft.models.published import PUBLISHED, command

    for name, spec in SPECS.items():
        yield name, "embedded", spec.about
    for name, entry in PUBLISHED.items():
        yield name, "a registry", f"{entry.about}, {entry.licence}; by `{command(name)}`"
    yield "FOLDER", "a disk", "a Hugging Face causal LM on this machine"
    yield "owner/model", "the hub", "a Hugging Face causal LM on the hub"


def _fields() -> Iterator[tuple[str, str, str]]:
    """List the fields of a sweep file, with their defaults."""
    from cl_graft.config import told
    from cl_graft.sweep_config import Sweep, yaml_of

    for name, field in Sweep.model_fields.items():
        yield (
            name,
            "needed" if field.is_required() else yaml_of(field.default),
            told(field),
        )


def _metrics() -> Iterator[tuple[str, str, str]]:
    from cl_graft.matrix import METRICS

    for metric in METRICS.values():
        yield metric.name, f"{metric.better} is better", f"{metric.help} {metric.source}"


def _options(kind: str, name: str) -> None:
    from cl_graft import plugins
    from cl_graft.config import SOURCES

    plugin = plugins.load(kind, name)
    short = plugin.__name__ if name.endswith(SOURCES) else name
    for option, default in plugins.options(plugin).items():
        typer.echo(f"    --set {short}.{option}={json.dumps(default)}")
    if kind == "strategy":
        typer.echo(f"    touches: {', '.join(plugin.touches)}")
    typer.echo("    " + " ".join((plugin.__doc__ or "").split()))
