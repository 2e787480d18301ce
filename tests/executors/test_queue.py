"""Which cell is next."""

from __future__ import annotations

from cl_graft.config import RunConfig
from cl_graft.experiment.executors import Outcome
from cl_graft.experiment.queue import LIVES, Queue


def cells(count: int) -> list[RunConfig]:
    return [RunConfig(scenario="mini", strategy="lora", seed=seed) for seed in range(count)]


def test_fresh_cells_go_first_and_those_held_up_wait_when_nothing_else_is_left() -> None:
    a, b, c = cells(3)
    left = Queue([a, b, c])
    assert left.next() == (a, False)
    assert left.after(a, Outcome("busy", "stage x")) is None
    assert [left.next(), left.next()] == [(b, False), (c, False)]
    assert left.next() == (a, True), "now it may wait for what the others make"
    assert left.next() is None


def test_a_cell_that_is_lost_is_tried_again_but_not_for_ever() -> None:
    (a,) = cells(1)
    left, lost = Queue([a]), Outcome("lost", "killed")
    for _ in range(LIVES - 1):
        assert left.next() == (a, False)
        assert left.after(a, lost) is None
    assert left.next() == (a, False)
    assert left.after(a, lost) == lost
    assert left.next() is None


def test_done_and_failed_are_final() -> None:
    a, b = cells(2)
    left = Queue([a, b])
    for outcome in (Outcome("done"), Outcome("failed", "no luck")):
        left.next()
        assert left.after(a, outcome) == outcome
    assert left.next() is None
