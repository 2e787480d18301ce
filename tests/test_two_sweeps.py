"""Two sweeps at once in one folder: every cell and every stage is computed once, and neither comes to harm."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import psutil
import pytest

from cl_graft.config import RunConfig
from cl_graft.experiment.cell import run
from cl_graft.store.record import CellFolder, states
from cl_graft.sweep_config import Sweep
from tests import kills
from tests.test_sweep import alive, numbers, start, wait_for_stages

pytestmark = pytest.mark.slow

SCENARIO = '''
import time
from dataclasses import replace
from pathlib import Path
from cl_graft import plugins
from cl_graft.training import fit


def trained(*given, counted=fit.fit, **named):
    """Whoever trains a stage writes its key down, and waits while there is a file `hold`, but not for ever."""
    with Path(__file__).with_name("trained").open("a") as file:
        file.write(given[5].name + "\\n")
    deadline = time.monotonic() + 500
    while Path(__file__).with_name("hold").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    return counted(*given, **named)


if fit.fit.__name__ != "trained":
    fit.fit = trained


def noted(*, seed, data_dir=None):
    """Two tasks of `mini` in bits per byte."""
    make = plugins.load("scenario", "mini")
    made = make(seed=seed, tasks="math,cipher", steps=4, batch=8, train_size=32, test_size=8)
    return replace(made, tasks=tuple(replace(t, score="neg_bits_per_byte") for t in made.tasks))
'''


@pytest.fixture
def scenario(tmp_path: Path) -> Path:
    (tmp_path / "noted.py").write_text(SCENARIO)
    return tmp_path / "noted.py"


def command(scenario: Path, out: Path, strategies: str) -> list[str]:
    words = [sys.executable, "-m", "cl_graft", "sweep", "--scenarios", str(scenario)]
    words += ["--strategies", strategies, "--models", "nano-llama", "--workers", "1"]
    return [*words, "--out", str(out), "--wandb", "off"]


def trained(scenario: Path) -> Counter[str]:
    return Counter(scenario.with_name("trained").read_text().split())


def alone(scenario: Path, out: Path, strategies: str) -> None:
    sweep = Sweep(
        scenarios=[str(scenario)],
        strategies=strategies.split(","),
        models=["nano-llama"],
        out=out,
        wandb="off",
    )
    for config in sweep.cells():
        run(config)


def ended(process: subprocess.Popen[str]) -> int:
    _, stderr = process.communicate()
    assert "Traceback" not in stderr, stderr
    return process.returncode


def test_at_once_each_cell_and_stage_is_computed_once(scenario: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    both = [start(command(scenario, out, s)) for s in ("magnitude,svd", "svd,individual")]
    assert [ended(process) for process in both] == [0, 0]
    assert set(trained(scenario).values()) == {1} and len(trained(scenario)) == 2
    assert {state["state"] for state in states(out).values()} == {"done"}
    kills.assert_done(out)
    alone(scenario, tmp_path / "alone", "magnitude,svd,individual")
    assert numbers(out) == numbers(tmp_path / "alone")


def test_one_takes_over_the_cells_of_one_that_is_killed(scenario: Path, tmp_path: Path) -> None:
    """Of which the kill hits the main process only: its worker ends by itself, and frees what it held."""
    out, strategies = tmp_path / "out", "sequential,individual"
    hold = scenario.with_name("hold")
    hold.touch()
    struck = start(command(scenario, out, strategies))
    wait_for_stages(struck, out, 1)
    family = psutil.Process(struck.pid).children(recursive=True)
    spared = start(command(scenario, out, strategies))
    assert spared.stderr is not None
    while "waiting for another sweep" not in (line := spared.stderr.readline()):
        assert line, spared.communicate()
    os.kill(struck.pid, signal.SIGKILL)
    hold.unlink()
    struck.communicate()
    assert ended(spared) == 0
    assert alive(family) == []
    assert {state["state"] for state in states(out).values()} == {"done"}
    kills.assert_done(out)
    alone(scenario, tmp_path / "alone", strategies)
    assert numbers(out) == numbers(tmp_path / "alone")


def test_a_lock_file_of_a_dead_process_does_not_block(scenario: Path, tmp_path: Path) -> None:
    config = RunConfig(
        scenario=str(scenario), strategy="individual", model="nano-llama", out=tmp_path, wandb="off"
    )
    run(config)
    cell = tmp_path / config.cell
    (cell / "result.json").unlink()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for lock in [cell / ".lock", *tmp_path.rglob("*.lock")]:
        lock.write_text(str(dead.pid))
    assert run(config)["complete"]
    with CellFolder(cell).lock():
        pass
