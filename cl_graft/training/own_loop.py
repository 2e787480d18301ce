"""The end of a training loop that is a method's own: stages keep their seconds themselves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter

from torch.optim.optimizer import register_optimizer_step_post_hook


@dataclass
class Steps:
    """last: when an optimizer of torch's last stepped, by `perf_counter`; None where none did."""

    last: float | None = None

    def note(self, *_: object) -> None:
        self.last = perf_counter()


@contextmanager
def counted() -> Iterator[Steps]:
    """Watch every optimizer of the process as long as the context lasts."""
    steps = Steps()
    handle = register_optimizer_step_post_hook(steps.note)
    try:
        yield steps
    finally:
        handle.remove()
