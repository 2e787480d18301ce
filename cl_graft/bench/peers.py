"""What others keep of a delta, beside ours at the same bytes: LoRA extraction, BitDelta, Delta-CoMe, deltatensors.

Each is written from its paper or called from its package, and keeps what that does: the decoder's matrices in the first
three, every tensor in the last.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from math import prod
from pathlib import Path
from time import process_time
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cl_graft.bench import textbook
from cl_graft.bench.cells import Cells
from cl_graft.bench.deltas import CALIBRATION, smollm2_delta
from cl_graft.bench.engines import Made, this_engine
from cl_graft.bench.held_out import HeldOut
from cl_graft.bench.previous import STEPS, conditions, engine_cell, figures
from cl_graft.budget import Budget
from cl_graft.errors import CLGraftError
from cl_graft.skillpack.codecs.packing import pack, unpack
from cl_graft.skillpack.folders.checkpoint import Checkpoint

DELTATENSORS = {"int4": "int4", "one-bit": "quantized"}  # what it calls them
VERSION = "0.2.0"
SMALL = "1%"  # of the base in bf16
COME = {
    8: 2,
    3: 32,
}  # ranks at these bits, all further ones at 2 (Ping et al. 2024, the triple-precision form)


def peers(data_dir: Path | None, cells: Cells) -> dict[str, Any]:
    """A row for each method and size: bytes on disk, held-out output error, KL, processor seconds to make and apply.

    Two sizes: SMALL, and what BitDelta takes, which can take nothing else.
    """
    text = HeldOut(smollm2_delta(STEPS, data_dir, cells.say))
    bit = _cell("BitDelta", None, text, cells)
    base = Checkpoint(text.delta.base)
    small = Budget(SMALL, sum(prod(base.tensors[name].shape) for name in base.floating)).bytes
    rows = []
    for size in (small, bit["bytes"]):
        rows.append({"method": "this engine"} | engine_cell(this_engine(), text, f"{size}B", cells))
        rows += [
            {"method": name} | _cell(name, size, text, cells) for name in ("LoRA", "Delta-CoMe")
        ]
    rows.append({"method": "BitDelta"} | bit)
    return {
        "rows": rows,
        "conditions": {
            "delta": text.delta.name,
            "LoRA": "plain SVD, one rank for all matrices, factors in bfloat16, as mergekit and PEFT extract it",
            "BitDelta": "a sign and the mean magnitude of each matrix; scales are not distilled",
            "Delta-CoMe": f"ranks {COME}, the further ones at 2 bits; GPTQ on {CALIBRATION} training examples; bytes "
            "counted, since its packed form is not published",
            "seconds": "of the processor; ours with Python's start",
        },
    }


def deltatensors_kl_ratio(data_dir: Path | None, cells: Cells) -> dict[str, Any]:
    """KL of our pack at the bytes of deltatensors' file, over the KL of that file, for its int4 and its one-bit form.

    Raises CLGraftError where the package is not installed.
    """
    text = HeldOut(smollm2_delta(STEPS, data_dir, cells.say))
    rows = []
    for form in DELTATENSORS:
        theirs = _cell(f"deltatensors {form}", None, text, cells)
        ours = engine_cell(this_engine(), text, f"{theirs['bytes']}B", cells)
        ratio = ours["kl"] / theirs["kl"]
        rows.append({"form": form, "deltatensors_kl_ratio": ratio, "theirs": theirs, "this": ours})
    return {
        "deltatensors_kl_ratio": {row["form"]: row["deltatensors_kl_ratio"] for row in rows},
        "rows": rows,
        "conditions": {"delta": text.delta.name, "deltatensors": VERSION},
    }


def _cell(name: str, size: int | None, text: HeldOut, cells: Cells) -> dict[str, Any]:
    """Figures of a peer's form of a delta in at most `size` bytes."""

    def measure() -> dict[str, Any]:
        with tempfile.TemporaryDirectory(prefix="cl-graft-bench-") as place:
            return figures(_MAKERS[name](text, size, Path(place)), text)

    return cells.measured({"method": name, "bytes": size} | conditions(text), measure)


def lora(text: HeldOut, size: int | None, place: Path) -> Made:
    """The truncated SVD of every matrix, one rank for all, as a PEFT adapter has its factors: bfloat16."""
    assert size is not None
    begun = process_time()
    shapes = {name: tuple(text.change(name).shape) for name in text.decoder}
    rank = size // sum(2 * (rows + cols) for rows, cols in shapes.values())
    if not rank:
        raise CLGraftError(f"{size:,} bytes hold no LoRA adapter of rank 1; give a larger budget.")
    factors = {}
    for name in shapes:
        u, s, vt = torch.linalg.svd(text.change(name), full_matrices=False)
        root = s[:rank].sqrt()
        factors[f"{name}.lora_A"] = (root[:, None] * vt[:rank]).bfloat16().contiguous()
        factors[f"{name}.lora_B"] = (u[:, :rank] * root).bfloat16().contiguous()
    save_file(factors, place / "adapter.safetensors")
    made = process_time() - begun
    return _applied(place / "adapter.safetensors", made, _from_lora)


def _from_lora(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    names = [name.removesuffix(".lora_A") for name in stored if name.endswith(".lora_A")]
    return {n: stored[f"{n}.lora_B"].float() @ stored[f"{n}.lora_A"].float() for n in names}


def bitdelta(text: HeldOut, size: int | None, place: Path) -> Made:
    """A sign and a scale a matrix, the scale being the mean magnitude (Liu et al. 2024, without its distillation)."""
    begun = process_time()
    stored = {}
    for name in text.decoder:
        delta = text.change(name)
        stored[f"{name}.signs"] = pack((delta > 0).to(torch.uint8), 1)
        stored[f"{name}.scale"] = delta.abs().mean()[None]
        stored[f"{name}.shape"] = torch.tensor(delta.shape)
    save_file(stored, place / "bitdelta.safetensors")
    made = process_time() - begun
    return _applied(place / "bitdelta.safetensors", made, _from_signs)


def _from_signs(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    deltas = {}
    for name in (key.removesuffix(".signs") for key in stored if key.endswith(".signs")):
        shape = stored[f"{name}.shape"].tolist()
        signs = unpack(stored[f"{name}.signs"], shape[0] * shape[1], 1).reshape(shape)
        deltas[name] = (2.0 * signs - 1) * stored[f"{name}.scale"]
    return deltas


def delta_come(text: HeldOut, size: int | None, place: Path) -> Made:
    """Singular vectors at falling precision, the right ones by GPTQ and the left ones after them, the same share of
    every matrix."""
    assert size is not None
    begun = process_time()
    measured = text.moments(text.delta.train[:CALIBRATION])
    whole = sum(text.change(name).numel() for name in text.decoder)
    deltas, used = {}, 0.0
    for name in text.decoder:
        delta, hessian = text.change(name), measured.hessian(name)
        assert hessian is not None
        rows, cols = delta.shape
        counts = _come((rows, cols), size * delta.numel() / whole)
        used += sum(textbook.stored((rows, cols), k, bits) for bits, k in counts.items())
        if counts:
            deltas[name] = textbook.compress(delta, hessian, counts)
    return Made(round(used), process_time() - begun, None, deltas)


def _come(shape: tuple[int, int], budget: float) -> dict[int, int]:
    """{bits: ranks} that fit: COME's, then as many at 2 bits as there is room for."""
    counts: dict[int, int] = {}
    for bits, most in (*COME.items(), (2, min(shape))):
        left = min(shape) - sum(counts.values())
        used = sum(textbook.stored(shape, k, b) for b, k in counts.items())
        fits = [
            k
            for k in range(1, min(most, left) + 1)
            if used + textbook.stored(shape, k, bits) <= budget
        ]
        if not fits:
            break
        counts[bits] = fits[-1]
    return counts


def _deltatensors(strategy: str, text: HeldOut, size: int | None, place: Path) -> Made:
    """The package's own file of the delta, read back by it: what it loads, less the base."""
    try:
        import deltatensors
    except ImportError:
        raise CLGraftError(
            f"deltatensors is not installed; `pip install deltatensors=={VERSION}`."
        ) from None
    file, folders = place / "made.wdelta", (str(text.delta.tuned), str(text.delta.base))
    with redirect_stdout(StringIO()):  # it prints
        begun = process_time()
        deltatensors.save_delta_from_paths(file, *folders, strategy=strategy)
        made = process_time() - begun
        begun = process_time()
        loaded: dict[str, Any] = deltatensors.load_delta_from_paths(file, folders[1])
        applied = process_time() - begun
    start = Checkpoint(text.delta.base)
    deltas = {n: torch.as_tensor(x).float() - start.read(n).float() for n, x in loaded.items()}
    return Made(file.stat().st_size, made, applied, deltas)


def _applied(
    file: Path, made: float, decode: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
) -> Made:
    """What a file holds, and the time of decoding it."""
    begun = process_time()
    deltas = decode(load_file(file))
    return Made(file.stat().st_size, made, process_time() - begun, deltas)


_MAKERS: dict[str, Callable[[HeldOut, int | None, Path], Made]] = {
    "LoRA": lora,
    "BitDelta": bitdelta,
    "Delta-CoMe": delta_come,
    **{f"deltatensors {form}": partial(_deltatensors, name) for form, name in DELTATENSORS.items()},
}
