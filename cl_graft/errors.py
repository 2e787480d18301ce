"""Errors a user can act on: one sentence that says what was wrong, where, and the cure."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class CLGraftError(Exception):
    """Base of every error this package raises on purpose; the CLI prints it and exits with 1."""


def first_line(error: BaseException) -> str:
    """The first line of what an error of a library says, to stand in a sentence of ours: without its full stop."""
    return str(error).strip().split("\n", 1)[0].rstrip(".")


class UnknownName(CLGraftError):
    """A name that nothing answers to; the message offers the nearest ones.

    other: what else than a known name could be given, in words.
    """

    def __init__(self, kind: str, name: str, known: Iterable[str], other: str = ""):
        known = sorted({*known} - {name})  # it may be known to another kind
        close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(close)}?"
        if not close:
            hint = f"known: {', '.join(known) or 'none'}{other and f'; or give {other}'}."
        super().__init__(f"there is no {kind} named {name!r}; {hint}")
        self.kind, self.name, self.known = kind, name, known


class Diverged(CLGraftError):
    """Training came to numbers that are none. Nothing of the stage is kept, step checkpoints included."""


class Refused(CLGraftError):
    """A disk or a network did not take or give a file, or the cell's folder tells another experiment. The cell is as
    it was, and the same command continues it once that is mended."""


class AuthorMistake(CLGraftError):
    """What a plug-in's author has to mend in its file; the message begins with the file and the line."""


class OverBudget(CLGraftError):
    """A method's artefact does not fit the storage declared for a task."""


# what torchvision says where its operators were compiled for another torch, as PyPI's is beside a torch without CUDA
MISMATCH = ("torchvision::", "torchvision.extension", "torchvision/")
TORCHVISION = (
    "install the torchvision that was built for this torch, from the index that torch came from, or, on Python 3.11 "
    "without CUDA, `pip install --no-deps torchvision==0.16.2`"
)


class TorchvisionMismatch(CLGraftError, ImportError):
    """Avalanche imports torchvision, and the one that is installed was built for another torch."""


@contextmanager
def matched_torchvision() -> Iterator[None]:
    """What a torchvision of another torch breaks while something is imported is a sentence with the cure."""
    try:
        yield
    except (ImportError, RuntimeError, OSError) as error:
        if not any(mark in str(error) for mark in MISMATCH):
            raise
        said = first_line(error)
        raise TorchvisionMismatch(
            f"torchvision, which Avalanche imports, does not fit the torch that is installed ({said}); {TORCHVISION}."
        ) from error


@contextmanager
def errors_alone(library: str) -> Iterator[None]:
    """Keep what a library logs off the screen within, but for errors."""
    logger = logging.getLogger(library)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
