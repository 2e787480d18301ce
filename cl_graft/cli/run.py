"""`cl-graft run`."""

from __future__ import annotations

import typer

from cl_graft.cli.options import RunFields, sweep_from
from cl_graft.cli.progress import bars, interruptible
from cl_graft.cli.show import print_tables


def run(given: RunFields) -> None:
    """Run one strategy on one scenario, or continue it where it stopped."""
    from cl_graft.errors import CLGraftError
    from cl_graft.experiment.cell import run as run_cell
    from cl_graft.report.tables import matrices, ranking

    cells = sweep_from(None, given).cells()
    if len(cells) > 1:
        raise CLGraftError(f"these options say {len(cells)} cells; `cl-graft sweep` runs several.")
    (config,) = cells
    with interruptible(), bars() as bar:
        result = run_cell(config, lambda what, done: bar(config.label, what, done))
    print_tables([*matrices([result]), *ranking([result])])
    for note in result.get("notes", []):
        typer.echo(f"{note}.")
    typer.echo(f"results: {config.out / config.cell}")
    typer.echo(f"figures: cl-graft report {config.out}")
