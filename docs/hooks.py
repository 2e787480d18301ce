"""For MkDocs: what is declared in the code is listed on the pages from there, in the place of a comment.

`<!-- commands -->`: the reference of the command line. `<!-- fields: Axes -->`: the fields of a sweep file that this
class declares. `<!-- metrics -->`: every metric with its formula and source.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any


def on_page_markdown(markdown: str, **_: Any) -> str:
    """A page with each listing in its place."""
    places = {"commands": commands, "metrics": metrics}
    markdown = re.sub(r"<!-- fields: (\w+) -->", lambda m: fields(m[1]), markdown)
    return re.sub(r"<!-- (commands|metrics) -->", lambda m: places[m[1]](), markdown)


def commands() -> str:
    """Every command with its arguments and options, as Markdown."""
    import typer
    from typer.cli import get_docs_for_click

    from cl_graft.cli import COMMANDS, app, built

    command: Any = typer.main.get_command(app)
    command.commands = {name: built(name) for name in COMMANDS}
    context = typer.Context(command, info_name="cl-graft")
    return get_docs_for_click(obj=command, ctx=context, indent=1, name="cl-graft")


def fields(kind: str) -> str:
    """A row for each field of a sweep file that the class declares."""
    from cl_graft import config, sweep_config

    declared = getattr(config, kind, None) or getattr(sweep_config, kind)
    known = sweep_config.Sweep.model_fields
    if kind == "Axes":
        found = {(n := config.several(name)): known[n] for name in declared.model_fields}
    else:  # of Sweep, those that it adds to what it is made of
        found = {name: declared.model_fields[name] for name in declared.__annotations__}
    rows = (
        (f"`{name}`", _default(field), config.told(field).replace("|", "\\|"))
        for name, field in found.items()
    )
    return _table(("field", "default", "what"), rows)


def _default(field: Any) -> str:
    from cl_graft.sweep_config import yaml_of

    if field.is_required():
        return "needed"
    nothing = field.default is None or yaml_of(field.default) in ("{}", "[]")
    return "" if nothing else f"`{yaml_of(field.default)}`"


def metrics() -> str:
    """A row for each metric."""
    from cl_graft.matrix import METRICS

    rows = ((f"`{m.name}`", m.help, m.better, m.source) for m in METRICS.values())
    return _table(("metric", "what", "better", "source"), rows)


def _table(columns: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *rows))
