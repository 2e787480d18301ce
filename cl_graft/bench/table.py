"""The benchmark's figures as Markdown, and on disk with what made them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from cl_graft.bench.anatomy import anatomy_rows
from cl_graft.bench.outputs import outputs_rows
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
        "# The pack engine beside the paper's scheme, its own past, and others' methods",
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
        *_previous_rows(part),
        (
            "time_ratio",
            f"{part['time_ratio']:.1f}",
            f"{told}; calibration on {about['calibration']}; "
            f"error {mean['textbook']:.3f} -> {mean['ours']:.3f}",
        ),
        ("time_ratio, no calibration", f"{part['time_ratio_without_calibration']:.1f}", told),
    ]


def _previous_rows(part: dict[str, Any]) -> list[tuple[str, str, str]]:
    if "engines" not in part:
        return []
    before, now = part["engines"]["previous"], part["engines"]["now"]
    told = ", ".join(
        f"{kind} {before[kind]:.1f} s -> {now[kind]:.1f} s" for kind in ("calibration", "rest")
    )
    told += f"; error {before['error']:.4f} -> {now['error']:.4f}"
    return [("layer_time_over_previous", f"{part['layer_time_over_previous']:.2f}", told)]


def _disk_rows(part: dict[str, Any]) -> list[tuple[str, str, str]]:
    about = part["conditions"]
    told = (
        f"counted, at {about['budget']}; a checkpoint of {about['checkpoint_mb']:,.0f} MB: "
        f"{part['measured_gb']:.2f} GB measured, {part['counted_gb']:.2f} GB counted"
    )
    return [("work_disk_8b_gb", f"{part['work_disk_8b_gb']:.2f}", told)]


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


def _lossless_rows(part: dict[str, Any]) -> list[tuple[str, str, str]]:
    about = part["conditions"]
    rows = [("lossless", "share of the tuned file", f"the others: {about['sample']}")]
    for row in part["rows"]:
        others = ", ".join(f"{how} {share:.1%}" for how, share in row["others"].items())
        told = f"{row['changed']:.1%} of the values differ; {others}; made in {row['make_seconds']:.0f} s, "
        told += f"applied in {row['apply_seconds']:.0f} s"
        rows.append((f"lossless, {row['delta']}, {row['dtype']}", f"{row['share']:.1%}", told))
    rows += [
        (f"published: {what}", f"{share:.1%}", "") for what, share in about["published"].items()
    ]
    return rows


def _methods_rows(part: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The methods of each budget, the one of the least error first; those that were refused last."""
    told = f"{part['delta']}, {part['matrices']} matrices"
    rows = [("loss, tuned and base", f"{part['tuned_loss']:.3f}, {part['base_loss']:.3f}", told)]
    order = [row["budget"] for row in part["rows"]]
    for row in sorted(part["rows"], key=lambda r: (order.index(r["budget"]), r.get("error", 9e9))):
        options = ", ".join(f"{name}={value}" for name, value in row["options"].items())
        name = row["method"] + (f"({options})" if options else "")
        value, about = "-", row.get("refused", "")
        if "error" in row:
            value = f"{row['error']:.3f}"
            about = (
                f"loss {row['loss']:.3f}, worst matrix {row['worst']:.2f}; {row['bytes']:,} bytes, "
                f"{row['of_budget']:.0%} of the budget; {row['seconds']:.0f} s"
            )
        rows.append((f"error, {name}, {row['budget']}", value, about))
    return rows


def _ratio_rows(key: str, part: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The mean, and a row for each delta and budget."""
    about, value = part["conditions"], part[key]
    told = "; ".join(f"{what}: {about[what]}" for what in ("how", "calibration", "held out"))
    told += f"; engine {about['this']} over {about['previous']}"
    rows = [(key, "none" if value is None else f"{value:.3f}", told)]
    for row in part["rows"]:
        ratio = row[key]
        shown = "outside what was measured" if ratio is None else f"{ratio:.3f}"
        rows.append((f"{key}, {row['delta']}, {row['budget']}", shown, _sides(key, row)))
    return rows


def _sides(key: str, row: dict[str, Any]) -> str:
    if "this" not in row:
        return f"at an error of {row['error']:.4f}"
    what = "kl" if key == "kl_over_previous" else "error"
    before, now = row["previous"], row["this"]
    return (
        f"{before[what]:.3g} -> {now[what]:.3g} in {before['bytes']:,} -> {now['bytes']:,} bytes, made in "
        f"{before['make_seconds']:.0f} -> {now['make_seconds']:.0f} s, decoded in "
        f"{before['apply_seconds']:.1f} -> {now['apply_seconds']:.1f} s"
    )


def _peer_rows(part: dict[str, Any]) -> list[tuple[str, str, str]]:
    told = [("peers", part["conditions"]["delta"], _told(part["conditions"], "delta"))]
    return told + [
        (f"{row['method']}, {row['bytes']:,} bytes", f"KL {row['kl']:.3g}", _figures(row))
        for row in part["rows"]
    ]


def _deltatensors_rows(part: dict[str, Any]) -> list[tuple[str, str, str]]:
    return [
        (
            f"deltatensors_kl_ratio, {row['form']}",
            f"{row['deltatensors_kl_ratio']:.3g}",
            f"at {row['theirs']['bytes']:,} bytes: theirs KL {row['theirs']['kl']:.3g}, {_figures(row['theirs'])}; "
            f"ours KL {row['this']['kl']:.3g}, {_figures(row['this'])}",
        )
        for row in part["rows"]
    ]


def _coding_rows(part: dict[str, Any]) -> list[tuple[str, str, str]]:
    return [
        (
            f"bytes_over_entropy, {part['conditions']['delta']}, {row['budget']}",
            f"{row['bytes_over_entropy']:.4f}",
            f"{row['bytes']:,} bytes, {row['entropy_bytes']:,} at the entropy of its codes",
        )
        for row in part["rows"]
    ]


def _figures(row: dict[str, Any]) -> str:
    applied = "" if row["apply_seconds"] is None else f", applied in {row['apply_seconds']:.1f} s"
    return f"error {row['error']:.3f}, made in {row['make_seconds']:.0f} s{applied}"


def _told(conditions: dict[str, Any], *without: str) -> str:
    return "; ".join(f"{key}: {value}" for key, value in conditions.items() if key not in without)


_ROWS: dict[str, Callable[[dict[str, Any]], list[tuple[str, str, str]]]] = {
    "error": _error_rows,
    "time": _time_rows,
    "memory": _memory_rows,
    "disk": _disk_rows,
    "merge": _merge_rows,
    "bytes": _bytes_rows,
    "lossless": _lossless_rows,
    "methods": _methods_rows,
    **{
        key: partial(_ratio_rows, key)
        for key in (
            "error_over_previous",
            "bytes_at_equal_error",
            "kl_over_previous",
            "experts_over_previous",
        )
    },
    "peers": _peer_rows,
    "deltatensors_kl_ratio": _deltatensors_rows,
    "bf16_kl_share": rounding_rows,
    "bf16_outputs_kept": outputs_rows,
    "bytes_over_entropy": _coding_rows,
    "anatomy": anatomy_rows,
}
