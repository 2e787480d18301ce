"""`cl-graft run`."""

from __future__ import annotations

from functools import partial

import typer

from cl_graft.cli.options import RunFields, cells_of, sweep_from
from cl_graft.cli.progress import interruptible
from cl_graft.cli.show import print_tables


def run(given: RunFields) -> None:
    """Run one strategy on one scenario, or continue it where it stopped."""
    from cl_graft.cli.live import view
    from cl_graft.errors import CLGraftError
    from cl_graft.plugins import reason

    cells = cells_of(sweep_from(None, given))
    if len(cells) > 1:
        raise CLGraftError(f"these options say {len(cells)} cells; `cl-graft sweep` runs several.")
    (config,) = cells

    from cl_graft.experiment.cell import run as run_cell
    from cl_graft.report.tables import matrices, ranking

    try:
        with interruptible(), view([config]) as report:
            result = run_cell(config, partial(report, config.cell))
    except (CLGraftError, typer.Exit):
        raise
    except Exception as error:
        kept = config.out / config.cell / "traceback.txt"
        where = f"; where is in {kept}" if kept.is_file() else ""
        raise CLGraftError(f"{config.label} failed ({reason(error)}){where}.") from error
    print_tables([*matrices([result]), *ranking([result])])
    for note in result.get("notes", []):
        typer.echo(f"{note}.")
    typer.echo(f"results: {config.out / config.cell}")
    typer.echo(f"figures: cl-graft report {config.out}")
