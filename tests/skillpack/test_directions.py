"""Directions between measuring and encoding: how many, how many bytes of the work store, found again where they are not."""

from __future__ import annotations

from math import prod

import pytest
import torch

from cl_graft.skillpack.compress import directions
from cl_graft.skillpack.compress.directions import Directions, directions_bytes, wanted_directions
from cl_graft.skillpack.compress.factorise import spectrum
from cl_graft.skillpack.compress.policy import Adaptive, Paper

SHAPES = {"q": (256, 256), "k": (64, 256), "down": (256, 768)}


def test_a_matrix_gets_as_many_as_its_share_of_the_bytes_holds():
    """At 1.4 bits an entry: 5 % of 2 bytes an entry are 6,553.6 bytes for q, 89.6 a rank; 16 and all are the limits."""
    limit = int(0.05 * 2 * sum(map(prod, SHAPES.values())))
    found = wanted_directions(SHAPES, Adaptive(), limit)
    assert found == {"q": 74, "k": 30, "down": 110}
    assert wanted_directions(SHAPES, Adaptive(), limit // 5) == {"q": 16, "k": 16, "down": 22}
    assert wanted_directions(SHAPES, Adaptive(), 10**9) == {"q": 256, "k": 64, "down": 256}
    assert wanted_directions(SHAPES, Paper(), limit) == {"q": 256, "k": 64, "down": 256}


def test_the_first_matrices_that_the_room_holds_are_kept(monkeypatch):
    monkeypatch.setattr(directions, "DIRECTIONS_BYTES", 4 * (35 * 256 + 52 * 256))
    wanted = {"q": 35, "k": 16, "down": 52}
    assert directions_bytes(SHAPES, wanted) == {"q": 35 * 1024, "k": 16 * 256}
    monkeypatch.setattr(directions, "DIRECTIONS_BYTES", 0)
    assert directions_bytes(SHAPES, wanted) == {}


@pytest.mark.parametrize(
    ("room", "ranks", "found_again"), [(10**6, 30, 0), (10**6, 80, 1), (0, 30, 1)]
)
def test_directions_are_taken_from_the_store_or_found_again(monkeypatch, room, ranks, found_again):
    monkeypatch.setattr(directions, "DIRECTIONS_BYTES", room)
    delta = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    store = {}
    limit = int(0.05 * 2 * sum(map(prod, SHAPES.values())))
    found = Directions(SHAPES, Adaptive(), limit, store, torch.device("cpu"))
    assert not found.found("q")
    measured = found.find("q", delta, None)
    assert found.found("q") and torch.equal(found.energy("q"), measured.energy)
    assert sum(
        t.numel() * 4 for key in store for t in store[key].tensors.values() if "directions" in key
    ) == (found.kept.get("q", 0))
    calls = []

    def counted(*given):
        calls.append(given)
        return spectrum(*given)

    monkeypatch.setattr(directions, "spectrum", counted)
    taken = found.take("q", delta, None, ranks)
    assert len(calls) == found_again and taken.directions >= ranks
    if ranks == 30:
        assert torch.equal(taken.basis, measured.basis)
    found.drop("q")
    assert not any(key.startswith("directions/") for key in store)
    found.drop("q")
