"""How `cl-graft`, run in the process of a test, ended; the fixture `call` runs it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def reason(self) -> str:
        """The one sentence of an error; what else is on stderr is progress."""
        last = self.err.rstrip("\n").split("\n")[-1]
        assert self.code == 1 and last.startswith("error: ") and last.endswith((".", "?")), self
        assert self.err.count("error: ") == 1
        return last


Call = Callable[..., Done]


def assert_refused(done: Done, *words: str) -> None:
    """Exit code 1, and one sentence on stderr with these words."""
    assert (done.code, done.out) == (1, ""), done
    assert done.err.startswith("error: ")
    assert done.err.endswith((".\n", "?\n"))
    assert done.err.count("\n") == 1
    assert "Traceback" not in done.err
    for word in words:
        assert word in done.err
