"""What is in a pack, as rows of a table."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cl_graft.skillpack.format.file import SkillPack


def relative(sums: list[tuple[float, float]]) -> float:
    """Euclidean norm of what is missed over that of the delta."""
    error, norm = (sum(part) for part in zip(*sums, strict=True)) if sums else (0.0, 0.0)
    return round((error / norm) ** 0.5, 4) if norm else 0.0


def tensor_rows(pack: SkillPack, roles: Mapping[str, str]) -> list[dict[str, Any]]:
    """Codec, rank, bits an element and bytes of every tensor. roles: of those that are known."""
    from cl_graft.skillpack.codecs import payload_bytes, rank_of

    sizes = {name: payload_bytes(*encoded.spec) for name, encoded in pack.tensors.items()}
    total = sum(sizes.values()) or 1
    rows = []
    for name, encoded in pack.tensors.items():
        elements = 1
        for size in encoded.shape:
            elements *= size
        rows.append(
            {
                "tensor": name,
                "role": roles.get(name, ""),
                "shape": list(encoded.shape),
                "codec": encoded.codec,
                "rank": rank_of(encoded),
                "bits": round(8 * sizes[name] / max(elements, 1), 3),
                "bytes": sizes[name],
                "share": sizes[name] / total,
                "elements": elements,
                "stored as": encoded.meta,
            }
        )
    return rows


def role_rows(tensors: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of `tensor_rows`, added up by role."""
    rows = []
    for role in sorted({tensor["role"] for tensor in tensors}):
        those = [tensor for tensor in tensors if tensor["role"] == role]
        ranks = [tensor["rank"] for tensor in those if tensor["rank"] is not None]
        size, elements = (sum(t[key] for t in those) for key in ("bytes", "elements"))
        rows.append(
            {
                "role": role or "(none)",
                "tensors": len(those),
                "codec": ", ".join(sorted({tensor["codec"] for tensor in those})),
                "ranks": sorted({min(ranks), max(ranks)}) if ranks else [],
                "bits": round(8 * size / max(elements, 1), 3),
                "bytes": size,
                "share": sum(tensor["share"] for tensor in those),
            }
        )
    return rows


def print_rows(rows: list[dict[str, Any]], title: str | None = None) -> None:
    """A table whose columns are the keys of the rows."""
    from rich.console import Console
    from rich.table import Table

    keys = list(dict.fromkeys(key for row in rows for key in row))
    keys = [key for key in keys if key != "elements"]
    table = Table(*(key.replace("_", " ") for key in keys), title=title, title_justify="left")
    for row in rows:
        table.add_row(*(cell(row.get(key), key) for key in keys))
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def cell(value: object, key: str = "") -> str:
    """A value as a reader wants it, by the column that it is in."""
    if value is None:
        return "-"
    if key == "share":
        return f"{value:.1%}"
    if key == "shape" and isinstance(value, Iterable):
        return "x".join(map(str, value))
    if key == "ranks" and isinstance(value, list):
        return " to ".join(map(str, value)) or "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
