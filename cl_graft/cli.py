"""Commands: parse, call, print. Heavy imports wait until a command needs them."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer

from . import cli_bench, cli_cache, cli_pack, cli_plan, cli_transfer
from .cli_options import (
    Budget,
    Cache,
    Consent,
    DataDir,
    Launching,
    Model,
    Out,
    Set,
    TrainOn,
    Wandb,
    grid_of,
    integer,
    names,
)
from .cli_show import print_finished, print_tables
from .cli_show import report as write_report
from .errors import CLGraftError, UnknownName
from .progress import bars, interruptible

app = typer.Typer(
    help="Continual learning of language models: run strategies on task streams, measure forgetting.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(cli_pack.app, name="pack")
app.add_typer(cli_cache.app, name="cache")
app.add_typer(cli_transfer.app, name="transfer")
app.add_typer(cli_bench.app, name="bench")
app.command()(cli_plan.plan)


@app.command()
def run(
    scenario: Annotated[str, typer.Option(help="Name, or path of a .py file.")],
    strategy: Annotated[str, typer.Option(help="Name, or path of a .py file.")],
    model: Model = "mini-llama",
    seed: Annotated[int, typer.Option(help="Of the data and the training.")] = 0,
    budget: Budget = "10%",
    data_dir: DataDir = None,
    out: Out = Path("results"),
    wandb: Wandb = "auto",
    allow_code_execution: Consent = False,
    set_: Set = None,
    train_on: TrainOn = None,
    launch: Launching = "",
    cache: Cache = None,
) -> None:
    """Run one strategy on one scenario, or continue it where it stopped."""
    from .cell import run as run_cell
    from .report.tables import matrices, ranking

    (config,) = grid_of([scenario], [strategy], [seed], [model], [budget], locals())
    with interruptible(), bars() as bar:
        result = run_cell(config, lambda what, done: bar(config.label, what, done))
    print_tables([*matrices([result]), *ranking([result])])
    typer.echo(f"results: {config.out / config.cell}")
    typer.echo(f"figures: cl-graft report {config.out}")


@app.command()
def sweep(
    scenarios: Annotated[str, typer.Option(help="Names, comma-separated.")],
    strategies: Annotated[str, typer.Option(help="Names, comma-separated.")],
    seeds: Annotated[str, typer.Option(help="Comma-separated integers.")] = "0",
    models: Annotated[str, typer.Option(help="Comma-separated.")] = "mini-llama",
    budgets: Annotated[str, typer.Option(help="Comma-separated.")] = "10%",
    data_dir: DataDir = None,
    out: Out = Path("results"),
    wandb: Wandb = "auto",
    allow_code_execution: Consent = False,
    set_: Set = None,
    train_on: TrainOn = None,
    launch: Launching = "",
    cache: Cache = None,
    workers: Annotated[
        int, typer.Option(min=0, help="Processes; 0 means one a core, or one a GPU.")
    ] = 0,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Run cells that failed before, too.")
    ] = False,
    fail_fast: Annotated[
        bool, typer.Option("--fail-fast", help="Stop at the first cell that fails.")
    ] = False,
) -> None:
    """Run every combination; run it again to continue what was stopped."""
    from functools import partial

    from .cell import finished
    from .executors import local
    from .sweep import sweep as run_sweep

    numbers = [integer(s) for s in names(seeds)]
    cells = grid_of(
        names(scenarios), names(strategies), numbers, names(models), names(budgets), locals()
    )
    if all(finished(c) for c in cells) and (out / "report").is_dir():
        print_finished(cells, out)
        return
    run_cells = partial(local.run_cells, workers=workers or local.default_workers())
    with interruptible(), bars() as bar:
        failures = run_sweep(cells, run_cells, bar, local.warm_up, retry_failed, fail_fast)
    try:
        if len(failures) < len(cells):
            write_report([out], out / "report")
    finally:
        for failure in failures:
            typer.echo(f"failed: {failure.cell}: {failure.reason}", err=True)
    if failures:
        typer.echo("mend the causes; --retry-failed runs these cells again.", err=True)
        raise typer.Exit(1)


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(help="Results folders.")],
    json_: Annotated[
        bool, typer.Option("--json", help="Print one object per cell instead.")
    ] = False,
    to: Annotated[
        Path | None, typer.Option(help="Folder for tables and figures; FOLDER/report if not given.")
    ] = None,
) -> None:
    """Tables in the terminal, as CSV and Markdown, and figures, for all cells in the folders."""
    if json_:
        from .report import gather

        typer.echo(json.dumps(gather(folders), indent=1))
    else:
        write_report(folders, to or folders[0] / "report")


@app.command("list")
def list_(
    what: Annotated[str, typer.Argument(help="scenarios, strategies or models.")],
    verbose: Annotated[bool, typer.Option(help="Options and their defaults, too.")] = False,
) -> None:
    """What there is, with a line on each."""
    from . import plugins
    from .models.embedded import SPECS

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


def main() -> None:
    """Entry point: errors meant for the user are one sentence on stderr and exit code 1."""
    from pydantic import ValidationError

    # Of torchvision, which wants an image library that nothing here uses.
    warnings.filterwarnings("ignore", message="Failed to load image Python extension")
    try:
        app()
    except CLGraftError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)
    except ValidationError as error:
        first = error.errors()[0]
        typer.echo(f"error: {'.'.join(map(str, first['loc']))}: {first['msg']}.", err=True)
        sys.exit(1)
