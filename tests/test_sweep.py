"""`cl-graft sweep` as a user has it: in processes of its own, stopped, killed, run again."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from cl_graft.config import RunConfig
from cl_graft.experiment.cell import run
from cl_graft.experiment.executors.local import run_cells
from cl_graft.experiment.sweep import sweep
from cl_graft.skillpack.format.file import SkillPack
from cl_graft.sweep_config import Sweep
from tests import kills

pytestmark = pytest.mark.slow

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
    "unlucky.py": """
from cl_graft import Strategy


class unlucky(Strategy):
    def learn(self, task, context):
        raise RuntimeError("no luck today")
""",
    "mortal.py": """
import os, signal
from pathlib import Path
from cl_graft import Strategy


class mortal(Strategy):
    def learn(self, task, context):
        kept = context.top_magnitude(self.fine_tune(task, context))
        died = Path(__file__).with_name(f"died-{task.name}")
        if not died.exists():
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return kept
""",
    "endless.py": """
import time
from cl_graft import Strategy


class endless(Strategy):
    def learn(self, task, context):
        time.sleep(600)
""",
}

# A worker of a sweep, and nothing else of a sweep: its cell never ends.
ONE_WORKER = """
import sys
from cl_graft.config import RunConfig
from cl_graft.experiment.executors.local import run_cells

scenario, strategy, out = sys.argv[1:]
config = RunConfig(scenario=scenario, strategy=strategy, model="nano-llama", out=out, wandb="off")
list(run_cells([config], lambda cell, what, done, at: print(what, flush=True), 1))
"""


@pytest.fixture(scope="module")
def plugins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plugins")
    for name, text in PLUGINS.items():
        (folder / name).write_text(text)
    return folder


def command(plugins: Path, out: Path, strategies: str, workers: int) -> list[str]:
    words = [sys.executable, "-m", "cl_graft", "sweep", "--scenarios", str(plugins / "moving.py")]
    words += ["--strategies", strategies, "--seeds", "0,1", "--models", "nano-llama"]
    return [*words, "--out", str(out), "--wandb", "off", "--workers", str(workers)]


def start(words: list[str]) -> subprocess.Popen[str]:
    """In a process group of its own and with Ctrl-C heard, as a terminal starts it."""
    return subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's `&` ignores it
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def whole_stages(out: Path) -> int:
    return len(list(out.glob("*/experiences/*/experience.json")))


def wait_for_stages(process: subprocess.Popen[str], out: Path, count: int) -> None:
    while whole_stages(out) < count and process.poll() is None:
        time.sleep(0.02)
    assert process.poll() is None, process.communicate()


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that do not end within half a minute; the dead that nobody has buried do not count."""
    deadline = time.monotonic() + 30
    while (left := [p for p in processes if _runs(p)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def _runs(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def numbers(out: Path) -> dict[str, Any]:
    """Of every cell: all that must not depend on how it was run."""
    found = {}
    for file in out.glob("*/result.json"):
        result = json.loads(file.read_text())
        packs = sorted((file.parent / "packs").rglob("*.safetensors"))
        digests = [SkillPack.load(pack).digest for pack in packs]
        found[file.parent.name] = ({key: result[key] for key in kills.RESULT}, digests)
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
    litter: list[Path]  # what a sweep that was stopped should not leave
    strays: list[psutil.Process]


@dataclass
class Story:
    """A sweep stopped twice, and then let finish, with two cells more that fail."""

    out: Path
    words: list[str]
    stops: dict[str, Stop]
    last: subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def story(plugins: Path, tmp_path_factory: pytest.TempPathFactory) -> Story:
    """Stopped by Ctrl-C and by SIGKILL, which both reach all of its processes."""
    out, rng = tmp_path_factory.mktemp("stopped"), random.Random(0)
    words = command(plugins, out, "graftllm,lora", 2)  # four cells of three stages
    stops = {}
    for how, number in (("ctrl-c", signal.SIGINT), ("kill", signal.SIGKILL)):
        process = start(words)
        wait_for_stages(process, out, whole_stages(out) + 1)
        time.sleep(rng.uniform(0, 1))
        family = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, number)
        _, stderr = process.communicate()
        strays = alive(family)
        litter = [*out.rglob("*.tmp"), *out.rglob("traceback.txt")]
        stops[how] = Stop(process.returncode, stderr, whole_stages(out), litter, strays)
    more = command(plugins, out, f"graftllm,lora,{plugins / 'unlucky.py'}", 1)
    last = subprocess.run(more, capture_output=True, text=True, check=False)
    return Story(out, words, stops, last)


def test_a_sweep_stopped_again_and_again_ends_with_the_numbers_of_single_runs(
    story: Story, plugins: Path, tmp_path: Path
) -> None:
    assert all(0 < stop.stages < 12 for stop in story.stops.values()), "stopped in the middle"
    alone = Sweep(
        scenarios=[str(plugins / "moving.py")],
        strategies=["graftllm", "lora"],
        seeds=[0, 1],
        models=["nano-llama"],
        out=tmp_path,
        wandb="off",
    )
    for config in alone.cells():
        assert run(config)["complete"]
    assert numbers(story.out) == numbers(tmp_path)
    matrices = {json.dumps(found["matrix"]) for found, _ in numbers(tmp_path).values()}
    assert len(matrices) == 4, "every strategy and seed has numbers of its own"


def test_ctrl_c_says_how_to_go_on_and_leaves_nothing_behind(story: Story) -> None:
    stop = story.stops["ctrl-c"]
    assert stop.code == 130
    assert stop.stderr.endswith("stopped; run the same command again to continue.\n")
    assert "Traceback" not in stop.stderr
    assert stop.litter == []
    assert stop.strays == []


def test_a_worker_hears_no_ctrl_c_and_does_not_outlive_the_process_that_started_it(
    plugins: Path, tmp_path: Path
) -> None:
    names = [str(plugins / name) for name in ("moving.py", "endless.py")]
    process = start([sys.executable, "-c", ONE_WORKER, *names, str(tmp_path)])
    assert process.stdout is not None
    assert process.stdout.readline() == "loading the model\n"
    family = psutil.Process(process.pid).children(recursive=True)
    assert family
    deaf = [hears_no_interrupt(child.pid) for child in family]
    process.kill()
    process.communicate()
    assert alive(family) == []
    assert all(deaf), "a second interrupt would cut the tidying after the first one short"


def hears_no_interrupt(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    if not status.exists():  # only Linux tells
        return True
    masks = dict(line.split(":\t", 1) for line in status.read_text().splitlines() if ":\t" in line)
    return any(int(masks[which], 16) >> (signal.SIGINT - 1) & 1 for which in ("SigBlk", "SigIgn"))


def test_a_cell_whose_process_is_killed_goes_on_in_another(plugins: Path, tmp_path: Path) -> None:
    """Three attempts; one that lives to its end is enough."""
    words = [*command(plugins, tmp_path, str(plugins / "mortal.py"), 1), "--seeds", "0"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done
    assert len(list(plugins.glob("died-*"))) == 2
    assert [json.loads(f.read_text())["complete"] for f in tmp_path.glob("*/result.json")] == [True]


def test_a_sweep_that_is_done_does_nothing(story: Story) -> None:
    before = files(story.out)
    again = subprocess.run(story.words, capture_output=True, text=True, check=False)
    assert again.returncode == 0
    assert again.stderr == "", "nothing to prepare, nothing to train"
    assert "Ranking: moving" in again.stdout
    assert files(story.out) == before


def test_a_cell_that_fails_leaves_its_traceback_and_the_others_go_on(story: Story) -> None:
    assert story.last.returncode == 1
    assert "Traceback" not in story.last.stderr
    failed = list(story.out.glob("moving__unlucky__*"))
    assert len(failed) == 2
    for folder in failed:
        said = f"failed: {folder.name}: "
        (line,) = [x for x in story.last.stderr.splitlines() if x.startswith(said)]
        assert re.search(r"unlucky\.py, line \d+: RuntimeError: no luck today$", line)
        assert "unlucky.py" in (folder / "traceback.txt").read_text()
        assert not (folder / "result.json").exists()
    assert len(list(story.out.glob("*/result.json"))) == 4


def test_the_last_words_of_a_sweep(story: Story) -> None:
    said, report = story.last.stdout, story.out / "report"
    assert "Ranking: moving · nano-llama · budget 10%" in said
    assert said.count("│ graftllm") == said.count("│ lora") == 1
    assert said.count("unlucky (incomplete: seed") >= 2
    assert str(report) in said.splitlines()[-1]
    kinds = {".csv", ".html", ".json", ".md", ".png", ".svg", ".tex"}
    assert {f.suffix for f in report.iterdir() if f.is_file()} == kinds
    assert len(list((report / "cells").iterdir())) == 6


def test_a_mistake_in_one_cell_is_found_before_any_work(plugins: Path, tmp_path: Path) -> None:
    made = RunConfig(
        scenario=str(plugins / "moving.py"), strategy="lora", model="nano-llama", out=tmp_path
    )
    wrong = made.model_copy(update={"strategy": "graftlm"})
    with pytest.raises(Exception, match="did you mean graftllm"):
        sweep([made, wrong], partial(run_cells, workers=1), lambda *_: None)
    assert not any(tmp_path.iterdir())
