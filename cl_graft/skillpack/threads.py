"""Loops that numba compiles, on half as many threads as torch has.

Torch's own keep their processors busy for some milliseconds after an operation, in case that another one follows: with
as many threads beside them a pass took twice the time that one thread took.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch


def in_threads(run: Callable[[slice], None], count: int, multiple: int = 1, least: int = 1) -> None:
    """Call `run` with slices of `count` items, all but the last of a size that is a multiple; with one where they are
    fewer than `least`. Raises what `run` raises."""
    pieces = max(1, torch.get_num_threads() // 2) if count > least else 1
    step = max(1, -(-count // (multiple * pieces))) * multiple
    slices = [slice(start, min(start + step, count)) for start in range(0, count, step)]
    if len(slices) < 2:
        for piece in slices:
            run(piece)
        return
    with ThreadPoolExecutor(len(slices)) as pool:
        list(pool.map(run, slices))
