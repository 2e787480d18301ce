"""`cl-graft plan`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from cl_graft.cli.options import File, SweepFields, cells_of, sweep_from
from cl_graft.cli.show import print_tables


def plan(
    given: SweepFields,
    file: File = None,
    probe: Annotated[
        bool,
        typer.Option(
            "--probe",
            help="Time three real steps of each kind of stage, and the base on test examples.",
        ),
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
    cells = cells_of(sweep_from(file, given), bare=True)

    from cl_graft.cli.progress import bars
    from cl_graft.experiment.prepare import try_methods
    from cl_graft.planning.plan import plan as make
    from cl_graft.planning.tables import evaluations, summary, table

    try_methods(cells)
    with bars() as shown:  # a cell of a model of hundreds of millions of weights takes seconds
        work = f"{len(cells)} cells"
        made = make(cells, probe, peak, utilisation, gpu, lambda done: shown("plan", work, done))
    if json_:
        typer.echo(json.dumps(made.json(), indent=1, default=str))
    else:
        print_tables([table(made), evaluations(made)])
        typer.echo("\n".join(summary(made)))
