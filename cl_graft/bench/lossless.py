"""Bytes of lossless packs beside what general compressors make of the same tensors: each a share of the tuned file."""

from __future__ import annotations

import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from math import prod
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cl_graft.bench.error import tasks
from cl_graft.models.embedded import cache_root
from cl_graft.models.load import load
from cl_graft.skillpack.compress.lossless import create_lossless
from cl_graft.skillpack.folders.apply import apply_pack
from cl_graft.skillpack.folders.checkpoint import Checkpoint, write_checkpoint
from cl_graft.skillpack.format.file import SkillPack
from cl_graft.training import checkpoint
from cl_graft.training.config import sft_job
from cl_graft.training.stages import Stages

# values, about, that the other compressors are given: zstd -19 makes 2 MB a second
SAMPLE = 1 << 21
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Pairs = Sequence[tuple[Path, Path]]


def bench_lossless(pairs: Pairs = (), data_dir: Path | None = None) -> dict[str, Any]:
    """Share of the tuned file that a lossless pack takes, for each pair of folders as it is and cast to bfloat16.

    pairs: (base, tuned); by default what `mini-llama` learns on mini's math and code. changed: share of the values that
    differ. The other compressors get some rows of each tensor: of the tuned one, of the difference in its dtype
    (which does not give the tuned one back), of the exclusive or of the bits, and of that in byte planes.
    """
    rows = []
    with tempfile.TemporaryDirectory(prefix="cl-graft-bench-") as folder:
        here = Path(folder)
        for base, tuned in pairs or _mini(here, data_dir):
            for name, dtype in DTYPES.items():
                before, after = (_cast(f, here / name / f.name, dtype) for f in (base, tuned))
                found = _measured(before, after, here / "pack")
                rows.append({"delta": tuned.name, "dtype": name, **found})
    published = {
        "ZipLLM (NSDI 2026), a hub of models": 0.46,
        "PULSE, a step of RL in bfloat16": 0.108 / 14,
    }
    sample = f"all but the pack by every n-th row of each tensor, {SAMPLE:,} values or all"
    return {"rows": rows, "conditions": {"sample": sample, "published": published}}


def _measured(base: Path, tuned: Path, pack: Path) -> dict[str, Any]:
    created = create_lossless(base, tuned, pack)
    begun = perf_counter()
    with tempfile.TemporaryDirectory(dir=pack.parent) as folder:
        apply_pack(base, SkillPack.load(pack), Path(folder) / "out")
    seconds = perf_counter() - begun
    before, after = Checkpoint(base), Checkpoint(tuned)
    numel = sum(prod(after.tensors[name].shape) for name in after.floating)
    step, size, changed = max(1, numel // SAMPLE), 0, 0
    sizes: dict[str, int] = {}
    for name in after.floating:
        a, b = (side.read(name) for side in (before, after))
        changed += int((a != b).sum())
        a, b = (x.reshape(len(x) if x.ndim else 1, -1)[::step].contiguous() for x in (a, b))
        size += b.numel() * b.dtype.itemsize
        for kind, data in _forms(a, b):
            for how, compressed in _COMPRESSORS.items():
                key = f"{how} of {kind}"
                sizes[key] = sizes.get(key, 0) + len(compressed(data))
    return {
        "share": created.bytes / created.tuned_bytes,
        "changed": changed / numel,
        "bytes": created.bytes,
        "make_seconds": created.seconds,
        "apply_seconds": seconds,
        "others": {key: value / size for key, value in sizes.items()},
    }


def _forms(base: Tensor, tuned: Tensor) -> Iterator[tuple[str, bytes]]:
    a, b = _bits(base), _bits(tuned)
    yield "the tuned", b.tobytes()
    yield "the difference", _bits(tuned - base).tobytes()
    yield "the xor", (a ^ b).tobytes()
    yield "the xor in planes", (a ^ b).reshape(-1, 1).view(np.uint8).T.tobytes()


def _bits(x: Tensor) -> np.ndarray:
    return x.view(torch.int32 if x.dtype.itemsize == 4 else torch.int16).numpy().reshape(-1)


def _compressors() -> dict[str, Callable[[bytes], bytes]]:
    found: dict[str, Callable[[bytes], bytes]] = {"zip -9": lambda data: zlib.compress(data, 9)}
    if find_spec("zstandard"):
        import zstandard

        found["zstd -19"] = lambda data: zstandard.ZstdCompressor(19).compress(data)
    return found


_COMPRESSORS = _compressors()


def _cast(source: Path, target: Path, dtype: torch.dtype) -> Path:
    """A folder with its floats rounded to the nearest of a dtype."""
    side = Checkpoint(source)
    floating = set(side.floating)
    specs = {
        name: (dtype if name in floating else info.dtype, info.shape)
        for name, info in side.tensors.items()
    }
    if not target.exists():
        write_checkpoint(target, specs, lambda name: side.read(name).to(specs[name][0]), side)
    return target


def _mini(folder: Path, data_dir: Path | None) -> Pairs:
    """What mini-llama learns on two tasks, one after the other from the same start; kept in the cache."""
    pairs = []
    for model_name, task in tasks(data_dir)[:2]:
        torch.manual_seed(0)
        model, tokenizer = load(model_name, data_dir)
        base, tuned = folder / model_name, folder / f"{model_name}-{task.name}"
        for place in (base, tuned):
            if place == tuned:
                Stages(cache_root()).run(model, tokenizer, *sft_job(task, 0))
            if not place.exists():
                place.mkdir()
                checkpoint.save(model, tokenizer, place)
        pairs.append((base, tuned))
    return pairs
