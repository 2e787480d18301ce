"""For MkDocs: the reference of the command line, made from the commands themselves."""

from __future__ import annotations

from typing import Any

PLACE = "<!-- commands -->"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """A page with the reference in its place."""
    return markdown.replace(PLACE, reference()) if PLACE in markdown else markdown


def reference() -> str:
    """Every command with its arguments and options, as Markdown."""
    import typer
    from typer.cli import get_docs_for_click

    from cl_graft.cli import app

    command = typer.main.get_command(app)
    context = typer.Context(command, info_name="cl-graft")
    return get_docs_for_click(obj=command, ctx=context, indent=1, name="cl-graft")
