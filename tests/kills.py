"""Runs that are killed again and again, and what they come to: the numbers of one that was left alone.

    python -m tests.kills --kills 100 --seed 0 --out DIR

For every strategy a cell of the embedded scenario is run to its end. Then the same cell is run elsewhere, by itself or
in a sweep with another strategy's, is killed with all its processes, is looked at, goes on, is killed again, ... until
it is done. Half of the kills come at random times, half as soon as a new name appears in its folder.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import torch
from filelock import FileLock
from safetensors.torch import load_file

from cl_graft import plugins
from cl_graft.config import Launch, RunConfig
from cl_graft.experiment import cache
from cl_graft.experiment.cell import run
from cl_graft.experiment.executors import local
from cl_graft.experiment.sweep import sweep
from cl_graft.skillpack.folders.checkpoint import Checkpoint
from cl_graft.skillpack.format.file import SkillPack, fingerprint
from cl_graft.store.digests import machine, versions
from cl_graft.store.files import LEFT, read_json, read_jsonl, read_lines
from cl_graft.store.record import CellFolder, states
from cl_graft.store.result import collect
from cl_graft.training import checkpoint, fit
from cl_graft.training.stages import MARKER, is_whole

SCENARIO = '''
from dataclasses import replace
from cl_graft import plugins
from cl_graft.task import Preference


def moving(*, seed, data_dir=None, dpo: bool = False, steps: int = 4, tasks: str = "math,code,cipher"):
    """`mini`, small, also in bits per byte, which every step of training moves."""
    make = plugins.load("scenario", "mini")
    made = make(seed=seed, steps=steps, tasks=tasks, batch=4, train_size=32, test_size=4)
    return replace(made, tasks=tuple(_moving(task, steps if dpo else 0) for task in made.tasks))


def _moving(task, dpo_steps):
    metrics = (task.score, "neg_bits_per_byte")
    if task.score != "tests":
        metrics = metrics[::-1]
    made = replace(task, score=metrics[0], also=metrics[1:])
    if not dpo_steps:
        return made
    # an answer is preferred to another of two choices, for a model this small has none right to sample
    train = tuple(replace(e, choices=(e.completion, "zz")) for e in task.train)
    recipe = replace(task.training, preference=Preference(prompts=8, steps=dpo_steps, batch=4))
    return replace(made, train=train, training=recipe)
'''
SMALL = {"model_grafting": {"epochs": 2, "batches": 2}}
PHASES = ("loading", "training", "compressing", "evaluating", "writing")
KILLS_A_STORY = 6
LIMIT = 1200.0  # seconds that no life takes


@dataclass(frozen=True)
class Subject:
    """What is run: a strategy, with preference optimisation after its training or not, told the task or not."""

    strategy: str
    dpo: bool = False
    routed: bool = False

    @property
    def name(self) -> str:
        return self.strategy + " + DPO" * self.dpo + " + router" * self.routed

    def config(self, scenario: Path, out: Path) -> RunConfig:
        options: dict[str, dict[str, Any]] = {scenario.stem: {"dpo": True}} if self.dpo else {}
        if self.strategy in SMALL:
            options[self.strategy] = SMALL[self.strategy]
        return RunConfig(
            scenario=str(scenario),
            strategy=self.strategy,
            model="nano-llama",
            options=options,
            out=out,
            launch=Launch(save_steps=3),
            task_ids="inferred" if self.routed else "given",
            budget="30%" if self.routed else "10%",
            wandb="off",
            allow_code_execution=True,
        )


def subjects() -> list[Subject]:
    more = [Subject("individual", dpo=True), Subject("replay", dpo=True)]
    return [*map(Subject, plugins.names("strategy")), *more, Subject("magnitude", routed=True)]


def write_scenario(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "moving.py").write_text(SCENARIO)
    return folder / "moving.py"


# --- lives: processes that begin at once, with all of theirs in a group of its own ---


def server() -> Any:
    """Processes forked from one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["cl_graft.experiment.preload"])
    return context


def alone(says: Connection, configs: Sequence[RunConfig]) -> None:
    """One cell, as `cl-graft run` has it."""
    os.setsid()
    torch.set_num_threads(1)
    (config,) = configs
    run(config, lambda what, done, at: says.send(what))


def together(says: Connection, configs: Sequence[RunConfig]) -> None:
    """Cells in two workers, as `cl-graft sweep` has them; forked from here, where everything is imported already."""
    os.setsid()
    torch.set_num_threads(1)
    local._context = lambda: multiprocessing.get_context("fork")
    report = lambda cell, what, done, at="": says.send(what)  # noqa: E731
    failures = sweep(configs, partial(local.run_cells, workers=2), report, retry_failed=False)
    if failures:
        raise SystemExit(str(failures))


@dataclass
class Aim:
    """When to kill: after so many seconds, or at the so-manieth name that appears in the folder."""

    seconds: float = LIMIT
    names: int | None = None


@dataclass
class Life:
    """How an attempt ended. code: None if it was killed. said: its last words. names: that appeared meanwhile."""

    code: int | None
    said: str
    seconds: float
    names: int


def live(context: Any, target: Callable, configs: Sequence[RunConfig], out: Path, aim: Aim) -> Life:
    hears, says = context.Pipe(duplex=False)
    process = context.Process(target=target, args=(says, configs))
    before, seen, said = set(names(out)), set[str](), "loading"
    process.start()
    says.close()
    begun, killed = time.monotonic(), False
    while process.is_alive():
        if aim.names is not None:
            seen |= set(names(out)) - before
        if time.monotonic() - begun > aim.seconds or (
            aim.names is not None and len(seen) >= aim.names
        ):
            killed = kill_group(process)
            break
        said = _heard(hears, said)
        time.sleep(0.002)
    process.join()
    seconds = time.monotonic() - begun
    said = _heard(hears, said)
    hears.close()
    return Life(None if killed else process.exitcode, said, seconds, len(set(names(out)) - before))


def _heard(hears: Connection, said: str) -> str:
    try:
        while hears.poll():
            said = hears.recv()
    except EOFError:
        pass
    return said


def kill_group(process: Any) -> bool:
    """SIGKILL for it and all that it started; True unless it ended before."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # before it had a group of its own, or after its end
        process.kill()
    process.join()
    while _members(process.pid):
        time.sleep(0.005)
    return process.exitcode == -signal.SIGKILL


def _members(group: int) -> list[int]:
    """Processes of the group that are not dead."""
    found = []
    for process in psutil.process_iter(["pid", "status"]):
        try:
            if process.info["status"] != psutil.STATUS_ZOMBIE and os.getpgid(process.pid) == group:
                found.append(process.pid)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found


def names(out: Path) -> Iterator[str]:
    """All paths in the folder; what vanishes meanwhile is passed over."""
    for folder, folders, files in os.walk(out):
        yield from (os.path.join(folder, name) for name in (*folders, *files))


def phase(out: Path, said: str) -> str:
    """Where a kill hit: within a write if it left one half-done, else by the last words."""
    if temporaries(out):
        return "writing"
    first = said.split(" ", 1)[0]
    return first if first in PHASES else "loading"


# --- what is on disk ---


def temporaries(out: Path) -> list[Path]:
    """What is half-written; the empty folder that waits for a stage's outcome while it trains is not."""
    found = [f for f in out.rglob("checkpoint-*") if not (f / fit.WHOLE).is_file()]
    found += [f for f in out.rglob(".*") if f.suffix in LEFT]
    return [f for f in found if f.is_file() or any(f.iterdir())]


def assert_whole(out: Path) -> None:
    """Whatever a report or the next run would take for finished can be read, and is."""
    for file in out.rglob("cell.json"):
        _assert_whole_cell(file.parent)
    store = out / "cache"
    for folder in (store / "stages").glob("*"):
        if folder.suffix == ".work":
            _assert_whole_steps(folder)
        elif (folder / MARKER).is_file():
            _assert_whole_stage(folder)
    for file in [*store.glob("evaluations/*.jsonl"), *store.glob("pairs/*.jsonl")]:
        assert read_lines(file) is not None, file
        assert not file.name.startswith("."), file
    if list(out.rglob("state.json")):
        assert states(out)
    if (store / "stages").is_dir() and any((store / "stages").iterdir()):
        for entry in cache.entries(store):
            assert entry.current, entry
            assert entry.kind == "unfinished" or not entry.path.name.startswith("."), entry


def _assert_whole_cell(folder: Path) -> None:
    experiences = CellFolder(folder).experiences()
    for record in experiences:
        outcomes = list(
            read_jsonl(folder / "experiences" / f"{record['experience']:02d}" / "examples.jsonl")
        )
        counted = Counter((line["task"], line["metric"]) for line in outcomes)
        assert set(counted.values()) == {4}, counted
        if record["task"]:
            name = f"{record['experience']:02d}-{record['task']}.safetensors"
            assert SkillPack.load(folder / "packs" / name).digest == record["pack"]
    for name, told in (experiences[-1]["shared"] if experiences else {}).items():
        file = CellFolder(folder).shared_path(told["experience"], name)
        assert SkillPack.load(file).digest == told["pack"]
    for pack in folder.glob("packs/**/*.safetensors"):
        if not pack.name.startswith("."):
            SkillPack.load(pack)
    found = collect(folder)
    assert found["complete"] or not (folder / "result.json").exists()
    if (folder / "result.json").exists():
        assert read_json(folder / "result.json") == found


def _assert_whole_stage(folder: Path) -> None:
    """With the weights that its marker names."""
    assert is_whole(folder), folder
    if (folder / checkpoint.ADAPTER).is_file():
        assert load_file(folder / checkpoint.ADAPTER)
        return
    found = Checkpoint(folder)
    weights = fingerprint((name, found.read(name)) for name in found.tensors)
    assert weights == read_json(folder / MARKER)["weights"], folder


def _assert_whole_steps(work: Path) -> None:
    for folder in work.glob("checkpoint-*"):
        if (folder / fit.WHOLE).is_file() and folder == fit._last_checkpoint(work, tidy=False):
            for file in folder.glob("*.safetensors"):
                assert load_file(file)
            assert torch.load(folder / "optimizer.pt", weights_only=True)
            assert read_json(folder / "trainer_state.json")["global_step"]


def assert_done(out: Path) -> None:
    """Nothing half-made is left, and nothing locked."""
    assert [f for f in out.rglob(".*") if f.suffix in LEFT] == []
    assert list(out.rglob("*.work")) == []
    for file in [*out.rglob("*.lock"), *out.rglob(".lock")]:
        with FileLock(file, timeout=0):
            pass


RESULT = [
    "matrix",
    "n",
    "stderr",
    "metrics",
    "extra_matrices",
    "general",
    "general_packs",
    "kl_to_base",
    "pack_bytes",
    "budget_bytes",
    "base_bytes",
    "tokens",
    "complete",
    "routing",
    "shared_bytes",
    "alive_bytes",
]
OF_THE_MACHINE = ("seconds", "tokens_per_second", "peak_memory_mb")


def numbers(folder: Path) -> dict[str, Any]:
    """Of a cell: all that must not depend on how often it was stopped, or beside what it ran."""
    result = read_json(folder / "result.json")
    records = CellFolder(folder).experiences()
    losses = [
        {key: value for key, value in line.items() if key not in OF_THE_MACHINE}
        for record in records
        for line in record["losses"]
    ]
    return {
        **{key: result[key] for key in RESULT},
        "packs": {
            f.relative_to(folder).as_posix(): SkillPack.load(f).digest
            for f in sorted(folder.glob("packs/**/*.safetensors"))
        },
        "losses": losses,
        "stage tokens": [record["tokens"] for record in records],
        "examples": [f.read_text() for f in sorted(folder.glob("experiences/*/examples.jsonl"))],
    }


# --- stories: killed, looked at, gone on with ---


@dataclass
class Row:
    """The table's row of one strategy."""

    name: str
    single: int = 0
    sweep: int = 0
    where: Counter = field(default_factory=Counter)
    identical: int = 0  # kills after which the numbers were those of the reference
    different: list[str] = field(default_factory=list)

    @property
    def kills(self) -> int:
        return self.single + self.sweep


@dataclass
class Reference:
    """An uninterrupted cell, how long it took, and how many names appeared."""

    numbers: dict[str, Any]
    seconds: float
    names: int


class Stories:
    def __init__(self, folder: Path, seed: int, chosen: Sequence[Subject]):
        self.folder, self.seed, self.chosen = folder, seed, list(chosen)
        self.context, self.scenario = server(), write_scenario(folder)
        self.references: dict[Subject, Reference] = {}

    def refer(self, subject: Subject) -> None:
        """Run the subject's cell, undisturbed."""
        out = self.folder / "references" / subject.name.replace(" ", "")
        config = subject.config(self.scenario, out)
        life = live(self.context, alone, [config], out, Aim(names=10**9))
        assert life.code == 0, f"{subject.name}: the uninterrupted run ended with {life.code}"
        assert_whole(out)
        assert_done(out)
        found = numbers(out / config.cell)
        self.references[subject] = Reference(found, life.seconds, life.names)
        shutil.rmtree(out)

    def tell(self, subject: Subject, shares: tuple[int, int]) -> Row:
        """Stories of so many kills of the subject by itself, and so many in sweeps with the next one."""
        row, rng = Row(subject.name), random.Random(f"{self.seed} {subject.name}")
        for in_sweep, share in zip((False, True), shares, strict=True):
            before, number = row.kills, 0
            while (left := share - (row.kills - before)) > 0:
                number += 1
                name = f"{subject.name.replace(' ', '')}-{'sweep' if in_sweep else 'run'}-{number}"
                self._story(subject, in_sweep, min(KILLS_A_STORY, left), row, rng, name)
        return row

    def _story(
        self, subject: Subject, in_sweep: bool, kills: int, row: Row, rng: random.Random, name: str
    ) -> None:
        """One folder: at most so many kills spread over a life; fewer if it comes to its end before."""
        out = self.folder / "killed" / name
        cast = [subject, self._next(subject)] if in_sweep else [subject]
        references = [self.references[s] for s in cast]
        configs = [s.config(self.scenario, out) for s in cast]
        target, hit = (together if in_sweep else alone), 0
        for aim in aims(references, kills, rng):
            life = live(self.context, target, configs, out, aim)
            if life.code is not None:
                assert life.code == 0, f"{subject.name} in {out}: ended with {life.code}"
                break
            hit += 1
            row.where[phase(out, life.said)] += 1
            assert_whole(out)
        else:
            life = live(self.context, target, configs, out, Aim())
            assert life.code == 0, f"{subject.name} in {out}: ended with {life.code}"
        assert_whole(out)
        assert_done(out)
        differs = [
            f"{s.name}: {key}"
            for s, config, wanted in zip(cast, configs, references, strict=True)
            for key, value in numbers(out / config.cell).items()
            if value != wanted.numbers[key]
        ]
        row.different += [f"{out.name}: {what}" for what in differs]
        row.identical += 0 if differs else hit
        if in_sweep:
            row.sweep += hit
        else:
            row.single += hit
        if not differs:
            shutil.rmtree(out)

    def _next(self, subject: Subject) -> Subject:
        return self.chosen[(self.chosen.index(subject) + 1) % len(self.chosen)]


def aims(references: Sequence[Reference], kills: int, rng: random.Random) -> Iterator[Aim]:
    """The gaps between so many random points of a life; every other one counts names instead of seconds."""
    seconds = max(r.seconds for r in references)
    appear = sum(r.names for r in references)
    points = sorted(rng.random() for _ in range(kills))
    first = rng.randrange(2)
    for n, (begin, end) in enumerate(zip([0.0, *points], points, strict=False)):
        if (n + first) % 2:
            yield Aim(names=1 + round((end - begin) * appear))
        else:
            yield Aim(seconds=0.05 + (end - begin) * seconds)


def stories(
    folder: Path,
    kills: int,
    seed: int,
    chosen: Sequence[Subject],
    tell: Callable[[str], None] = lambda line: None,
    jobs: int = 1,
) -> list[Row]:
    """So many kills over all subjects, half of each one's in sweeps; `jobs` stories at a time."""
    told, parts = Stories(folder, seed, chosen), 2 * len(chosen)
    shares = [kills * (n + 1) // parts - kills * n // parts for n in range(parts)]

    def row(number: int) -> Row:
        found = told.tell(chosen[number], (shares[2 * number], shares[2 * number + 1]))
        tell(line(found))
        return found

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(told.refer, chosen))
        return list(pool.map(row, range(len(chosen))))


# --- the table ---


HEAD = ["strategy", "kills", "of a run", "of a sweep", *PHASES, "identical after"]


def cells(row: Row) -> list[str]:
    counts = [row.kills, row.single, row.sweep, *(row.where[p] for p in PHASES)]
    return [row.name, *map(str, counts), f"{row.identical} of {row.kills}"]


def line(row: Row) -> str:
    return f"| {' | '.join(cells(row))} |"


def total(rows: Sequence[Row]) -> Row:
    found = Row("all")
    for row in rows:
        found.single, found.sweep = found.single + row.single, found.sweep + row.sweep
        found.where, found.identical = found.where + row.where, found.identical + row.identical
        found.different += row.different
    return found


def table(rows: Sequence[Row]) -> str:
    rule = "|".join(["---", *["---:"] * (len(HEAD) - 1)])
    lines = [f"| {' | '.join(HEAD)} |", f"|{rule}|", *map(line, (*rows, total(rows)))]
    return "\n".join(lines) + "\n"


def summary(rows: Sequence[Row], kills: int, seed: int, seconds: float) -> dict[str, Any]:
    return {
        "asked": kills,
        "seed": seed,
        "kills": total(rows).kills,
        "identical": total(rows).identical,
        "different": total(rows).different,
        "seconds": round(seconds),
        "rows": [dict(zip(HEAD, cells(row), strict=True)) for row in rows],
        "versions": versions(),
        "machine": machine(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.kills", description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="kills.md and kills.json go here")
    parser.add_argument("--work", type=Path, help="where the runs are (default: OUT/work)")
    parser.add_argument("--jobs", type=int, default=1, help="stories at a time")
    parser.add_argument("--only", help="strategies, by commas")
    asked = parser.parse_args()
    work = asked.work or asked.out / "work"
    chosen = subjects()
    if asked.only:
        chosen = [s for s in chosen if s.name in asked.only.split(",")]
    begun = time.monotonic()
    rows = stories(
        work, asked.kills, asked.seed, chosen, partial(print, flush=True), jobs=asked.jobs
    )
    asked.out.mkdir(parents=True, exist_ok=True)
    found = summary(rows, asked.kills, asked.seed, time.monotonic() - begun)
    (asked.out / "kills.json").write_text(json.dumps(found, indent=1) + "\n")
    (asked.out / "kills.md").write_text(table(rows))
    print(table(rows), end="")
    raise SystemExit(1 if found["different"] else 0)


if __name__ == "__main__":
    main()
