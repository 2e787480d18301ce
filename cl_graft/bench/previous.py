"""The engine beside an earlier commit of itself, at equal bytes and at equal error, on deltas that training made.

Both make a pack within the same share of the base, which each meets from below by some tenths of a per cent at most, so
that a commit beside itself has ratios of exactly one.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cl_graft.bench.cells import Cells
from cl_graft.bench.deltas import Delta, embedded_deltas, smollm2_delta
from cl_graft.bench.engines import Engine, Made, this_engine
from cl_graft.bench.held_out import ERROR_ROWS, KL_ROWS, HeldOut

EMBEDDED, SMOLLM2 = ("2%", "5%", "10%"), ("0.3%", "1%", "5%")
KL_BUDGETS = ("0.3%", "1%")
STEPS = 12

Row = dict[str, Any]  # delta, budget, and the figures of both: {"previous": {...}, "this": {...}}


def error_over_previous(previous: Path, data_dir: Path | None, cells: Cells) -> dict[str, Any]:
    """Held-out output error of this engine over the previous one's, at equal bytes: mean over deltas and budgets."""
    rows = _all(previous, data_dir, cells)
    for row in rows:
        row["error_over_previous"] = row["this"]["error"] / row["previous"]["error"]
    return {
        "error_over_previous": _mean(row["error_over_previous"] for row in rows),
        "rows": rows,
        "conditions": _conditions(previous, "budgets are shares of the base in bf16"),
    }


def bytes_at_equal_error(previous: Path, data_dir: Path | None, cells: Cells) -> dict[str, Any]:
    """Bytes that this engine needs for the previous one's error, over the bytes of that: mean over what is between
    this engine's measured errors."""
    rows = _all(previous, data_dir, cells)
    found = []
    for name in dict.fromkeys(row["delta"] for row in rows):
        mine = [row for row in rows if row["delta"] == name]
        curve = [(row["this"]["error"], row["this"]["bytes"]) for row in mine]
        for row in mine:
            needed = interpolated(curve, row["previous"]["error"])
            ratio = needed and needed / row["previous"]["bytes"]
            told = {key: row[key] for key in ("delta", "budget")}
            found.append({**told, "error": row["previous"]["error"], "bytes_at_equal_error": ratio})
    ratios = [row["bytes_at_equal_error"] for row in found if row["bytes_at_equal_error"]]
    how = "bytes between two budgets by a straight line of the logarithms of bytes and error"
    return {
        "bytes_at_equal_error": _mean(ratios) if ratios else None,
        "rows": found,
        "conditions": _conditions(previous, how),
    }


def kl_over_previous(previous: Path, data_dir: Path | None, cells: Cells) -> dict[str, Any]:
    """KL(tuned, grafted) with this engine's pack over that with the previous one's, at equal bytes, on SmolLM2."""
    delta = smollm2_delta(STEPS, data_dir, cells.say)
    rows = _compared(delta, KL_BUDGETS, previous, cells)
    for row in rows:
        row["kl_over_previous"] = row["this"]["kl"] / row["previous"]["kl"]
    how = f"nats a token on {KL_ROWS} test examples; weights merged and logits in float32"
    return {
        "kl_over_previous": _mean(row["kl_over_previous"] for row in rows),
        "rows": rows,
        "conditions": _conditions(previous, how),
    }


def coding(data_dir: Path | None, cells: Cells) -> dict[str, Any]:
    """Bytes of SmolLM2's packs on disk over those at the measured entropy of their whole numbers, the most of all."""
    text = HeldOut(smollm2_delta(STEPS, data_dir, cells.say))
    rows = [{"budget": b} | engine_cell(this_engine(), text, b, cells) for b in SMOLLM2]
    for row in rows:
        row["bytes_over_entropy"] = row["bytes"] / row["entropy_bytes"]
    return {
        "bytes_over_entropy": max(row["bytes_over_entropy"] for row in rows),
        "rows": rows,
        "conditions": {"delta": text.delta.name, "layout": "small"},
    }


def interpolated(curve: Sequence[tuple[float, float]], error: float) -> float | None:
    """The bytes at which a curve of (error, bytes) has this error; None where no two points have it between them."""
    points = sorted(curve)
    for (low, more), (high, fewer) in zip(points, points[1:], strict=False):
        if low <= error <= high and low < high:
            share = math.log(error / low) / math.log(high / low)
            return math.exp((1 - share) * math.log(more) + share * math.log(fewer))
    return None


def _all(previous: Path, data_dir: Path | None, cells: Cells) -> list[Row]:
    rows = []
    for delta in embedded_deltas(data_dir):
        rows += _compared(delta, EMBEDDED, previous, cells)
    return rows + _compared(smollm2_delta(STEPS, data_dir, cells.say), SMOLLM2, previous, cells)


def _compared(delta: Delta, budgets: Sequence[str], previous: Path, cells: Cells) -> list[Row]:
    text, rows = HeldOut(delta), []
    for budget in budgets:
        before = engine_cell(Engine("previous", previous), text, budget, cells)
        now = engine_cell(this_engine(), text, budget, cells)
        rows.append({"delta": delta.name, "budget": budget, "previous": before, "this": now})
    return rows


def engine_cell(engine: Engine, text: HeldOut, budget: str, cells: Cells) -> dict[str, Any]:
    """Figures of an engine's pack within a budget: bytes, seconds, held-out error and KL; measured now or read back."""
    about = {"engine": engine.name, "engine_digest": engine.digest, "budget": budget}

    def measure() -> dict[str, Any]:
        with tempfile.TemporaryDirectory(prefix="cl-graft-bench-") as place:
            return figures(engine.make(text.delta, budget, Path(place)), text)

    return cells.measured(about | conditions(text), measure)


def conditions(text: HeldOut) -> dict[str, Any]:
    """What the figures of a cell depend on besides what made the approximation."""
    delta = text.delta
    return {"delta": delta.name, "delta_digest": delta.digest, "rows": [ERROR_ROWS, KL_ROWS]}


def figures(made: Made, text: HeldOut) -> dict[str, Any]:
    """All that is measured of an approximation."""
    return made.about | {"error": text.error(made.deltas)} | text.kl(made.deltas)


def _mean(values: Any) -> float:
    found = list(values)
    return sum(found) / len(found)


def _conditions(previous: Path, *more: str) -> dict[str, Any]:
    return {
        "previous": Engine("previous", previous).digest[:12],
        "this": this_engine().digest[:12],
        "calibration": "64 training examples",
        "held out": f"{ERROR_ROWS} test examples; error of each matrix's output, mean over the decoder's",
        "how": "; ".join(more),
    }
