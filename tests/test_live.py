"""What a sweep shows while it runs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cl_graft.cli.live import Board, Log, view
from cl_graft.config import RunConfig
from cl_graft.store.record import CellFolder


def cells(out: Path, count: int = 3) -> list[RunConfig]:
    names = ["graftllm", "lora", "sequential"][:count]
    return [RunConfig(scenario="mini", strategy=name, out=out) for name in names]


def experience(config: RunConfig, number: int, **scores: float) -> None:
    made: Any = {"score": {task: {"value": value} for task, value in scores.items()}}
    folder = CellFolder(config.out / config.cell).experience_path(number)
    folder.mkdir(parents=True)
    (folder / "experience.json").write_text(json.dumps({"scores": made}))


def shown(progress: Board) -> str:
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(progress.drawn())
    return console.export_text()


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_cells_by_state_what_each_does_and_the_time_left(tmp_path: Path) -> None:
    clock, (a, b, c) = Clock(), cells(tmp_path)
    progress = Board([a, b, c], clock)
    assert "3 cells: 3 waiting" in shown(progress)
    progress.take("models", "preparing mini-llama", 0.0)
    assert "preparing mini-llama" in shown(progress)
    clock.now = 60.0
    progress.take(a.cell, "done", 1.0)
    progress.take(b.cell, "training code", 0.5)
    text = shown(progress)
    assert "3 cells: 1 done, 1 running, 1 waiting" in text
    assert "lora, seed 0" in text and "50%" in text and "training code" in text
    assert "1:00 so far, about 1:00 left" in text, "half of the work took a minute"
    progress.take(b.cell, "failed", 1.0)
    assert "1 done, 1 waiting, 1 failed" in shown(progress)


def test_a_cell_that_another_holds_up_is_waiting(tmp_path: Path) -> None:
    (a,) = cells(tmp_path, 1)
    progress = Board([a])
    progress.take(a.cell, "waiting for another's work", 0.0)
    assert progress.states() == {"waiting": 1}


def test_the_matrix_fills_up(tmp_path: Path) -> None:
    a, b, _ = made = cells(tmp_path)
    experience(a, 0, math=0.0, code=0.0)
    progress = Board(made)
    assert "graftllm" in shown(progress) and "0 of 2" in shown(progress)
    experience(a, 1, math=0.885, code=0.25)
    progress.take(a.cell, "training code", 0.4)
    (row,) = [line.split() for line in shown(progress).splitlines() if "of 2" in line]
    assert row == ["graftllm", "88.5", "25.0", "1.0", "of", "2"]
    experience(b, 0, math=0.5, code=0.5)
    progress.take(b.cell, "training math", 0.1)
    assert [line.split()[0] for line in shown(progress).splitlines() if "of 2" in line] == [
        "graftllm",
        "lora",
    ]


def test_what_was_done_before_counts_but_not_for_the_speed(tmp_path: Path) -> None:
    clock, made = Clock(), cells(tmp_path, 2)
    folder = tmp_path / made[0].cell
    folder.mkdir()
    (folder / "result.json").write_text("{}")
    progress = Board(made, clock)
    assert progress.states() == {"done": 1, "waiting": 1}
    clock.now = 30.0
    progress.take(made[1].cell, "training math", 0.5)
    assert progress.seconds_left() == pytest.approx(30.0)


def test_names_are_no_markup(tmp_path: Path) -> None:
    config = RunConfig(
        scenario="mini", strategy="lora", out=tmp_path, options={"lora": {"tag": "[red]"}}
    )
    progress = Board([config])
    progress.take(config.cell, "training [bold]", 0.5)
    assert "lora(tag=[red]), seed 0" in shown(progress) and "training [bold]" in shown(progress)


def test_without_a_terminal_every_change_is_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b, _ = made = cells(tmp_path)
    with view(made) as report:
        report(a.cell, "training math", 0.09, "step 1 of 250")
        report(a.cell, "training math", 0.2, "step 2 of 250, loss 1.25")
        report(b.cell, "done", 1.0)
        report(b.cell, "waiting after its process was lost", 0.0)
    told = capsys.readouterr().err.splitlines()
    assert all(re.match(r"\d\d:\d\d:\d\d \[", line) for line in told)
    assert [re.sub(r"about [\d:]+ left", "about ... left", line[9:]) for line in told] == [
        f"[  3%] 0 of 3 cells, about ... left; {a.cell}: training math, step 1 of 250",
        f"[ 40%] 1 of 3 cells, about ... left; {b.cell}: done",
        f"[ 40%] 0 of 3 cells, about ... left; {b.cell}: waiting after its process was lost",
    ]


def test_what_goes_on_is_told_every_30_seconds_with_its_step_loss_and_time_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A stage of 100 s, whose progress is heard of once a second; then 70 s in which nothing is heard."""
    clock, (a,) = Clock(), cells(tmp_path, 1)
    log = Log(Board([a], clock), clock)
    for second in range(100):
        clock.now = float(second)
        log.take(a.cell, "training math", second / 200, f"step {second} of 100, loss 0.5")
        log.beat()
    for second in range(100, 171):
        clock.now = float(second)
        log.beat()
    lines = [line[9:] for line in capsys.readouterr().err.splitlines()]
    assert lines == [
        f"[  0%] 0 of 1 cells, time left unknown; {a.cell}: training math, step 0 of 100, loss 0.5",
        f"[ 15%] 0 of 1 cells, about 2:50 left; {a.cell}: training math, step 30 of 100, loss 0.5",
        f"[ 30%] 0 of 1 cells, about 2:20 left; {a.cell}: training math, step 60 of 100, loss 0.5",
        f"[ 45%] 0 of 1 cells, about 1:50 left; {a.cell}: training math, step 90 of 100, loss 0.5",
        *[
            f"[ 50%] 0 of 1 cells, about {left} left; {a.cell}: training math, step 99 of 100, loss 0.5"
            for left in ("2:02", "2:33")
        ],
    ]


def test_what_is_done_before_the_first_cell_is_told_every_30_seconds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clock, made = Clock(), cells(tmp_path)
    log = Log(Board(made, clock), clock)
    for second in range(65):
        clock.now = float(second)
        log.take("models", "preparing mini-llama", 0.0, f"step {10 * second} of 900, loss 2")
        log.beat()
    told = [line.partition("; ")[2] for line in capsys.readouterr().err.splitlines()]
    assert told == [
        f"models: preparing mini-llama, step {step} of 900, loss 2" for step in (0, 300, 600)
    ]


def test_a_torn_record_is_no_end_of_the_view(tmp_path: Path) -> None:
    (a,) = cells(tmp_path, 1)
    experience(a, 0, math=0.5)
    (CellFolder(tmp_path / a.cell).experience_path(0) / "experience.json").write_text("{")
    assert Board([a]).states() == {"waiting": 1}
