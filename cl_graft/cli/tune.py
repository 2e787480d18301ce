"""`cl-graft tune`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cl_graft.cli.options import File, SweepFields, sweep_from
from cl_graft.cli.show import print_tables

if TYPE_CHECKING:
    from cl_graft.experiment.tune import Tuning
    from cl_graft.presets import Preset
    from cl_graft.report.table import Table


class TuneFields(SweepFields):
    """What was given of the fields of a Sweep that tuning does not decide itself."""

    without = ("seeds", "task_ids", "router", "router_options", "preset", "out")


def tune(
    given: TuneFields,
    file: File = None,
    trials: Annotated[int, typer.Option(help="Of each strategy, the defaults included.")] = 8,
    first: Annotated[
        int, typer.Option(help="Tasks of the stream that a trial learns and is scored on.")
    ] = 2,
    seed: Annotated[int, typer.Option(help="Of the data, the training and the trials.")] = 0,
    out: Annotated[
        Path, typer.Option(help="Folder that presets and trials are written into.")
    ] = Path("tuning"),
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Run trials that failed before, too.")
    ] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Tune every strategy by the same protocol, on validation data; run it again to continue what was stopped."""
    asked = sweep_from(file, given)

    from cl_graft.cli.live import view
    from cl_graft.cli.progress import interruptible
    from cl_graft.experiment import early
    from cl_graft.experiment.executors import executor, local
    from cl_graft.experiment.sweep import sweep as run_cells
    from cl_graft.experiment.tune import chosen, tunings
    from cl_graft.presets import keep

    found = tunings(asked, trials, first, seed, out)
    cells = list({c.cell: c for tuning in found for c in tuning.trials}.values())
    early.check(cells)
    with interruptible(), view(cells) as report:
        failures = run_cells(cells, executor(asked, cells), report, local.apart, retry_failed)
    for failure in failures:
        typer.echo(f"failed: {failure.cell}: {failure.reason}", err=True)
    presets = [chosen(tuning) for tuning in found]
    made = [preset for preset in presets if preset]
    files = keep(made, out)
    if json_:
        told = {"presets": [p.model_dump(mode="json") for p in made], "files": [*map(str, files)]}
        typer.echo(json.dumps(told, indent=1))
    else:
        print_tables([_table(t, p) for t, p in zip(found, presets, strict=True) if p])
        for path in files:
            typer.echo(f"presets: {path}; cl-graft sweep --preset {out} uses them")
    if len(made) < len(found):
        lacking = [t.cell.label for t, p in zip(found, presets, strict=True) if not p]
        typer.echo(
            f"no preset of {', '.join(lacking)}: mend the causes; --retry-failed runs these trials again.",
            err=True,
        )
        raise typer.Exit(1)


def _table(tuning: Tuning, preset: Preset) -> Table:
    """A row for each trial of a strategy, and which was chosen."""
    from cl_graft.report.table import UNMEASURED, Table

    best = preset.options, preset.learning_rate_scale
    rows = []
    for number, trial in enumerate(preset.trials, 1):
        told = "chosen" if (trial.options, trial.learning_rate_scale) == best else ""
        score = f"{trial.score:.3f} ± {trial.stderr:.3f}" if not trial.failed else UNMEASURED
        bits = f"{trial.bits:.3f}" if trial.bits is not None else UNMEASURED
        values = [f"{value:g}" if value is not None else "None" for value in trial.values.values()]
        rows.append((str(number), *values, score, bits, trial.failed or told))
    budget = f" under {preset.budget}" if preset.budget else ""
    by = " and ".join(sorted(set(preset.about["scored_by"].values())))
    note = (
        f"On the validation of {', '.join(preset.tasks)}, after the last of them: the mean of their scores by {by}, ± "
        "the standard error over examples. Trial 1, the author's defaults, unless another is better by more than its "
        f"error; among equals the fewest bits per byte. Seed {preset.seed}."
    )
    if preset.edges:
        note += (
            f" What was chosen of {' and '.join(preset.edges)} is at the edge of what was tried: the best may lie "
            "beyond."
        )
    title = f"{tuning.cell.label} on {tuning.cell.scenario_label} from {preset.model}{budget}"
    columns = ("Trial", *preset.tried, "Score", "Bits per byte", "")
    return Table(title, columns, tuple(rows), note)
