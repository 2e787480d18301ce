"""`cl-graft run`."""

from __future__ import annotations

from typing import Annotated

import typer

from cl_graft.cli import complete
from cl_graft.cli.options import (
    Budget,
    Cache,
    Consent,
    DataDir,
    Launching,
    Mirror,
    Model,
    Out,
    Set,
    Track,
    TrainOn,
    Wandb,
    sweep_from,
)
from cl_graft.cli.progress import bars, interruptible
from cl_graft.cli.show import print_tables


def run(
    scenario: Annotated[
        str,
        typer.Option(help="Name, or path of a .py file.", autocompletion=complete.scenario),
    ],
    strategy: Annotated[
        str,
        typer.Option(help="Name, or path of a .py file.", autocompletion=complete.strategy),
    ],
    model: Model = None,
    seed: Annotated[int, typer.Option(help="Of the data and the training.")] = 0,
    budget: Budget = None,
    data_dir: DataDir = None,
    out: Out = None,
    wandb: Wandb = None,
    track: Track = None,
    allow_code_execution: Consent = False,
    set_: Set = None,
    train_on: TrainOn = None,
    launch: Launching = None,
    cache: Cache = None,
    mirror: Mirror = None,
) -> None:
    """Run one strategy on one scenario, or continue it where it stopped."""
    from cl_graft.errors import CLGraftError
    from cl_graft.experiment.cell import run as run_cell
    from cl_graft.report.tables import matrices, ranking

    given = locals() | {"seeds": str(seed), "models": model, "budgets": budget}
    cells = sweep_from(None, given | {"scenarios": scenario, "strategies": strategy}).cells()
    if len(cells) > 1:
        raise CLGraftError(f"these options say {len(cells)} cells; `cl-graft sweep` runs several.")
    (config,) = cells
    with interruptible(), bars() as bar:
        result = run_cell(config, lambda what, done: bar(config.label, what, done))
    print_tables([*matrices([result]), *ranking([result])])
    typer.echo(f"results: {config.out / config.cell}")
    typer.echo(f"figures: cl-graft report {config.out}")
