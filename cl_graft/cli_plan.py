"""`cl-graft plan`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .cli_options import Cache, DataDir, Launching, Out, Set, TrainOn, grid_of, integer, names
from .cli_show import print_tables


def plan(
    scenarios: Annotated[str, typer.Option(help="Names, comma-separated.")],
    strategies: Annotated[str, typer.Option(help="Names, comma-separated.")],
    seeds: Annotated[str, typer.Option(help="Comma-separated integers.")] = "0",
    models: Annotated[str, typer.Option(help="Comma-separated.")] = "mini-llama",
    budgets: Annotated[str, typer.Option(help="Comma-separated.")] = "10%",
    data_dir: DataDir = None,
    out: Out = Path("results"),
    set_: Set = None,
    train_on: TrainOn = None,
    launch: Launching = "",
    cache: Cache = None,
    probe: Annotated[
        bool, typer.Option("--probe", help="Time three real steps of each kind of stage.")
    ] = False,
    peak: Annotated[
        float | None, typer.Option(help="bf16 operations a second of one device, as 989e12.")
    ] = None,
    utilisation: Annotated[float, typer.Option(help="Share of the peak that is reached.")] = 0.4,
    gpu: Annotated[
        bool, typer.Option("--gpu", help="Plan for GPUs, though this machine has none.")
    ] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """What a sweep is going to do: stages, memory, time, disk, and what is cached; nothing is started."""
    from .plan import plan as make
    from .report.plan import summary, table

    numbers = [integer(s) for s in names(seeds)]
    given = locals() | {"wandb": "off", "allow_code_execution": False}
    cells = grid_of(
        names(scenarios), names(strategies), numbers, names(models), names(budgets), given
    )
    found = make(cells, probe, peak, utilisation, gpu)
    if json_:
        typer.echo(json.dumps(found.json(), indent=1, default=str))
    else:
        print_tables([table(found)])
        typer.echo("\n".join(summary(found)))
