"""`cl-graft sweep` as a user has it: in processes of its own, stopped, killed, run again."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from cl_graft.cell import run
from cl_graft.config import RunConfig
from cl_graft.skillpack.file import SkillPack
from cl_graft.sweep import grid, sweep

pytestmark = [pytest.mark.xdist_group("sweep"), pytest.mark.slow]

PLUGINS = {
    "moving.py": '''
from dataclasses import replace
from cl_graft import plugins


def moving(*, seed, data_dir=None):
    """Two tasks of `mini` in bits per byte, a score that every step of training moves."""
    make = plugins.load("scenario", "mini")
    made = make(seed=seed, tasks="math,cipher", steps=4, batch=8, train_size=32, test_size=8)
    return replace(made, tasks=tuple(replace(t, score="neg_bits_per_byte") for t in made.tasks))
''',
    "unlucky.py": '''
from cl_graft import Strategy


class unlucky(Strategy):
    def learn(self, task, context):
        raise RuntimeError("no luck today")
''',
    "idle.py": '''
from cl_graft import Strategy


class idle(Strategy):
    def learn(self, task, context):
        return {}
''',
}


@pytest.fixture(scope="module")
def plugins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plugins")
    for name, text in PLUGINS.items():
        (folder / name).write_text(text)
    return folder


def command(plugins: Path, out: Path, strategies: str, seeds: str = "0") -> list[str]:
    words = [sys.executable, "-m", "cl_graft", "sweep", "--scenarios", str(plugins / "moving.py")]
    words += ["--strategies", strategies, "--seeds", seeds, "--models", "nano-llama"]
    return [*words, "--out", str(out), "--wandb", "off", "--workers", "2"]


def start(words: list[str]) -> subprocess.Popen[str]:
    """In a process group of its own, as a terminal starts it."""
    return subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def whole_stages(out: Path) -> int:
    return len(list(out.glob("*/stages/*/stage.json")))


def wait_for_stages(process: subprocess.Popen[str], out: Path, count: int) -> None:
    deadline = time.monotonic() + 240
    while whole_stages(out) < count and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert process.poll() is None, process.communicate()
    assert whole_stages(out) >= count


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    return psutil.wait_procs(processes, timeout=30)[1]


def numbers(out: Path) -> dict[str, Any]:
    """Of every cell: all that must not depend on how it was run."""
    keys = ("matrix", "n", "stderr", "metrics", "general", "pack_bytes", "tokens", "complete")
    found = {}
    for file in out.glob("*/result.json"):
        result = json.loads(file.read_text())
        packs = sorted((file.parent / "packs").iterdir())
        digests = [SkillPack.load(pack).digest for pack in packs]
        found[file.parent.name] = ({key: result[key] for key in keys}, digests)
    return found


def files(out: Path) -> dict[str, tuple[int, bytes]]:
    cells = [f for f in out.rglob("*") if f.is_file() and f.relative_to(out).parts[0] != "report"]
    return {str(f): (f.stat().st_mtime_ns, f.read_bytes()) for f in cells}


@dataclass
class Stop:
    """How one stopped sweep ended."""

    code: int
    stderr: str
    stages: int
    half_written: list[Path]
    strays: list[psutil.Process]


@dataclass
class Story:
    """A sweep stopped three times, and then let finish."""

    out: Path
    words: list[str]
    stops: dict[str, Stop]
    last: subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def story(plugins: Path, tmp_path_factory: pytest.TempPathFactory) -> Story:
    """Stopped by Ctrl-C, by SIGKILL to the group, and by SIGKILL to the first process alone."""
    out, rng = tmp_path_factory.mktemp("stopped"), random.Random(0)
    words = command(plugins, out, "graftllm,lora", "0,1")  # four cells of three stages
    stops = {}
    for how in ("ctrl-c", "group", "parent"):
        process = start(words)
        wait_for_stages(process, out, whole_stages(out) + 1)
        time.sleep(rng.uniform(0, 1))
        family = psutil.Process(process.pid).children(recursive=True)
        if how == "parent":
            process.kill()
        else:
            os.killpg(process.pid, signal.SIGINT if how == "ctrl-c" else signal.SIGKILL)
        _, stderr = process.communicate(timeout=60)
        strays = alive(family)
        torn = list(out.rglob("*.tmp"))
        stops[how] = Stop(process.returncode, stderr, whole_stages(out), torn, strays)
    last = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
    return Story(out, words, stops, last)


def test_a_sweep_stopped_again_and_again_ends_with_the_numbers_of_single_runs(
    story: Story, plugins: Path, tmp_path: Path
) -> None:
    assert all(0 < stop.stages < 12 for stop in story.stops.values()), "stopped in the middle"
    assert story.last.returncode == 0, story.last.stderr
    for config in grid(
        [str(plugins / "moving.py")],
        ["graftllm", "lora"],
        [0, 1],
        ["nano-llama"],
        ["10%"],
        out=tmp_path,
        wandb="off",
    ):
        assert run(config)["complete"]
    assert numbers(story.out) == numbers(tmp_path)
    matrices = {json.dumps(found["matrix"]) for found, _ in numbers(tmp_path).values()}
    assert len(matrices) == 4, "every strategy and seed has numbers of its own"


def test_ctrl_c_says_how_to_go_on_and_leaves_nothing_behind(story: Story) -> None:
    stop = story.stops["ctrl-c"]
    assert stop.code == 130
    assert stop.stderr.endswith("stopped; run the same command again to continue.\n")
    assert "Traceback" not in stop.stderr
    assert stop.half_written == []
    assert stop.strays == []
    assert not list(story.out.rglob("traceback.txt"))


@pytest.mark.parametrize("how", ["group", "parent"])
def test_no_worker_outlives_the_sweep(story: Story, how: str) -> None:
    assert story.stops[how].code == -signal.SIGKILL
    assert story.stops[how].strays == []


def test_a_sweep_that_is_done_does_nothing(story: Story) -> None:
    before = files(story.out)
    again = subprocess.run(story.words, capture_output=True, text=True, timeout=120, check=False)
    assert again.returncode == 0
    assert again.stderr == "", "nothing to prepare, nothing to train"
    assert again.stdout == story.last.stdout
    assert files(story.out) == before


def test_the_last_words_of_a_sweep(story: Story) -> None:
    said, report = story.last.stdout, story.out / "report"
    assert "Ranking: moving · nano-llama · budget 10%" in said
    assert said.count("│ graftllm") == said.count("│ lora") == 1
    assert f"{report}" in said.splitlines()[-1]
    assert {f.suffix for f in report.iterdir()} == {".csv", ".md", ".png", ".svg"}
    done = [line for line in story.last.stderr.splitlines() if line.endswith(": done")]
    assert all(line.startswith("[100%] moving__") for line in done)


def test_a_cell_that_fails_leaves_its_traceback_and_the_others_go_on(
    plugins: Path, tmp_path: Path
) -> None:
    strategies = f"{plugins / 'unlucky.py'},{plugins / 'idle.py'}"
    done = subprocess.run(
        command(plugins, tmp_path, strategies), capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    (failed,) = tmp_path.glob("moving__unlucky__*")
    (fine,) = tmp_path.glob("moving__idle__*")
    assert f"failed: {failed.name}: RuntimeError: no luck today" in done.stderr.splitlines()
    assert "Traceback" not in done.stderr
    assert "unlucky.py" in (failed / "traceback.txt").read_text()
    assert not (failed / "result.json").exists()
    assert json.loads((fine / "result.json").read_text())["complete"]
    assert "unlucky (incomplete: seed 0, 0 of 2 tasks)" in done.stdout


def test_a_mistake_in_one_cell_is_found_before_any_work(plugins: Path, tmp_path: Path) -> None:
    made = RunConfig(
        scenario=str(plugins / "moving.py"), strategy="lora", model="nano-llama", out=tmp_path
    )
    wrong = made.model_copy(update={"strategy": "graftlm"})
    with pytest.raises(Exception, match="did you mean graftllm"):
        sweep([made, wrong], 1, lambda cell, what, done: None)
    assert not any(tmp_path.iterdir())
