"""The benchmark's figures as Markdown, and on disk with what made them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cl_graft.bench.rounding import rounding_rows
from cl_graft.store.digests import machine, versions
from cl_graft.store.files import write_json, write_text

HEADINGS = ("figure", "value", "conditions")


def markdown(figures: dict[str, Any]) -> str:
    """The figures as a Markdown table, a row each; a part that was not measured has none."""
    rows = [row for part in figures for row in _ROWS[part](figures[part])]
    lines = [HEADINGS, ("---", "--:", "---"), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def write(figures: dict[str, Any], folder: Path, commands: Sequence[str]) -> None:
    """pack.md and pack.json in the folder, with the commands, versions and machine that made them."""
    about = {**versions(), **machine()}
    whole = {**figures, "commands": list(commands), "made_by": about}
    write_json(folder / "pack.json", whole)
    lines = [
        "# The pack engine beside a textbook implementation of the paper's scheme",
        "",
        markdown(figures),
        "",
        "Made by the commands below; every comparison is a ratio within one run.",
        "",
        *("    " + command for command in commands),
        "",
        *(f"- {key}: {value}" for key, value in about.items()),
    ]
    write_text(folder / "pack.md", "\n".join(lines) + "\n")


def _error_rows(part: dict[str, Any]) -> list[tuple[str, str, str]]:
    return [
        (
            f"error_ratio, {row['delta']}",
            f"{row['error_ratio']:.2f}",
            f"{row['matrices']} matrices, error {row['textbook_error']:.3f} -> {row['error']:.3f}; "
            f"{row['error_ratio_same_bytes_each']:.2f} at the same bytes in every matrix",
        )
        for row in part["deltas"]
    ]


def _time_rows(part: dict[str, Any]) -> list[tuple[str, str, str]]:
    about, mean = part["conditions"], part["mean_error"]
    told = f"{about['matrices']}; {about['threads']} threads, {about['dtype']}"
    return [
        (
            "time_ratio",
            f"{part['time_ratio']:.1f}",
            f"{told}; calibration on {about['calibration']}; "
            f"error {mean['textbook']:.3f} -> {mean['ours']:.3f}",
        ),
        ("time_ratio, no calibration", f"{part['time_ratio_without_calibration']:.1f}", told),
    ]


def _memory_rows(part: dict[str, Any]) -> list[tuple[str, str, str]]:
    runs = ", ".join(
        f"{r['layers']} layers ({r['checkpoint_mb']:,.0f} MB): {r['extra_mb']:,.0f} MB"
        for r in part["runs"]
    )
    told = f"beyond the largest tensor ({part['largest_tensor_mb']:,.0f} MB in float32); {runs}"
    return [("peak_extra_mb", f"{part['peak_extra_mb']:,.0f}", told)]


def _merge_rows(part: dict[str, Any]) -> list[tuple[str, str, str]]:
    rows = []
    for run in part["runs"]:
        told = (
            f"{run['dtype']}, pack of {run['share']:.0%} in layout {run['layout']}, {run['threads']} threads, "
            f"{run['parameters'] / 1e6:.0f} M weights in {len(run['shapes'])} matrices"
        )
        if "small_decode_s_per_100mb" in run:
            name = "small_decode_s_per_100mb"
            rows.append(
                (name, f"{run[name]:.2f}", f"{told}; to factors, 100 MB of bfloat16 weights")
            )
            continue
        rows += [
            (name, f"{run[name]:.2f}", f"{told}; {run[of]:.0f} ms")
            for name, of in (("merge_over_product", "merge_ms"), ("switch_over_merge", "switch_ms"))
        ]
    return rows


def _bytes_rows(part: dict[str, Any]) -> list[tuple[str, str, str]]:
    told = f"{part['bytes']:,} bytes, {part['theory_bytes']:,} in theory"
    return [("bytes_over_theory", f"{part['bytes_over_theory']:.4f}", told)]


_ROWS = {
    "error": _error_rows,
    "time": _time_rows,
    "memory": _memory_rows,
    "merge": _merge_rows,
    "bytes": _bytes_rows,
    "rounding": rounding_rows,
}
