"""Seconds and bytes of everything count, whatever way a method trains and wherever it keeps things."""

from __future__ import annotations

from pathlib import Path

import pytest

from cl_graft.config import RunConfig
from cl_graft.experiment import cell
from cl_graft.store.record import CellFolder

SMALL = {"steps": 2, "batch": 4, "train_size": 16, "test_size": 4, "tasks": "math,cipher"}
OWN_LOOP = '''
"""Plain steps of its own, and no stage."""

import time
import torch
from cl_graft.strategy import Strategy


class own_loop(Strategy):
    """What a loop of a method's own takes is training, what comes after it is compression."""

    keeps = "latest"
    budgeted = False

    def learn(self, task, context, *, by_hand: bool = False):
        if by_hand:
            time.sleep(0.25)
            return {}
        optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3)
        for _, batch in zip(range(3), context.batches(2)):
            self.model(**batch).loss.backward()
            time.sleep(0.1)
            optimizer.step()
        time.sleep(0.2)
        moved = {n: p.detach() - context.start[n] for n, p in self.model.named_parameters()}
        return context.dense(moved)
'''


def config(out: Path, strategy: str, **options: dict[str, object]) -> RunConfig:
    plain = {"scenario": "mini", "model": "nano-llama", "wandb": "off", "threads": 1}
    return RunConfig(strategy=strategy, out=out, options={"mini": SMALL, **options}, **plain)


@pytest.fixture
def own_loop(tmp_path: Path) -> str:
    file = tmp_path / "own_loop.py"
    file.write_text(OWN_LOOP)
    return str(file)


def test_a_loop_of_its_own_is_training_and_what_follows_is_not(
    tmp_path: Path, own_loop: str
) -> None:
    """Two tasks of three steps that sleep 0.1 s each, and 0.2 s after the last."""
    seconds = cell.run(config(tmp_path / "out", own_loop))["seconds"]
    assert seconds["train"] >= 0.6 and seconds["compress"] >= 0.4
    first = CellFolder(next((tmp_path / "out").glob("*own_loop*"))).experiences()
    assert first[0]["seconds"]["train"] == 0.0
    for record in first:
        parts = record["seconds"]
        assert sum(parts.values()) == pytest.approx(record["spent"], abs=0.1), "none counts twice"
        assert parts["harness"] >= 0


def test_steps_that_no_optimizer_takes_are_training_too(tmp_path: Path, own_loop: str) -> None:
    found = cell.run(config(tmp_path / "out", own_loop, own_loop={"by_hand": True}))
    assert found["seconds"]["train"] >= 0.5 and found["seconds"]["compress"] < 0.25


@pytest.mark.parametrize(
    ("strategy", "shares"),
    [
        ("replay", "memory"),
        ("agem", "memory"),
        ("ewc", ""),
        ("lwf", None),
        ("slao", "tuned"),
        ("sure", ""),
    ],
)
def test_what_tasks_share_is_in_the_bytes_alive(
    tmp_path: Path, strategy: str, shares: str | None
) -> None:
    """The bytes alive are those of the files without which the method could not go on, to the byte."""
    found = cell.run(config(tmp_path / "out", strategy))
    folder = CellFolder(next((tmp_path / "out").glob(f"*{strategy}*")))
    files = list((folder.path / "packs" / "shared").glob("*.safetensors"))
    assert bool(files) == bool(found["shared_bytes"]) == (shares is not None)
    assert shares is None or all(shares in f.name for f in files)
    last = folder.pack_path(2, "cipher").stat().st_size
    assert found["alive_bytes"][-1] == last + sum(f.stat().st_size for f in files)
    assert found["alive_bytes"][-1] == last + sum(found["shared_bytes"].values())
