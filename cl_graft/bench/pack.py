"""All figures of the pack engine: `cl-graft bench pack`."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from cl_graft.bench.error import bench_error, tasks
from cl_graft.bench.layer import bench_layer
from cl_graft.bench.memory import bench_memory
from cl_graft.bench.merge import SHAPES, bench_merge
from cl_graft.bench.rounding import bench_rounding
from cl_graft.bench.size import bytes_over_theory
from cl_graft.errors import UnknownName
from cl_graft.models.embedded import cache_root

PARTS = ("error", "time", "memory", "merge", "bytes")  # rounding needs models, so it is asked for


def bench_pack(
    parts: Sequence[str] = PARTS,
    data_dir: Path | None = None,
    threads: int = 2,
    tell: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """{part: figures with their conditions}, every comparison a ratio within this run.

    Raises UnknownName for a part that does not exist.
    """
    figures: dict[str, Any] = {}
    for part in parts:
        if part not in _MEASURES:
            raise UnknownName("part of the benchmark", part, _MEASURES)
    torch.set_num_threads(threads)
    for part in parts:
        tell(part)
        figures[part] = _MEASURES[part](data_dir)
    return figures


def _error(data_dir: Path | None) -> dict[str, Any]:
    cache = cache_root()
    rows = [bench_error(model, task, 0, cache, data_dir) for model, task in tasks(data_dir)]
    return {
        "error_ratio": max(row["error_ratio"] for row in rows),
        "deltas": rows,
        "conditions": {
            "bytes": "10% of the matrices in bf16, for both",
            "error": "relative, of each layer's output on held-out text, mean over matrices",
        },
    }


def _merge(data_dir: Path | None) -> dict[str, Any]:
    runs = [bench_merge(share, dtype) for dtype in ("bfloat16", "float32") for share in (0.05, 0.1)]
    switches = [bench_merge(0.05, dtype, SHAPES * 2) for dtype in ("bfloat16", "float32")]
    small = bench_merge(0.05, "bfloat16", layout="small", repeats=3)
    return {
        "merge_over_product": max(run["merge_over_product"] for run in runs),
        "switch_over_merge": max(run["switch_over_merge"] for run in switches),
        "small_decode_s_per_100mb": small["small_decode_s_per_100mb"],
        "runs": [*runs, *switches, small],
    }


def _bytes(data_dir: Path | None) -> dict[str, Any]:
    from cl_graft.bench.memory import write_random
    from cl_graft.skillpack.compress.create import create

    with tempfile.TemporaryDirectory(prefix="cl-graft-bench-") as folder:
        here = Path(folder)
        write_random(here / "base", 1, seed=0)
        write_random(here / "tuned", 1, seed=1)
        create(here / "base", here / "tuned", here / "pack.safetensors", budget="5%")
        return bytes_over_theory(here / "pack.safetensors")


_MEASURES: dict[str, Callable[[Path | None], dict[str, Any]]] = {
    "error": _error,
    "time": lambda data_dir: bench_layer(),
    "memory": lambda data_dir: bench_memory(),
    "merge": _merge,
    "bytes": _bytes,
    "rounding": bench_rounding,
}
