"""What a sweep does about cells that wait, fail, die or stand in each other's way, and what it leaves on disk."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from cl_graft.config import RunConfig
from cl_graft.errors import Refused
from cl_graft.experiment import executors
from cl_graft.experiment.attempt import attempt
from cl_graft.experiment.executors import Outcome, local
from cl_graft.experiment.sweep import Failure
from cl_graft.experiment.sweep import sweep as run_sweep
from cl_graft.store.files import DiskRefused
from cl_graft.store.locks import Busy
from cl_graft.store.record import CellFolder, states
from cl_graft.sweep_config import FILE, Sweep
from tests import kills
from tests.command import Call

PLUGINS = {
    "brief.py": """
from cl_graft import plugins


def brief(*, seed, data_dir=None):
    return plugins.load("scenario", "mini")(seed=seed, tasks="math", steps=1, batch=2, train_size=4, test_size=2)
""",
    # Keeps nothing, and says that it was there.
    "lucky.py": """
from pathlib import Path
from cl_graft import Strategy

EVENTS = Path(__file__).with_name("events")


def tell(what):
    with EVENTS.open("a") as file:
        file.write(what + "\\n")


class lucky(Strategy):
    def learn(self, task, context):
        tell("lucky")
        return {}
""",
    # Fails until there is a file `luck`.
    "unlucky.py": """
from pathlib import Path
from cl_graft import Strategy


class unlucky(Strategy):
    def learn(self, task, context):
        with Path(__file__).with_name("events").open("a") as file:
            file.write("unlucky\\n")
        if not Path(__file__).with_name("luck").exists():
            raise RuntimeError("no luck today")
        return {}
""",
}

# `one` and `two` need the same thing, which `one` makes until `three` has come by; nobody waits longer than a minute.
SHARING = """
import time
from pathlib import Path
from cl_graft import Strategy
from cl_graft.store.locks import locked

HERE = Path(__file__).parent


def tell(what):
    with (HERE / "events").open("a") as file:
        file.write(what + "\\n")


class {name}(Strategy):
    def learn(self, task, context):
        if "{name}" == "three":
            tell("three")
            return {{}}
        with locked(HERE / "shared", self.stages.patient):
            tell("{name} begins")
            deadline = time.monotonic() + 500
            while "three" not in (HERE / "events").read_text().split("\\n"):
                assert time.monotonic() < deadline, "three never came"
                time.sleep(0.02)
            tell("{name} ends")
        return {{}}
"""


@pytest.fixture
def plugins(tmp_path: Path) -> Path:
    folder = tmp_path / "plugins"
    folder.mkdir()
    for name, text in PLUGINS.items():
        (folder / name).write_text(text)
    for name in ("one", "two", "three"):
        (folder / f"{name}.py").write_text(SHARING.format(name=name))
    return folder


def asked(plugins: Path, out: Path, *strategies: str) -> Sweep:
    return Sweep(
        scenarios=[str(plugins / "brief.py")],
        strategies=[str(plugins / f"{name}.py") for name in strategies],
        models=["nano-llama"],
        out=out,
        wandb="off",
    )


def words(made: Sweep) -> list[str]:
    shown = ["sweep", "--scenarios", made.scenarios[0], "--strategies", ",".join(made.strategies)]
    return [*shown, "--models", "nano-llama", "--out", str(made.out), "--wandb", "off"]


def directly(task: Any, report: Any) -> None:
    task(report)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Cells are run in this process, one after another; the states on disk when each sweep begins to."""
    found: list[list[str]] = []

    def here(cells: Sequence[RunConfig], report: Any) -> Iterator[tuple[RunConfig, Outcome]]:
        found.append([s["state"] for s in states(cells[0].out).values()])
        for config in cells:
            yield config, attempt(config, lambda *_: None, True)

    monkeypatch.setattr(executors, "executor", lambda asked, cells: here)
    monkeypatch.setattr(local, "apart", directly)
    return found


def events(plugins: Path) -> list[str]:
    file = plugins / "events"
    return file.read_text().split() if file.exists() else []


def state_of(made: Sweep) -> dict[str, str]:
    """{strategy: its cell's state}"""
    return {path.name.split("__")[1]: s["state"] for path, s in states(made.out).items()}


# --- states ---


def test_cells_wait_and_are_done_or_failed_with_the_traceback(
    plugins: Path, call: Call, seen: list[list[str]], tmp_path: Path
) -> None:
    made = asked(plugins, tmp_path / "out", "unlucky", "lucky")
    done = call(*words(made))
    assert done.code == 1 and "RuntimeError: no luck today" in done.err
    assert seen == [["waiting", "waiting"]]
    assert state_of(made) == {"unlucky": "failed", "lucky": "done"}
    (traced,) = made.out.rglob("traceback.txt")
    assert "unlucky.py" in traced.read_text()
    told = call("status", made.out)
    assert "1 done, 0 running, 0 waiting, 1 failed" in told.out and "no luck today" in told.out


def test_what_a_killed_process_was_running_is_waiting(tmp_path: Path) -> None:
    folder = CellFolder(tmp_path / "cell")
    script = (
        "import sys, time; from pathlib import Path; from cl_graft.store.record import CellFolder\n"
    )
    script += "folder = CellFolder(Path(sys.argv[1]))\nwith folder.lock():\n"
    script += "    folder.mark('running'); print('marked', flush=True); time.sleep(600)"
    words = [sys.executable, "-c", script, str(folder.path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"marked\n"
        assert folder.state()["state"] == "running"
        process.kill()
    assert folder.state()["state"] == "waiting"


def test_who_runs_is_told_by_the_lock(tmp_path: Path) -> None:
    """Its pid means nothing in another container, and its host's name is new each time one starts."""
    folder = CellFolder(tmp_path / "cell")
    with folder.lock():
        folder.mark("running", host="elsewhere", pid=2**22 + 1)
        assert folder.state()["state"] == "running"
    assert folder.state()["state"] == "waiting"


Ends = Callable[[RunConfig], Outcome]


def swept(cells: Sequence[RunConfig], ends: Ends | None) -> tuple[list[Failure], list[str]]:
    """The failures of a sweep whose cells end so (None: the executor forgets them), and what was reported."""

    def executor(cells: Sequence[RunConfig], report: Any) -> Iterator[tuple[RunConfig, Outcome]]:
        for config in cells if ends else ():
            yield config, ends(config)

    said: list[str] = []
    return run_sweep(cells, executor, lambda cell, what, done, at="": said.append(what)), said


@pytest.mark.parametrize(
    ("outcome", "state", "reason"),
    [
        (Outcome("failed", "no luck.", "Traceback of it"), "failed", "no luck."),
        (Outcome("lost", "its process was killed"), "failed", "its process was killed"),
        (Outcome("refused", "the disk is full"), "waiting", "the disk is full"),
        (Outcome("done"), "waiting", "holds no result"),
        (None, "waiting", "it was not run"),
    ],
)
def test_what_becomes_of_a_cell_is_told_and_kept(
    outcome: Outcome | None, state: str, reason: str, plugins: Path, tmp_path: Path
) -> None:
    """What disks and networks refuse is no failure of the cell: the same command tries it again."""
    (config,) = asked(plugins, tmp_path / "out", "lucky").cells()
    ((failure,), _) = swept([config], (lambda _: outcome) if outcome else None)
    assert failure.cell == config.cell and reason in failure.reason
    folder = CellFolder(config.out / config.cell)
    assert folder.state()["state"] == state
    trace = folder.path / "traceback.txt"
    assert trace.is_file() == (state == "failed")
    if outcome and outcome.trace:
        assert trace.read_text() == outcome.trace
    again, said = swept([config], lambda config: attempt(config, lambda *_: None, True))
    assert [f.reason for f in again] == ([failure.reason] if state == "failed" else [])
    assert said[-1] == ("failed" if state == "failed" else "done")


def test_a_refused_sweep_leaves_the_folder_what_it_was(
    plugins: Path, call: Call, seen: list[list[str]], tmp_path: Path
) -> None:
    made = asked(plugins, tmp_path / "out", "lucky")
    assert call(*words(made)).code == 0
    before = (made.out / FILE).read_bytes()
    assert "budget" in call(*words(made), "--budgets", "much").reason
    assert (made.out / FILE).read_bytes() == before


def test_a_finished_sweep_whose_report_lacks_a_cell_is_reported(
    plugins: Path, call: Call, seen: list[list[str]], tmp_path: Path
) -> None:
    made = asked(plugins, tmp_path / "out", "lucky")
    assert call(*words(made)).code == 0
    assert "finished already" in call(*words(made)).out
    (config,) = made.model_copy(update={"seeds": [1]}).cells()
    assert attempt(config, lambda *_: None, True) == Outcome("done")
    again = call(*words(made), "--seeds", "0,1")
    assert "finished already" not in again.out
    pages = {page.name for page in (made.out / "report" / "cells").iterdir()}
    assert pages == {f"{config.label}_seed{seed}.html" for seed in (0, 1)}  # and not the one before


@pytest.mark.parametrize(
    ("raised", "outcome"),
    [
        (DiskRefused("the disk is full"), "refused"),
        (Refused("s3://x cannot be read"), "refused"),
        (Busy("another makes it"), "busy"),
        (SystemExit(3), "failed"),
        (ValueError("a long story\nin two lines"), "failed"),
    ],
)
def test_how_an_attempt_ends(
    raised: BaseException,
    outcome: str,
    plugins: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(*_: Any) -> None:
        raise raised

    monkeypatch.setattr("cl_graft.experiment.cell.run", fails)
    (config,) = asked(plugins, tmp_path / "out", "lucky").cells()
    found = attempt(config, lambda *_: None, True)
    assert found.state == outcome and "\n" not in found.reason
    assert ("Traceback" in found.trace) == (outcome == "failed")


def test_a_sweep_leaves_the_state_of_a_cell_that_another_computes(
    plugins: Path,
    call: Call,
    seen: list[list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = asked(plugins, tmp_path / "out", "lucky")
    (config,) = made.cells()
    folder = CellFolder(config.out / config.cell)

    def none(cells: Sequence[RunConfig], report: Any) -> Iterator[tuple[RunConfig, Outcome]]:
        yield from ()

    monkeypatch.setattr(executors, "executor", lambda asked, cells: none)
    monkeypatch.setattr("cl_graft.cli.show.report", lambda *_: None)
    with folder.lock():
        folder.mark("running")
        before = (folder.path / "state.json").read_bytes()
        call(*words(made))
        assert (folder.path / "state.json").read_bytes() == before


# --- cells that fail ---


def test_a_failed_cell_is_run_again_only_when_that_is_asked_for(
    plugins: Path, call: Call, seen: list[list[str]], tmp_path: Path
) -> None:
    made = asked(plugins, tmp_path / "out", "unlucky")
    assert call(*words(made)).code == 1
    (plugins / "luck").touch()
    again = call(*words(made))
    assert again.code == 1 and "no luck today" in again.err and "--retry-failed" in again.err
    assert events(plugins) == ["unlucky"]
    retried = call(*words(made), "--retry-failed")
    assert retried.code == 0, retried
    assert events(plugins) == ["unlucky"] * 2
    assert state_of(made) == {"unlucky": "done"}
    assert not list(made.out.rglob("traceback.txt")), "it was of the last attempt, if that failed"


@pytest.mark.parametrize("fast", [False, True])
def test_fail_fast_stops_at_the_first_cell_that_fails(
    plugins: Path, call: Call, seen: list[list[str]], fast: bool, tmp_path: Path
) -> None:
    made = asked(plugins, tmp_path / "out", "unlucky", "lucky")
    assert call(*words(made), *(["--fail-fast"] if fast else [])).code == 1
    assert events(plugins) == (["unlucky"] if fast else ["unlucky", "lucky"])
    assert state_of(made)["lucky"] == ("waiting" if fast else "done")


def test_a_worker_that_nobody_listens_to_is_stopped_and_has_not_failed(
    plugins: Path, tmp_path: Path
) -> None:
    """As where the sweep's own process is killed: the next one goes on with the cell."""
    (config,) = asked(plugins, tmp_path / "out", "lucky").cells()
    context = kills.server()
    hears, says = context.Pipe(duplex=False)
    process = context.Process(target=local._work, args=(says, attempt, config, True, None))
    hears.close()
    process.start()
    says.close()
    process.join()
    assert process.exitcode == 1
    folder = CellFolder(config.out / config.cell)
    assert folder.state()["state"] == "waiting"
    assert not (folder.path / "traceback.txt").exists()


class Dying:
    """It takes its time to be deleted, and says when it begins."""

    def __init__(self, says: Any):
        self.says = says

    def __del__(self) -> None:
        self.says("deleting", 0.0)
        time.sleep(5)


def endless(config: RunConfig, says: Any, patient: bool) -> Outcome:
    try:
        dying = Dying(says)
        del dying
        time.sleep(600)
    finally:
        config.out.mkdir()
    return Outcome("done")


def test_a_worker_unwinds_where_python_drops_its_interrupt(plugins: Path, tmp_path: Path) -> None:
    (config,) = asked(plugins, tmp_path / "out", "lucky").cells()
    hears, says = kills.server().Pipe(duplex=False)
    process = kills.server().Process(target=local._work, args=(says, endless, config, True, None))
    process.start()
    assert hears.recv() == ("deleting", 0.0, "")
    process.terminate()
    process.join(60)
    process.kill()
    assert process.exitcode == 1
    assert config.out.is_dir()


# --- resumed ---


def test_resume_takes_the_sweep_from_the_folder_of_its_results(
    plugins: Path, call: Call, seen: list[list[str]], tmp_path: Path
) -> None:
    made = asked(plugins, tmp_path / "out", "unlucky", "lucky")
    call(*words(made), "--fail-fast")
    held = yaml.safe_load((made.out / FILE).read_text())
    assert held["strategies"] == made.strategies and "out" not in held
    assert call("sweep", "--resume", "--out", made.out).code == 1, "one had failed before"
    assert state_of(made) == {"unlucky": "failed", "lucky": "done"}
    (plugins / "luck").touch()
    assert call("sweep", "--resume", "--retry-failed", "--out", made.out).code == 0
    assert state_of(made) == {"unlucky": "done", "lucky": "done"}


# --- who is next ---


@pytest.mark.slow
def test_a_cell_that_waits_for_what_another_makes_idles_no_worker(
    plugins: Path, tmp_path: Path
) -> None:
    cells = asked(plugins, tmp_path / "out", "one", "two", "three").cells()
    (plugins / "events").touch()
    outcomes = {
        c.cell.split("__")[1]: o.state for c, o in local.run_cells(cells, lambda *_: None, 2)
    }
    assert outcomes == {"one": "done", "two": "done", "three": "done"}
    told = (plugins / "events").read_text().splitlines()
    assert told in (
        ["one begins", "three", "one ends", "two begins", "two ends"],
        ["two begins", "three", "two ends", "one begins", "one ends"],
    )
