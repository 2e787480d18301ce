"""A built folder as a task's training data."""

from __future__ import annotations

from pathlib import Path

from cl_graft.store.digests import digest
from cl_graft.store.files import RecordError
from cl_graft.task import Example, Logits, Pair
from cl_graft.transfer import folder


def read_examples(out: Path) -> tuple[Example, ...]:
    """The SFT rows, in the order of the prompts.

    Raises RecordError for a folder without its marker, with a changed file, or without a row.
    """
    rows = folder.read_rows(out, folder.SFT)
    if not rows:
        raise RecordError(f"{out} holds no SFT row; build it from other sources or prompts.")
    numbers = range(len(rows)) if folder.logits_of(out) else [None] * len(rows)
    return tuple(
        Example(row["prompt"], row["completion"], row=n)
        for n, row in zip(numbers, rows, strict=True)
    )


def read_pairs(out: Path) -> tuple[Pair, ...]:
    """The DPO rows, in the order of the prompts; none where no pair was left.

    Raises RecordError for a folder without its marker or with a changed file.
    """
    rows = folder.read_rows(out, folder.DPO)
    return tuple(Pair(row["prompt"], row["chosen"], row["rejected"]) for row in rows)


def read_logits(out: Path) -> Logits | None:
    """What the sources say of the SFT rows; None where the build has stored none.

    Raises RecordError for a folder without its marker or with a changed file.
    """
    files = folder.logits_of(out)
    return Logits(out, digest(files)) if files else None
