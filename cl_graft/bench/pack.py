"""All figures of the pack engine: `cl-graft bench pack`."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cl_graft.bench.anatomy import anatomy
from cl_graft.bench.cells import Cells
from cl_graft.bench.disk import bench_disk
from cl_graft.bench.error import bench_error, tasks
from cl_graft.bench.experts import experts_over_previous
from cl_graft.bench.layer import bench_layer
from cl_graft.bench.lossless import Pairs, bench_lossless
from cl_graft.bench.memory import bench_memory
from cl_graft.bench.merge import SHAPES, bench_merge
from cl_graft.bench.methods import bench_methods
from cl_graft.bench.outputs import bf16_outputs_kept
from cl_graft.bench.peers import deltatensors_kl_ratio, peers
from cl_graft.bench.previous import (
    bytes_at_equal_error,
    coding,
    error_over_previous,
    kl_over_previous,
)
from cl_graft.bench.rounding import bf16_kl_share
from cl_graft.bench.size import bytes_over_theory
from cl_graft.errors import CLGraftError, UnknownName
from cl_graft.models.embedded import cache_root

PARTS = ("error", "time", "memory", "disk", "merge", "bytes")  # measured unless others are named
BESIDE = {  # an earlier commit of the engine
    "error_over_previous": error_over_previous,
    "bytes_at_equal_error": bytes_at_equal_error,
    "kl_over_previous": kl_over_previous,
}
EXPERTS = "experts_over_previous"  # likewise, on mixtures of its own
ON_SMOLLM2 = {
    "anatomy": anatomy,
    "bf16_kl_share": bf16_kl_share,
    "bf16_outputs_kept": bf16_outputs_kept,
    "bytes_over_entropy": coding,
    "peers": peers,
    "deltatensors_kl_ratio": deltatensors_kl_ratio,
}


def bench_pack(
    parts: Sequence[str] = PARTS,
    data_dir: Path | None = None,
    threads: int = 2,
    tell: Callable[[str], None] = lambda text: None,
    pairs: Pairs = (),
    previous: Path | None = None,
) -> dict[str, Any]:
    """{part: figures with their conditions}, every comparison a ratio within this run.

    pairs: (base, tuned), folders for `lossless`. previous: a checkout of an earlier commit, for `time`, which sets its
    engine beside, and the parts that compare with it. Parts on real deltas keep every measured cell in the cache, and
    go on from there. Raises UnknownName for a part that does not exist, CLGraftError for one that lacks what it
    compares with.
    """
    for part in parts:
        if part not in (known := [*PARTS, "methods", "lossless", *BESIDE, EXPERTS, *ON_SMOLLM2]):
            raise UnknownName("part of the benchmark", part, known)
        if part in (*BESIDE, EXPERTS) and previous is None:
            raise CLGraftError(
                f"{part} compares with an earlier commit; give a checkout of it with --previous FOLDER."
            )
    measures = _measures(data_dir, pairs, previous, Cells(cache_root() / "bench-pack", tell))
    torch.set_num_threads(threads)
    figures: dict[str, Any] = {}
    for part in parts:
        tell(part)
        figures[part] = measures[part]()
    return figures


def _measures(
    data_dir: Path | None, pairs: Pairs, previous: Path | None, cells: Cells
) -> dict[str, Callable[[], dict[str, Any]]]:
    measures: dict[str, Callable[[], dict[str, Any]]] = {
        "error": partial(_error, data_dir),
        "time": partial(bench_layer, previous=previous),
        "memory": bench_memory,
        "disk": bench_disk,
        "merge": _merge,
        "bytes": _bytes,
        "lossless": partial(bench_lossless, pairs, data_dir),
        "methods": partial(_methods, data_dir),
        **{name: partial(part, data_dir, cells) for name, part in ON_SMOLLM2.items()},
    }
    if previous is not None:
        measures |= {n: partial(part, previous, data_dir, cells) for n, part in BESIDE.items()}
        measures[EXPERTS] = partial(experts_over_previous, previous, cells.say)
    return measures


def _methods(data_dir: Path | None) -> dict[str, Any]:
    return bench_methods(*tasks(None)[0], 0, cache_root(), data_dir)


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


def _merge() -> dict[str, Any]:
    runs = [bench_merge(share, dtype) for dtype in ("bfloat16", "float32") for share in (0.05, 0.1)]
    switches = [bench_merge(0.05, dtype, SHAPES * 2) for dtype in ("bfloat16", "float32")]
    small = bench_merge(0.05, "bfloat16", layout="small", repeats=3)
    return {
        "merge_over_product": max(run["merge_over_product"] for run in runs),
        "switch_over_merge": max(run["switch_over_merge"] for run in switches),
        "small_decode_s_per_100mb": small["small_decode_s_per_100mb"],
        "runs": [*runs, *switches, small],
    }


def _bytes() -> dict[str, Any]:
    from cl_graft.bench.memory import write_random
    from cl_graft.skillpack.compress.create import create

    with tempfile.TemporaryDirectory(prefix="cl-graft-bench-") as folder:
        here = Path(folder)
        write_random(here / "base", 1, seed=0)
        write_random(here / "tuned", 1, seed=1)
        create(here / "base", here / "tuned", here / "pack.safetensors", budget="5%")
        return bytes_over_theory(here / "pack.safetensors")
