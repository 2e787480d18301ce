"""`cl-graft list`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cl_graft.cli import complete
from cl_graft.errors import CLGraftError, UnknownName

if TYPE_CHECKING:
    from cl_graft.strategy.facts import Facts

KINDS = {
    "scenarios": "scenario",
    "strategies": "strategy",
    "scorers": "scorer",
    "routers": "router",
}
COLUMNS = ("strategy", "keeps", "told the task", "trained from", "budget", "source")


class Keeping(StrEnum):
    """Which packs answer for a task."""

    per_task = "per_task"
    sum = "sum"
    latest = "latest"
    merged = "merged"


class Start(StrEnum):
    """What a task's training starts from."""

    base = "base"
    model = "model"


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
    keeps: Annotated[
        Keeping | None, typer.Option(help="Strategies of which these packs answer for a task.")
    ] = None,
    told: Annotated[
        bool | None,
        typer.Option("--told/--untold", help="Strategies that have to be told the task, or not."),
    ] = None,
    start: Annotated[
        Start | None, typer.Option("--from", help="Strategies that train each task from there.")
    ] = None,
    budgeted: Annotated[
        bool | None,
        typer.Option("--budgeted/--unbudgeted", help="Strategies that hold a budget, or not."),
    ] = None,
    source: Annotated[
        str | None, typer.Option(help="Strategies whose source's arXiv number begins so.")
    ] = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="A table of the strategies by these properties.")
    ] = False,
) -> None:
    """What there is: where it comes from, and a line on it."""
    if what not in complete.LISTS:
        raise UnknownName("list", what, complete.LISTS)
    asked = {"keeps": keeps and keeps.value, "told": told, "start": start and start.value}
    if markdown or source or budgeted is not None or any(v is not None for v in asked.values()):
        if what != "strategies":
            raise CLGraftError(f"{what} have none of these properties; list strategies by them.")
        found = dict(_fitting(which, asked, budgeted, source))
        if markdown:
            typer.echo(table(found))
            return
        which = list(found)
    if what == "budgets":
        rows = [(name, "", about) for name, about in BUDGETS]
    elif what in KINDS:
        rows = list(_plugins(KINDS[what], which))
    else:
        rows = list({"models": _models, "fields": _fields, "metrics": _metrics}[what]())
    widths = [max((len(row[i]) for row in rows), default=0) for i in (0, 1)]
    for name, origin, about in rows:
        line = f"{name:{widths[0]}}  " + (f"{origin:{widths[1]}}  " if widths[1] else "")
        typer.echo(line + about)
        if verbose and what in KINDS:
            _options(KINDS[what], name)


def _fitting(
    which: list[str] | None, asked: dict[str, Any], budgeted: bool | None, source: str | None
) -> Iterator[tuple[str, Facts]]:
    """The strategies with a form that has all that is asked of it, and their facts."""
    from cl_graft import plugins
    from cl_graft.strategy.facts import facts

    wanted = {name: value for name, value in asked.items() if value is not None}
    for name in which or plugins.names("strategy"):
        known = facts(name)
        fits = any(all(getattr(f, k) == v for k, v in wanted.items()) for f in known.forms)
        fits = fits and (budgeted is None or known.budgeted is budgeted)
        if fits and (not source or any(s.startswith(source) for s in known.sources)):
            yield name, known


def table(found: Mapping[str, Facts]) -> str:
    """Strategies with what answers, whether they are told the task, from where they train, budget and source."""
    rows = [COLUMNS, ("---",) * len(COLUMNS)]
    for name, known in found.items():
        sources = ", ".join(f"[{s}](https://arxiv.org/abs/{s})" for s in known.sources) or "–"
        budget = "held" if known.budgeted else "none"
        rows.append((f"`{name}`", known.keeps, known.told, known.start, budget, sources))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _plugins(kind: str, which: list[str] | None) -> Iterator[tuple[str, str, str]]:
    from cl_graft import plugins

    for name in plugins.names(kind) if which is None else which:
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
