"""`cl-graft sweep`, and `init`, `validate` and `status` around it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cl_graft.cli.options import File, SweepFields, cells_of, sweep_from
from cl_graft.errors import CLGraftError

if TYPE_CHECKING:
    from cl_graft.config import RunConfig
    from cl_graft.experiment.executors import Report
    from cl_graft.experiment.sweep import Failure
    from cl_graft.sweep_config import Sweep


def sweep(
    given: SweepFields,
    file: File = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Continue the sweep that OUT holds, as it was asked for."),
    ] = False,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Run cells that failed before, too.")
    ] = False,
    fail_fast: Annotated[
        bool, typer.Option("--fail-fast", help="Stop at the first cell that fails.")
    ] = False,
) -> None:
    """Run every combination, of a file or of these options; run it again to continue what was stopped."""
    if resume:
        file = _held(file, given)
    asked = sweep_from(file, given)
    failures = _run(asked, retry_failed, fail_fast)
    for failure in failures:
        typer.echo(f"failed: {failure.cell}: {failure.reason}", err=True)
    if failures:
        typer.echo("mend the causes; --retry-failed runs these cells again.", err=True)
        raise typer.Exit(1)


def _held(file: Path | None, given: SweepFields) -> Path:
    """The file of the sweep that a results folder holds."""
    from cl_graft.sweep_config import FILE

    if file or given["scenarios"] or given["strategies"]:
        raise CLGraftError(
            "--resume takes the sweep from the folder of its results; give --out alone, or leave out --resume."
        )
    held = (given["out"] or Path("results")) / FILE
    if not held.is_file():
        raise CLGraftError(f"there is no {held}; --out names no folder that a sweep was begun in.")
    return held


def _run(asked: Sweep, retry_failed: bool, fail_fast: bool) -> list[Failure]:
    """Run all cells that are left, under the live view, and then the report."""
    cells = cells_of(asked)

    from cl_graft.cli.live import view
    from cl_graft.cli.progress import interruptible
    from cl_graft.cli.show import print_finished
    from cl_graft.cli.show import report as write_report
    from cl_graft.experiment.cell import finished
    from cl_graft.experiment.executors import executor, local
    from cl_graft.experiment.sweep import sweep as run_cells

    results = [finished(c) for c in cells]
    if all(results) and _reported(cells, asked.out / "report"):
        print_finished([r for r in results if r], asked.out)
        return []
    left = [config for config, result in zip(cells, results, strict=True) if result is None]

    def checked(task: Callable[[Report], None], report: Report) -> None:
        local.apart(task, report)
        asked.save(asked.out)  # what is refused is not what the folder is of

    failures: list[Failure] = []
    with interruptible(), view(cells) as report:
        failures = run_cells(left, executor(asked, cells), report, checked, retry_failed, fail_fast)
    if len(failures) < len(cells):
        write_report([asked.out], asked.out / "report")
    return failures


def _reported(cells: list[RunConfig], folder: Path) -> bool:
    """Whether the report there is of all these cells, and none of their results younger than it."""
    from cl_graft.store.files import RecordError, read_json

    try:
        made = read_json(folder / "made.json")
        then = (folder / "made.json").stat().st_mtime_ns
        results = [(c.out / c.cell / "result.json").stat().st_mtime_ns for c in cells]
    except (RecordError, OSError):
        return False
    return max(results) <= then and all(f"cell {c.cell}" in made for c in cells)


def validate(
    given: SweepFields,
    file: Annotated[Path, typer.Argument(help="Sweep file; options go before it.")],
) -> None:
    """Check all that a sweep file says, names, options and data included, and tell what the data hold; nothing is
    started."""
    from cl_graft.cli.show import print_data
    from cl_graft.experiment.prepare import check_data, check_methods, try_methods

    cells = cells_of(sweep_from(file, given))
    scenarios = check_data(cells)
    check_methods(cells, scenarios)
    try_methods(cells)
    print_data(scenarios.values())
    for config in cells:
        typer.echo(config.cell)
    typer.echo(f"{file} is valid: {len(cells)} cells.")


def status(
    out: Annotated[Path, typer.Argument(help="Results folder.")] = Path("results"),
) -> None:
    """The state of every cell in a results folder: waiting, running, done, failed or unreadable, and why."""
    from cl_graft.store.result import known_states

    known = known_states(out)
    width = max(len(path.name) for path in known)
    for path, state in known.items():
        why = state.get("reason", "-") if state["state"] in ("failed", "unreadable") else "-"
        done = f"{state['experiences'] or '-'}"
        typer.echo(f"{state['state']:10} {path.name:{width}}  {done:>3} experiences  {why}")
    counts = Counter(state["state"] for state in known.values())
    shown = ("done", "running", "waiting", "failed", *(["unreadable"] * ("unreadable" in counts)))
    typer.echo(", ".join(f"{counts[name]} {name}" for name in shown))


def init(
    file: Annotated[Path, typer.Argument(help="Where to write it.")] = Path("sweep.yaml"),
) -> None:
    """Write a sweep file with comments, to begin with."""
    from cl_graft.store.files import write_text
    from cl_graft.sweep_config import template

    if file.exists():
        raise CLGraftError(f"{file} is there already; choose another name.")
    write_text(file, template())
    typer.echo(f"{file}: cl-graft validate {file}, then cl-graft sweep {file}")
