"""Commands: parse, call, print. Heavy imports wait until a command needs them."""

from __future__ import annotations

import inspect
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from cl_graft.cli import (
    bench,
    cache,
    doctor,
    list_,
    models,
    pack,
    plan,
    report,
    run,
    sweep,
    transfer,
    tune,
)
from cl_graft.cli.options import spelled_out
from cl_graft.errors import CLGraftError

COMMANDS: dict[str, typer.Typer | Callable[..., None]] = {
    "run": run.run,
    "sweep": sweep.sweep,
    "validate": sweep.validate,
    "status": sweep.status,
    "init": sweep.init,
    "plan": plan.plan,
    "tune": tune.tune,
    "report": report.report,
    "compare": report.compare,
    "list": list_.list_,
    "doctor": doctor.doctor,
    "models": models.app,
    "pack": pack.app,
    "cache": cache.app,
    "transfer": transfer.app,
    "bench": bench.app,
}
SETTINGS: dict[str, Any] = {
    "no_args_is_help": True,
    "pretty_exceptions_enable": False,
    "rich_markup_mode": None,  # rich takes longer to import than all the rest of `--help`
    "context_settings": {"help_option_names": ["-h", "--help"], "max_content_width": 120},
}


class Commands(TyperGroup):
    """Lists the commands by a line each, and builds one when it is called: its options may need a config's fields."""

    def __init__(self, **settings: Any):
        super().__init__(**settings)
        self.commands = {name: TyperCommand(name, help=_about(name)) for name in COMMANDS}

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[Any, Any, list[str]]:
        name, _, rest = super().resolve_command(ctx, args)
        return name, name and built(name), rest


def _about(name: str) -> str | None:
    command = COMMANDS[name]
    return command.info.help if isinstance(command, typer.Typer) else inspect.getdoc(command)


def built(name: str) -> Any:
    """The command of this name, as Typer runs it."""
    command, alone = COMMANDS[name], typer.Typer(**SETTINGS)
    if isinstance(command, typer.Typer):
        alone.add_typer(command, name=name)
    else:
        alone.command(name)(spelled_out(command))
    return typer.main.get_group(alone).commands[name]


app = typer.Typer(cls=Commands, **SETTINGS)


@app.callback()
def _app() -> None:
    """Continual learning of language models: run strategies on task streams, measure forgetting."""


def _quiet() -> None:
    """Keep what libraries warn each other of out of the terminal; `python -W default` and their own settings show it.

    What a user can act on is said in a sentence of ours.
    """
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    for library in ("TRANSFORMERS", "DATASETS", "HF_HUB"):  # read when it is imported
        os.environ.setdefault(f"{library}_VERBOSITY", "error")


def main() -> None:
    """Entry point: errors meant for the user are one sentence on stderr and exit code 1."""
    _quiet()
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
