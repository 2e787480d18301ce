"""A report that is stopped or killed while it is being made."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import psutil
import pytest

from cl_graft.bench.report import make
from cl_graft.cli.sweep import _reported
from cl_graft.config import RunConfig
from cl_graft.report import find, write
from cl_graft.report.page.work import Work
from tests.command import Call


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Ten figures, which several processes draw."""
    make(tmp_path / "out", 8, examples=4, strategies=4)
    return tmp_path / "out"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_report_ends_when_it_is_stopped_and_the_next_is_whole(
    number: signal.Signals, out: Path, call: Call
) -> None:
    with open(out / "said", "w") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "cl_graft", "report", out],
            stdout=subprocess.DEVNULL,
            stderr=said,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    while not list(out.glob("report/*.svg")) and process.poll() is None:
        time.sleep(0.01)
    family = psutil.Process(process.pid).children(recursive=True)
    if number == signal.SIGINT:  # as a terminal sends it
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    code = process.wait(timeout=60)
    _, left = psutil.wait_procs(family, timeout=30)
    assert left == []
    assert not (out / "report" / "index.html").exists()
    if number == signal.SIGKILL:
        assert code == -number
    else:
        assert code in (130, -number)  # the latter where Python is interrupted within an `exec`
        assert (out / "said").read_text() == "stopped; run the same command again to continue.\n"
        assert not list(out.rglob("*.part"))
    assert call("report", out).code == 0
    assert (out / "report" / "index.html").is_file()


def test_what_a_stopped_report_drew_of_other_cells_is_drawn_again(tmp_path: Path) -> None:
    """A report of A, one of A and B that is stopped once a figure is drawn, and again one of A."""
    figure = tmp_path / "figure.svg"

    def report(key: str, stopped: bool = False) -> str:
        making = Work(tmp_path / "made.json")
        making.add([figure], key, partial(figure.write_text, key), 1.0)
        with making:
            pass
        if not stopped:
            making.keep()
        return figure.read_text()

    assert report("A") == "A"
    assert report("A and B", stopped=True) == "A and B"
    assert report("A") == "A"


def test_a_report_that_is_older_than_a_result_is_made_again(tmp_path: Path) -> None:
    make(tmp_path, 2, examples=4, strategies=1)
    cells = [RunConfig(**found.cell["config"]) for found in find([tmp_path])]
    cells = [c.model_copy(update={"out": tmp_path}) for c in cells]
    write(find([tmp_path]), tmp_path / "report")
    named = {f"cell {c.cell}" for c in cells}
    made = json.loads((tmp_path / "report" / "made.json").read_text())
    assert named <= made.keys() and _reported(cells, tmp_path / "report")
    later = (tmp_path / "report" / "made.json").stat().st_mtime + 1
    os.utime(tmp_path / cells[0].cell / "result.json", (later, later))
    assert not _reported(cells, tmp_path / "report")
