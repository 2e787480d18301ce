"""A sweep as one call of a function."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from cl_graft.errors import CLGraftError
from cl_graft.experiment.executors import Report, executor
from cl_graft.experiment.sweep import sweep as run_cells
from cl_graft.report.frame import results
from cl_graft.sweep_config import Sweep, read, sweep_of

if TYPE_CHECKING:
    import pandas as pd


def sweep(
    asked: Sweep | str | Path | None = None,
    *,
    progress: Report | None = None,
    retry_failed: bool = False,
    fail_fast: bool = False,
    **fields: Any,
) -> pd.DataFrame:
    """Run every combination, or continue where it was stopped, and return the rows of its cells as `results` does.

    asked: a Sweep, the path of a sweep file, or nothing; `fields` are those of a sweep file and come before a file's:
    `sweep(scenarios="mini", strategies=["graftllm", {"lora": {"rank": [8, 32]}}], seeds=[0, 1], out="results")`.
    progress: takes a cell, what is done and the fraction of the cell that is done. Cells run in processes of their own.

    Raises CLGraftError in one sentence for what the user can mend, before anything starts; and for cells that failed,
    when all the others are done: `results` has those.
    """
    if not isinstance(asked, Sweep):
        told = read(Path(asked)) if asked is not None else {}
        asked = sweep_of(told | fields, str(asked or "cl_graft.sweep"))
    elif fields:
        asked = sweep_of(asked.model_dump(exclude_unset=True) | fields, "cl_graft.sweep")
    cells = asked.cells()
    failures = run_cells(
        cells,
        executor(asked, cells),
        progress or (lambda *_: None),
        retry_failed=retry_failed,
        fail_fast=fail_fast,
    )
    asked.save(asked.out)
    if failures:
        reasons = "; ".join(f"{f.cell}: {f.reason.rstrip('.')}" for f in failures)
        raise CLGraftError(
            f"{len(failures)} of {len(cells)} cells failed ({reasons}); mend the causes and call it again with "
            "retry_failed=True."
        )
    return results([config.out / config.cell for config in cells])
