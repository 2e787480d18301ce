"""How long a report takes and how large its page is: 2 scenarios x 25 strategies x 10 seeds, as cells leave them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import numpy as np

from cl_graft.evaluation.scores import by_metric
from cl_graft.report.style import KNOWN
from cl_graft.store.digests import digest, machine, versions
from cl_graft.store.record import FORMAT, CellFolder
from cl_graft.store.result import collect
from cl_graft.task import Example, Scenario, Task

TASKS = ("math", "code", "cipher")
BASE_BYTES = 2_000_000
OWN = {
    "graftllm": "given",
    "lora": "inferred",
    "individual": "given",
}  # with a pack a task; others have one for all
FREE = ("sequential", "individual", "joint")  # of any size
ROUTER_BYTES = 5_000


def bench_report(
    cells: int = 500, examples: int = 64, say: Callable[[str], None] = lambda what: None
) -> dict[str, Any]:
    """Seconds on the clock of a first report and of one where nothing has changed, and what they leave."""
    from cl_graft.report import find, write

    with TemporaryDirectory() as work:
        out, target = Path(work), Path(work) / "report"
        say(f"making {cells} cells")
        make(out, cells, examples)
        seconds = []
        for what in ("first report", "second report"):
            say(what)
            begun = perf_counter()
            index = write(find([out]), target)
            seconds.append(round(perf_counter() - begun, 2))
        pages = list((target / "cells").iterdir())
        return {
            "cells": cells,
            "examples": examples * len(TASKS) * (len(TASKS) + 1) * cells,
            "first_seconds": seconds[0],
            "second_seconds": seconds[1],
            "page_bytes": index.stat().st_size,
            "cell_page_bytes": max(p.stat().st_size for p in pages),
            "machine": machine(),
        }


def make(out: Path, cells: int, examples: int, strategies: int = 25, scenarios: int = 2) -> None:
    """Cells as runs leave them, with outcomes drawn at random: strategies differ in how much they learn and forget."""
    from cl_graft.store import prompts

    rng = np.random.default_rng(0)
    names = [*KNOWN, *(f"plugin_{k}" for k in range(strategies))][:strategies]
    seeds = max(1, cells // (strategies * scenarios))
    about = {"versions": versions(), "machine": machine()}
    for s in range(scenarios):
        for seed in range(seeds):
            scenario = _scenario(f"synthetic-{s}", examples, rng)
            data = digest(s, seed)
            prompts.keep(out, data, scenario)
            for k, name in enumerate(names):
                identity = {
                    "config": {
                        "scenario": scenario.name,
                        "strategy": name,
                        "model": "mini-llama",
                        "seed": seed,
                        "budget": "10%",
                        "options": {},
                        "threads": 1,
                        "train_on": {},
                        **({"task_ids": "inferred"} if OWN.get(name) == "inferred" else {}),
                    },
                    "options": {"rank": 8},
                    **about,
                    "reads_data_dir": False,
                    "base": "0" * 32,
                    "data": data,
                    "tasks": list(TASKS),
                    "budget_bytes": BASE_BYTES // 10,
                    "budgeted": name not in FREE,
                    "base_bytes": BASE_BYTES,
                }
                folder = CellFolder(out / f"{scenario.name}__{name}__mini-llama__10pct__seed{seed}")
                _cell(folder, identity, scenario, k / max(1, len(names) - 1), rng)


def _scenario(name: str, examples: int, rng: np.random.Generator) -> Scenario:
    def example(task: str) -> Example:
        a, b = rng.integers(1, 99, 2)
        prompt = f"Question of {task}: Anna has {a} apples and buys {b} more. How many are there?\nAnswer:"
        return Example(prompt, f"{a}+{b}={a + b}. #### {a + b}")

    tasks = tuple(Task(t, [], [example(t) for _ in range(examples)], "exact") for t in TASKS)
    return Scenario(name, tasks)


def _cell(
    folder: CellFolder,
    identity: dict[str, Any],
    scenario: Scenario,
    forgets: float,
    rng: np.random.Generator,
) -> None:
    from cl_graft.evaluation.scorers import Scored

    path = folder.path
    (path / "experiences").mkdir(parents=True)
    (path / "cell.json").write_text(json.dumps({"format": FORMAT, **identity}, indent=1))
    for experience in range(len(TASKS) + 1):
        outcomes = {}
        for j, task in enumerate(scenario.tasks):
            learned, age = experience > j, max(0, experience - j - 1)
            right = rng.random(len(task.test)) < (
                0.8 * (1 - forgets / 2) ** age if learned else 0.2
            )
            outcomes[task.name] = {
                task.metrics[0]: [
                    Scored(1.0, e.completion) if ok else Scored(0.0, f"{e.completion[:6]} or so")
                    for ok, e in zip(right, task.test, strict=True)
                ]
            }
        pack = int(BASE_BYTES * (0.02 + 0.08 * forgets)) if experience else None
        taken = _taken_for(identity["config"], scenario, experience, rng)
        own = identity["config"]["strategy"] in OWN
        shared: dict[str, Any] = {}
        if experience and identity["config"].get("task_ids"):
            shared["router"] = {"experience": experience, "pack": "1" * 32, "bytes": ROUTER_BYTES}
        record = {
            "experience": experience,
            "task": TASKS[experience - 1] if experience else None,
            "scores": by_metric(outcomes, scenario.tasks),
            "general": {},
            "active": {},
            "general_active": {},
            "identical": [],
            "pack": "0" * 32 if experience else None,
            "pack_bytes": pack,
            "shared": shared,
            "alive_bytes": (pack or 0) * (experience if own else 1) + ROUTER_BYTES * len(shared),
            "routing": {
                t: dict(Counter(name or "" for name in names)) for t, names in taken.items()
            },
            "seconds": {
                "train": 30.0 * (experience > 0) * (1 + forgets),
                "compress": 2.0 * (experience > 0),
                "evaluate": 4.0,
                "harness": 1.0,
            },
            "spent": 37.0,
            "tokens": 100_000 * (experience > 0),
            "peak_memory_mb": 700.0 + 100 * forgets,
            "losses": [{"step": k, "loss": 2.0 / (1 + k)} for k in range(10 * (experience > 0))],
        }
        where = folder.experience_path(experience)
        where.mkdir()
        lines = [
            {
                "task": t,
                "metric": m,
                "index": i,
                "score": o.score,
                "answer": o.answer,
                "note": o.note,
                **({"taken_for": taken[t][i]} if taken[t] else {}),
            }
            for t, metrics in outcomes.items()
            for m, scored in metrics.items()
            for i, o in enumerate(scored)
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (where / "examples.jsonl").write_text(text)
        (where / "experience.json").write_text(json.dumps(record, indent=1))
    (path / "result.json").write_text(json.dumps(collect(path), indent=1))


def _taken_for(
    config: Mapping[str, Any], scenario: Scenario, experience: int, rng: np.random.Generator
) -> dict[str, list[str | None]]:
    """{task: what each of its test examples was taken for}, None for the base: by a router nine times in ten rightly.

    Of a task that is yet to be learned, a router names one of those that were.
    """
    seen, found = TASKS[:experience], dict[str, list[str | None]]()
    for task in scenario.tasks:
        known = task.name if task.name in seen else None
        if config["strategy"] not in OWN:
            found[task.name] = []
        elif seen and config.get("task_ids"):
            drawn = rng.choice(seen, len(task.test)).tolist()
            sure = rng.random(len(task.test)) < 0.9
            found[task.name] = [
                known if known and s else d for s, d in zip(sure, drawn, strict=True)
            ]
        else:
            found[task.name] = [known] * len(task.test)
    return found
