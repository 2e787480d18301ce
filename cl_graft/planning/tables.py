"""A plan as a table and a few sentences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cl_graft.report.table import Table
from cl_graft.report.units import duration, size

if TYPE_CHECKING:
    from cl_graft.planning.plan import Plan, PlannedStage

COLUMNS = (
    "Stage",
    "From",
    "Trains",
    "Rows",
    "Steps x batch",
    "Tokens",
    "Memory",
    "Time",
    "State",
    "Cells",
)


def evaluations(plan: Plan) -> Table:
    """The table of a plan's evaluations, a row for each task and kind of them."""
    columns = ("Task", "Of", "Examples", "To run", "Cached", "Mean time", "Time")
    rows = []
    for task, kind in dict.fromkeys((e.task, e.kind) for e in plan.evaluations):
        each = [e for e in plan.evaluations if (e.task, e.kind) == (task, kind)]
        new = [e for e in each if e.state != "cached"]
        known = [e.seconds for e in new if e.seconds is not None]
        times = [duration(sum(known) / n) for n in (len(known), 1)] if known else ["-", "-"]
        of = "KL to the base" if kind == "kl" else "scores"
        counts = (f"{each[0].examples:,}", str(len(new)), str(len(each) - len(new)))
        rows.append((task, of, *counts, *times))
    return Table("Evaluations, at most", columns, tuple(rows))


def table(plan: Plan) -> Table:
    """The table of a plan's stages, a row each."""
    rows = tuple(_row(stage) for stage in plan.stages)
    note = "Batch: micro-batch x accumulated x processes. Memory: of one process, on its device (and in the host's)."
    return Table("Training stages", COLUMNS, rows, note)


def summary(plan: Plan) -> list[str]:
    """What is cached, how long the rest takes, the disk, and the cells with the bytes of their packs."""
    states = Counter(stage.state for stage in plan.stages)
    lines = [f"stages: {', '.join(f'{n} {state}' for state, n in states.items()) or 'none'}"]
    if plan.seconds is None:
        lines.append("training time: not estimated; give --probe, or --peak of the device")
    else:
        lines.append(f"training time: {duration(plan.seconds)}")
    if plan.evaluation_seconds is None:
        lines.append("evaluation time: not estimated; give --probe, with a model of this machine")
    else:
        told = f"evaluation time: {duration(plan.evaluation_seconds)}"
        lines.append(f"{told}; compression and starting not counted")
    short = "" if plan.disk < plan.disk_free else "; free some first"
    lines.append(f"disk: at most {size(plan.disk)} of {size(plan.disk_free)} free{short}")
    for name, cell in plan.cells.items():
        state = (
            "finished"
            if cell["finished"]
            else f"{cell['tasks']} packs of at most {size(cell['pack_bytes'])}"
        )
        lines.append(f"{name}: {state}")
    return lines


def estimates(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Estimated and measured memory of the benchmark's stages."""
    columns = ("Model", "Stage", "With", "Length", "Estimated MB", "Measured MB", "Ratio")
    told = tuple(
        (
            row["model"],
            row["stage"],
            row["with"],
            str(row["length"]),
            f"{row['estimated_mb']:.1f}",
            f"{row['measured_mb']:.1f}",
            f"{row['ratio']:.3f}",
        )
        for row in rows
    )
    return Table("Memory of a training stage, without ZeRO", columns, told)


def _row(stage: PlannedStage) -> tuple[str, ...]:
    job, memory = stage.config, stage.memory
    share = "all" if stage.trained == stage.parameters else f"{stage.trained:,}"
    held = size(memory.device) + (f" ({size(memory.host)})" if memory.host else "")
    return (
        f"{stage.task} {stage.kind}",
        stage.start,
        f"{share} of {stage.parameters:,}",
        f"{stage.rows:,}",
        f"{job.steps:,} x {job.batch} ({stage.micro_batch}x{stage.accumulation}x{stage.processes})",
        f"{stage.tokens:,}",
        held,
        "-" if stage.seconds is None else duration(stage.seconds),
        stage.state,
        str(len(stage.cells)),
    )
