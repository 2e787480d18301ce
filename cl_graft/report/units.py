"""Counts as a reader wants them."""

from __future__ import annotations


def size(count: float) -> str:
    """Bytes in the unit that suits them."""
    for unit, length in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= length:
            return f"{count / length:.1f} {unit}"
    return f"{count:.0f} B"


def duration(seconds: float) -> str:
    """A duration in seconds, minutes or hours."""
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 90 else f"{seconds:.0f} s"
