"""Errors a user can act on: one sentence that says what was wrong, where, and the cure."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class CLGraftError(Exception):
    """Base of every error this package raises on purpose; the CLI prints it and exits with 1."""


class UnknownName(CLGraftError):
    """A name that nothing answers to; the message offers the nearest ones."""

    def __init__(self, kind: str, name: str, known: Iterable[str]):
        known = sorted(known)
        close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(known)}."
        super().__init__(f"there is no {kind} named {name!r}; {hint}")
        self.kind, self.name, self.known = kind, name, known


class Diverged(CLGraftError):
    """Training came to numbers that are none. Nothing of the stage is kept, step checkpoints included."""


class Refused(CLGraftError):
    """A disk or a network did not take or give a file. The cell is as it was, and the same command continues it."""


class OverBudget(CLGraftError):
    """A method's artefact does not fit the storage declared for a task."""
