"""Moments of a folder that are made anew at each visit: what is kept of them, and what the work folder comes to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cl_graft.bench.disk import LLAMA_8B, counted
from cl_graft.models.meta_model import meta_model
from cl_graft.skillpack.compress import create as creating
from cl_graft.skillpack.compress import directions
from cl_graft.skillpack.compress.calibrate import Moments, moments
from cl_graft.skillpack.compress.calibrated import Calibrated, Calibration
from cl_graft.skillpack.compress.create import create, moments_bytes, work_bytes
from cl_graft.skillpack.compress.policy import Adaptive
from cl_graft.skillpack.compress.work import Piece
from cl_graft.skillpack.compress.work_store import Folder
from cl_graft.skillpack.folders.checkpoint import Checkpoint
from cl_graft.skillpack.folders.pair import pair
from tests.skillpack.test_create import BATCH, folders

BATCHES = [BATCH, {name: x.flip(0) for name, x in BATCH.items()}]


def calibrated(base: Path, after: Path, store: Any, keep: bool = False) -> Calibrated:
    pairing, seconds = pair(Checkpoint(base), Checkpoint(after)), dict[str, float]()
    return Calibrated(
        pairing,
        meta_model(after),
        Calibration(BATCHES),
        store,
        None,
        "cpu",
        lambda what, done: None,
        seconds,
        keep,
    )


def visited(known: Any, wanted: Any = lambda group: True) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    known.visit(found.__setitem__, wanted)
    return found


@pytest.fixture
def known(tmp_path: Path) -> tuple[Calibrated, Moments, dict[str, Any], tuple[Path, Path]]:
    """Of the folder, and of the same model in memory."""
    from transformers import AutoModelForCausalLM

    base, after, _ = folders(tmp_path)
    store: dict[str, Any] = {}
    model = AutoModelForCausalLM.from_pretrained(after)
    inputs = moments(model, BATCHES, gradients=False)
    outputs = moments(model, BATCHES[:1]).outputs
    return (
        calibrated(base, after, store),
        Moments(inputs.inputs, inputs.reads, outputs),
        store,
        (base, after),
    )


def test_visits_give_what_the_model_in_memory_reads_with_the_same_bits_each_time(known) -> None:
    streamed, memory, _, _ = known
    first, again = visited(streamed), visited(streamed)
    assert list(first) == list(visited(memory)) and dict(streamed.reads) == memory.reads
    assert all(torch.equal(first[group], again[group]) for group in first)
    for group, moment in visited(memory).items():
        torch.testing.assert_close(first[group], moment, rtol=1e-4, atol=1e-6)
    for name in memory.reads:
        torch.testing.assert_close(streamed.diagonal(name), memory.diagonal(name))
    for name, gradient in memory.outputs.items():
        torch.testing.assert_close(streamed.outputs[name], gradient, rtol=1e-4, atol=1e-9)
    assert streamed.diagonal("no such tensor") is None is memory.diagonal("no such tensor")


def test_the_store_holds_nothing_square(known) -> None:
    streamed, _, store, _ = known
    largest = max(moment.numel() for moment in visited(streamed).values())
    assert largest == 48 * 48
    assert max(t.numel() for item in store.values() for t in item.tensors.values()) == 96


def test_moments_that_are_kept_are_not_made_twice(known, monkeypatch: pytest.MonkeyPatch) -> None:
    anew, _, _, (base, after) = known
    store: dict[str, Any] = {}
    kept = calibrated(base, after, store, keep=True)
    first, later = visited(kept), calibrated(base, after, store, keep=True)

    def never(*_: object, **__: object) -> None:
        raise AssertionError("all is known")

    kept.stream = later.stream = never
    for each in (kept, later):
        again = visited(each)
        assert again.keys() == first.keys()
        assert all(torch.equal(again[group], moment) for group, moment in visited(anew).items())
    some = [group for group in visited(kept) if "down" in group]
    assert list(visited(later, lambda group: "down" in group)) == some and some


def test_reads_are_known_when_a_group_is_visited(known) -> None:
    streamed, memory, _, _ = known

    def use(group: str, moment: torch.Tensor) -> None:
        mine = {name for name, read in streamed.reads.items() if read == group}
        assert mine == {name for name, read in memory.reads.items() if read == group}

    streamed.visit(use, lambda group: True)


def test_a_later_run_knows_what_was_visited_and_runs_nothing_for_nothing(
    known, monkeypatch: pytest.MonkeyPatch
) -> None:
    streamed, memory, store, (base, after) = known

    class Killed(Exception):
        pass

    def die(group: str, moment: torch.Tensor) -> None:
        if "layers.1" in group:
            raise Killed

    with pytest.raises(Killed):
        streamed.visit(die, lambda group: True)
    again = calibrated(base, after, store)
    done = set(again.reads.values())
    assert done and all(
        "layers.1.self_attn.q" in group or "layers.1" not in group for group in done
    )
    seen = visited(again, lambda group: group not in done)
    assert seen.keys() == memory.inputs.keys() - done and again.reads == memory.reads
    third = calibrated(base, after, store)

    def never(*_: object, **__: object) -> None:
        raise AssertionError("all is known")

    monkeypatch.setattr("cl_graft.skillpack.compress.stream._streamed", never)
    assert visited(third, lambda group: False) == {} and third.reads == memory.reads


# --- the disk ---


@pytest.mark.parametrize("prefix", ["tuned", "compressed"])
@pytest.mark.parametrize("room", [10**9, 30_000])
def test_the_work_folder_takes_no_more_than_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int, prefix: Any
) -> None:
    monkeypatch.setattr(directions, "DIRECTIONS_BYTES", room)
    size = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
    base, after, out = folders(tmp_path, **size)
    peak, announced, put = 0, [], Folder.__setitem__

    def weighed(store: Folder, key: str, item: Any) -> None:
        nonlocal peak
        put(store, key, item)
        files = tmp_path.glob("*.work/**/*.safetensors")
        peak = max(peak, sum(file.stat().st_size for file in files))

    monkeypatch.setattr(Folder, "__setitem__", weighed)
    monkeypatch.setattr(creating, "_check_disk", lambda folder, needed: announced.append(needed))
    create(base, after, out, budget="10%", calibration=Calibration(BATCHES, prefix=prefix))
    (needed, *_) = announced
    assert 0.4 * needed < peak <= needed


def test_an_8b_llama_by_hand() -> None:
    """At 1 % q has 0.01 * 2 * 4096 * 4096 / (8192 * 1.4 / 8) = 234 ranks or so of 4096 numbers of 4 bytes, and so on."""
    entries = sum(a * b for a, b in LLAMA_8B.values())
    limit = 0.01 * 2 * (32 * entries + 2 * 128256 * 4096)
    an_entry = limit / (32 * entries)
    layer = sum(
        4 * min(a, b) * an_entry * a * b / ((a + b) * 1.4 / 8) for a, b in LLAMA_8B.values()
    )
    assert counted(LLAMA_8B, 32, 4096, 128256, 0.01) == pytest.approx(32 * layer, rel=0.07)
    assert counted(LLAMA_8B, 32, 4096, 128256, 0.05) < 1.1e9
    assert work_bytes([], Adaptive(), 1000, rounds=2) == 2000
    pieces = [
        Piece("down", (4, 10), "mlp", torch.empty),
        Piece("in", (10, 4), "mlp", torch.empty, transposed=True),
    ]
    more = work_bytes(pieces, Adaptive(), 1000, keep=True) - work_bytes(pieces, Adaptive(), 1000)
    assert more == moments_bytes(pieces) == 2 * 4 * 10 * 10


def test_a_full_disk_is_told_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, after, out = folders(tmp_path)
    free = type("Usage", (), {"free": 5})()
    monkeypatch.setattr("shutil.disk_usage", lambda folder: free)
    with pytest.raises(Exception, match="free some, or write the pack elsewhere"):
        create(base, after, out, budget="20%")
