"""What an executor takes beside the cells: with cells that only sleep, so that cores do not matter."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

from cl_graft.config import RunConfig
from cl_graft.experiment.executors import CellProgress, Outcome, local
from cl_graft.sweep_config import Ray


def sleep(config: RunConfig, progress: CellProgress, patient: bool, seconds: float) -> Outcome:
    progress("sleeping", 0.0)
    time.sleep(seconds)
    return Outcome("done")


def bench_sweep(cells: int = 24, seconds: float = 1.0) -> dict[str, float]:
    """overhead: of one worker, in seconds a cell, local and Ray. ray_speedup: of 4 Ray workers over 1; at best 4.

    What comes once a sweep is left out: importing, or starting Ray.
    """
    from cl_graft.experiment.executors import ray as on_ray

    made = [RunConfig(scenario="mini", strategy="lora", seed=seed) for seed in range(cells)]
    work = partial(sleep, seconds=seconds)

    def run(executor: Any, **given: Any) -> float:
        warm = made[: 2 * given["workers"]]
        list(executor(warm, _nothing, work=partial(sleep, seconds=0.1), **given))
        begun = time.perf_counter()
        outcomes = list(executor(made, _nothing, work=work, **given))
        assert len(outcomes) == cells
        return time.perf_counter() - begun

    here = run(local.run_cells, workers=1)
    one, four = (_on_a_cluster_of_its_own(partial(run, on_ray.run_cells), n) for n in (1, 4))
    return {
        "cells": cells,
        "seconds": seconds,
        "local_overhead": here / cells - seconds,
        "ray_overhead": one / cells - seconds,
        "ray_speedup": one / four,
    }


def _on_a_cluster_of_its_own(run: Callable[..., float], workers: int) -> float:
    """A Ray cluster of as many CPUs as workers, whatever the machine has: the cells need none."""
    import ray

    try:
        return run(workers=workers, asks=Ray())
    finally:
        ray.shutdown()


def _nothing(cell: str, what: str, done: float, at: str = "") -> None:
    pass
