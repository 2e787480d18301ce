"""What a 16-bit dtype leaves of a real delta: how far base + delta, rounded, answers from the tuned model.

Base weights are first rounded to bfloat16, as published checkpoints are; the delta is that of the folders, and their
float32 sum is the tuned model. Every way of writing that sum is then run in float32, so that nothing but the rounding
of weights tells it from the tuned model.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cl_graft.bench.cells import Cells
from cl_graft.bench.deltas import CALIBRATION, STEPS, smollm2_delta
from cl_graft.bench.held_out import KL_ROWS, HeldOut, divergence, log_probabilities
from cl_graft.bench.previous import conditions
from cl_graft.models.load import load
from cl_graft.skillpack.compress.calibrate import Moments
from cl_graft.skillpack.folders.checkpoint import Checkpoint
from cl_graft.skillpack.rounding import compensated, seed_of, stochastic
from cl_graft.version import __version__

# (parameter, base, delta) -> the sum as it was written
Write = Callable[[str, Tensor, Tensor], Tensor]
BF16, F16 = torch.bfloat16, torch.float16
DEFAULT = "bfloat16, stochastic"


def bf16_kl_share(data_dir: Path | None, cells: Cells) -> dict[str, Any]:
    """KL of the rounded model over the KL that there is to lose, for every way of writing SmolLM2's two deltas.

    `bf16_kl_share` is that of stochastic rounding to bfloat16, the largest over the deltas, over all held-out tokens
    and over those of the answers alone. Of each row of `deltas`: kl and kl_answers, nats a token, from the tuned
    model's next-token distribution to that of the rounded one; lost and lost_answers, these over those of the base;
    kept, the projection of what was added on the delta, over the delta. Raises NotFetched, DataError.
    """
    deltas = of_deltas("bf16_kl_share", _delta, data_dir, cells)
    chosen = [next(r for r in found["rows"] if r["how"] == DEFAULT) for found in deltas]
    return {
        "bf16_kl_share": {key: max(row[key] for row in chosen) for key in ("lost", "lost_answers")},
        "deltas": deltas,
        "conditions": {
            "base": "SmolLM2's weights in bfloat16, as published; what is run is float32",
            "calibration": f"{CALIBRATION} training examples, for the compensated form",
        },
    }


def of_deltas(
    part: str,
    measure: Callable[[HeldOut], dict[str, Any]],
    data_dir: Path | None,
    cells: Cells,
    **about: Any,
) -> list[dict[str, Any]]:
    """What `measure` finds of each of SmolLM2's two deltas, kept as cells. about: on what else it depends."""
    found = []
    for steps in STEPS:
        text = HeldOut(smollm2_delta(steps, data_dir, cells.say))
        cell = {"part": part, "version": __version__, **conditions(text), **about}
        found.append(cells.measured(cell, partial(measure, text)))
    return found


def rounding_rows(part: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Rows of the benchmark's table."""
    return [
        (
            f"KL lost, {found['delta']}, {row['how']}",
            f"{row['lost']:.2g}",
            f"KL {row['kl']:.3g} of {found['base']['kl']:.3g}; {row['lost_answers']:.2g} of it on the answers; "
            f"{row['kept']:.1%} of the delta kept, which is {found['size']:.2g} of the weights",
        )
        for found in part["deltas"]
        for row in found["rows"]
    ]


def _delta(text: HeldOut) -> dict[str, Any]:
    base = Checkpoint(text.delta.base)
    model = load(str(text.delta.base))[0]
    changed = [name for name, _ in model.named_parameters() if bool(text.change(name).any())]
    start = {name: base.read(name).float().to(BF16).float() for name in changed}
    delta = {name: text.change(name) for name in changed}
    batches = list(text.batches(text.delta.test[:KL_ROWS]))
    parameters = dict(model.named_parameters())

    @torch.no_grad()
    def put(write: Write) -> float:
        """Write all tensors; the share of the delta that is kept."""
        along = size = 0.0
        for name, before in start.items():
            parameters[name].copy_(write(name, before, delta[name]))
            added = parameters[name] - before
            along += float((added * delta[name]).sum(dtype=torch.float64))
            size += float(delta[name].square().sum(dtype=torch.float64))
        return along / size

    def written(write: Write) -> dict[str, float]:
        kept = put(write)
        found = divergence(truth, (log_probabilities(model, batch) for batch in batches), batches)
        return found | {"kept": kept}

    put(lambda name, before, change: before + change)
    truth = [log_probabilities(model, batch) for batch in batches]
    measured = text.moments(text.delta.train[:CALIBRATION])
    whole = written(lambda name, before, change: before)
    rows = []
    for how, write in _ways(measured).items():
        found = written(write)
        found["lost"] = found["kl"] / whole["kl"]
        found["lost_answers"] = found["kl_answers"] / whole["kl_answers"]
        rows.append({"how": how, **found})
    squares = [sum(float(x.double().square().sum()) for x in t.values()) for t in (delta, start)]
    size = (squares[0] / squares[1]) ** 0.5
    return {"delta": text.delta.name, "size": size, "base": whole, "rows": rows}


def _ways(measured: Moments) -> dict[str, Write]:
    """Each way of writing base + delta, by what it is called."""

    def seed(name: str) -> int:
        return seed_of(["bench"], name)

    def compensate(dtype: torch.dtype) -> Write:
        def write(name: str, before: Tensor, change: Tensor) -> Tensor:
            hessian = measured.hessian(name)
            if hessian is None or hessian.ndim < 2 or before.ndim != 2:
                return stochastic(before + change, dtype, seed(name))
            return compensated(before + change, dtype, hessian, seed(name))

        return write

    return {
        "bfloat16, nearest": lambda name, w, d: (w + d).to(BF16),
        "difference of bfloat16 checkpoints": lambda name, w, d: (
            w + ((w + d).to(BF16) - w.to(BF16))
        ),
        "float16, nearest": lambda name, w, d: (w + d).to(F16),
        "float16, stochastic": lambda name, w, d: stochastic(w + d, F16, seed(name)),
        DEFAULT: lambda name, w, d: stochastic(w + d, BF16, seed(name)),
        "bfloat16, compensated": compensate(BF16),
        "attached, delta in bfloat16": lambda name, w, d: w + d.to(BF16),
    }
