"""Commands: parse, call, print. Heavy imports wait until a command needs them."""

from __future__ import annotations

import sys
import warnings

import typer

from cl_graft.cli import bench, cache, doctor, list_, pack, plan, report, run, sweep, transfer
from cl_graft.errors import CLGraftError

app = typer.Typer(
    help="Continual learning of language models: run strategies on task streams, measure forgetting.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich takes longer to import than all the rest of `--help`
    add_completion=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)
for command in (
    run.run,
    sweep.sweep,
    sweep.validate,
    sweep.status,
    sweep.init,
    plan.plan,
    report.report,
    report.compare,
):
    app.command()(command)
app.command("list")(list_.list_)
app.command()(doctor.doctor)
app.add_typer(pack.app, name="pack")
app.add_typer(cache.app, name="cache")
app.add_typer(transfer.app, name="transfer")
app.add_typer(bench.app, name="bench")


def main() -> None:
    """Entry point: errors meant for the user are one sentence on stderr and exit code 1."""
    # Of torchvision, which wants an image library that nothing here uses.
    warnings.filterwarnings("ignore", message="Failed to load image Python extension")
    try:
        app()
    except CLGraftError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)
    except ValueError as error:
        from pydantic import (
            ValidationError,
        )  # a ValueError; a command that ends well needs none of it

        if not isinstance(error, ValidationError):
            raise
        first = error.errors()[0]
        typer.echo(f"error: {'.'.join(map(str, first['loc']))}: {first['msg']}.", err=True)
        sys.exit(1)
