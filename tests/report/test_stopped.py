"""A report that is stopped or killed while it is being made."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from cl_graft.bench.report import make
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
