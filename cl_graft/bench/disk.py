"""Disk that `pack create` works on: counted for an 8B Llama, and measured beside the count on a smaller checkpoint."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from threading import Event, Thread
from typing import Any

import torch

from cl_graft.bench.memory import HIDDEN, INNER, LAYER, VOCABULARY, write_random
from cl_graft.skillpack.compress.create import Calibration, create, work_bytes
from cl_graft.skillpack.compress.policy import Adaptive
from cl_graft.skillpack.compress.work import Piece

SHARE = 0.05  # of the weights in bf16, the budget of `pack create` by default
Shapes = dict[str, tuple[int, int]]
LLAMA_8B: Shapes = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (1024, 4096),
    "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (14336, 4096),
    "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
}


def counted(layer: Shapes, layers: int, hidden: int, vocabulary: int, share: float = SHARE) -> int:
    """Bytes in the work folder at most, for a Llama of this shape with a head of its own and a budget of a share."""

    def never() -> torch.Tensor:
        raise AssertionError("sizes are counted by shapes alone")

    pieces = [
        Piece(f"{i}.{name}", shape, "other", never)
        for i in range(layers)
        for name, shape in layer.items()
    ]
    pieces += [Piece(f"{i}.norm", (2 * hidden,), "norm", never) for i in range(layers)]
    pieces += [Piece(r, (vocabulary, hidden), r, never) for r in ("embedding", "head")]
    limit = int(share * 2 * sum(prod(piece.shape) for piece in pieces))
    return work_bytes(pieces, Adaptive(), limit)


def bench_disk(layers: int = 7, rows: int = 8, length: int = 64) -> dict[str, Any]:
    """The count for Llama 3 8B; and count and measure of a checkpoint of random weights, of about 1 GB."""
    text = torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": text, "attention_mask": torch.ones_like(text), "labels": text}
    with tempfile.TemporaryDirectory(prefix="cl-graft-bench-") as folder:
        here = Path(folder)
        size = write_random(here / "base", layers, seed=0)
        write_random(here / "tuned", layers, seed=1)
        out = here / "pack.safetensors"
        with watched(here, "*.work") as peak:
            create(
                here / "base",
                here / "tuned",
                out,
                budget=f"{SHARE:.0%}",
                calibration=Calibration([batch]),
            )
    return {
        "work_disk_8b_gb": counted(LLAMA_8B, 32, 4096, 128256) / 1e9,
        "measured_gb": peak() / 1e9,
        "counted_gb": counted(dict(LAYER), layers, HIDDEN, VOCABULARY) / 1e9,
        "conditions": {
            "budget": f"{SHARE:.0%}",
            "checkpoint_mb": size,
            "layers": layers,
            "width": f"{HIDDEN}, {INNER}",
        },
    }


@contextmanager
def watched(folder: Path, pattern: str, seconds: float = 0.02) -> Iterator[Callable[[], int]]:
    """A function that gives the most bytes seen so far in the subfolders of this name, looked at again and again."""
    most, ended = 0, Event()

    def look() -> None:
        nonlocal most
        while not ended.wait(seconds):
            most = max(most, sum(map(_bytes, folder.glob(f"{pattern}/**/*"))))

    thread = Thread(target=look, daemon=True)
    thread.start()
    try:
        yield lambda: most
    finally:
        ended.set()
        thread.join()


def _bytes(file: Path) -> int:
    try:
        return file.stat().st_size if file.is_file() else 0
    except FileNotFoundError:  # since it was listed
        return 0
