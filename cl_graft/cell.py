"""One cell: for each experience, train, evaluate every task, record. Resumes at task boundaries."""

from __future__ import annotations

import hashlib
import json
import platform
import resource
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__, plugins
from .budget import Budget
from .config import RunConfig
from .errors import CLGraftError, UnknownName
from .record import CellFolder, read_json, read_jsonl, write_json
from .task import Scenario, Task

if TYPE_CHECKING:
    from .evaluation.scorers import Scored
    from .strategy import Strategy

Progress = Callable[[str, float], None]  # what is being done, fraction of the whole cell


def run(
    config: RunConfig | None = None, progress: Progress | None = None, **fields: Any
) -> dict[str, Any]:
    """Run one cell, or continue it, and return its result (the object `cl-graft report --json` prints).

    Give a RunConfig, or its fields: `run(scenario="mini", strategy="graftllm", allow_code_execution=True)`.
    Raises CLGraftError in one sentence for whatever the user can mend.
    """
    config = config or RunConfig(**fields)
    folder = CellFolder(config.out / config.cell)
    if folder.complete:
        return read_json(folder.path / "result.json")
    scenario, strategy_class, options = prepare(config)
    with folder.lock():
        return _compute(
            config, folder, scenario, strategy_class, options, progress or (lambda *a: None)
        )


def prepare(config: RunConfig) -> tuple[Scenario, type[Strategy], dict[str, Any]]:
    """Find and check everything a run names, before anything is computed."""
    Budget(config.budget, 10**9)
    scenario_name, strategy_name = config.short(config.scenario), config.short(config.strategy)
    for owner in config.options:
        if owner not in (
            scenario_name,
            strategy_name,
            *plugins.names("strategy"),
            *plugins.names("scenario"),
        ):
            raise UnknownName("scenario or strategy", owner, [scenario_name, strategy_name])
    make = plugins.load("scenario", config.scenario)
    chosen = plugins.check_options(
        "scenario", scenario_name, make, config.options.get(scenario_name, {})
    )
    strategy_class = plugins.load("strategy", config.strategy)
    options = plugins.check_options(
        "strategy", strategy_name, strategy_class, config.options.get(strategy_name, {})
    )
    scenario = make(seed=config.seed, data_dir=config.data_dir, **chosen)
    programs = [t for t in scenario.tasks if "tests" in t.metrics]
    if programs:
        from .evaluation.sandbox import require_consent

        require_consent(config.allow_code_execution, f"scoring task {programs[0].name!r}")
    return scenario, strategy_class, options


def _compute(
    config: RunConfig,
    folder: CellFolder,
    scenario: Scenario,
    strategy_class: type[Strategy],
    options: dict[str, Any],
    progress: Progress,
) -> dict[str, Any]:
    import torch
    from transformers import set_seed

    from .models.load import load
    from .stream import benchmark
    from .tracking import Tracker

    torch.set_num_threads(config.threads)
    progress("loading the model", 0.0)
    model, tokenizer = load(config.model, config.data_dir)
    set_seed(config.seed)
    budget = Budget(config.budget, sum(p.numel() for p in model.parameters()))
    strategy = strategy_class(
        model=model,
        tokenizer=tokenizer,
        scenario=scenario,
        budget=budget,
        seed=config.seed,
        options=options,
        allow_code=True,
    )
    identity = {
        "config": config.model_dump(
            mode="json",
            include={"scenario", "strategy", "model", "seed", "budget", "options", "threads"},
        ),
        "options": options,
        "versions": versions(),
        "base": strategy.grafted.base,
        "data": data_fingerprint(scenario),
        "tasks": scenario.task_names,
        "budget_bytes": budget.bytes,
        "base_bytes": budget.base_bytes,
    }
    folder.begin(json.loads(json.dumps(identity)))
    tracker = Tracker(config, folder.path / "tracking", versions())
    try:
        _stages(folder, scenario, strategy, benchmark(scenario), tracker, progress)
        result = summarise(config, folder, budget)
        write_json(folder.path / "result.json", result)
        tracker.finish(result)
    except BaseException:
        tracker.abandon()
        raise
    return result


def _stages(
    folder: CellFolder,
    scenario: Scenario,
    strategy: Strategy,
    stream: Any,
    tracker: Any,
    progress: Progress,
) -> None:
    done = _restore(folder, scenario, strategy)
    for record in done:
        tracker.stage(record)
    total = len(scenario.tasks) + 1
    for stage in range(len(done), total):
        task = scenario.tasks[stage - 1] if stage else None
        strategy.progress = partial(_part_of, progress, stage, total)
        before, tokens, losses = (
            dict(strategy.seconds),
            strategy.log.tokens,
            len(strategy.log.losses),
        )
        pack_bytes = None
        if task:
            strategy.train(stream.train_stream[stage - 1], eval_streams=[])
            pack_path = folder.pack_path(stage, task.name)
            pack_path.parent.mkdir(exist_ok=True)
            pack_bytes = strategy.packs[-1].save(pack_path)
        progress(f"evaluating after {task.name if task else 'no task'}", (stage + 0.8) / total)
        known = set(strategy.measured)
        strategy.eval(stream.test_stream)
        general = (
            strategy.measure(scenario.general, strategy.active(None)) if scenario.general else None
        )
        active = {
            t.name: [p.digest for p in strategy.active(j)] for j, t in enumerate(scenario.tasks)
        }
        record = {
            "stage": stage,
            "task": task.name if task else None,
            "scores": _by_metric(strategy.results),
            "general": _by_metric({"": general}, flat=True) if general else None,
            "active": active,
            "general_active": [p.digest for p in strategy.active(None)],
            "measured": [name for name, packs in active.items() if (name, *packs) not in known],
            "pack": strategy.packs[-1].digest if task else None,
            "pack_bytes": pack_bytes,
            "seconds": {k: v - before[k] for k, v in strategy.seconds.items()},
            "tokens": strategy.log.tokens - tokens,
            "peak_memory_mb": peak_memory_mb(),
            "losses": strategy.log.losses[losses:],
        }
        everything = dict(strategy.results)
        if scenario.general and general:
            everything[f"general:{scenario.general.name}"] = general
        folder.write_stage(stage, _example_lines(everything), record)
        tracker.stage(record)


def _part_of(progress: Progress, stage: int, total: int, what: str, part: float) -> None:
    progress(what, (stage + 0.8 * part) / total)


def _restore(folder: CellFolder, scenario: Scenario, strategy: Strategy) -> list[dict[str, Any]]:
    """Give the strategy its packs and outcomes back; returns the records of the stages that are whole."""
    from .evaluation.scorers import Scored
    from .skillpack.file import SkillPack

    records = folder.stages()
    for record in records:
        if record["task"]:
            pack = SkillPack.load(
                folder.pack_path(record["stage"], record["task"]), base=strategy.grafted.base
            )
            strategy.packs.append(pack)
        outcomes: dict[str, dict[str, list[Scored]]] = {}
        for line in read_jsonl(folder.stage_path(record["stage"]) / "examples.jsonl"):
            scored = Scored(line["score"], line["answer"], line["note"])
            outcomes.setdefault(line["task"], {}).setdefault(line["metric"], []).append(scored)
        for name, digests in record["active"].items():
            strategy.measured[(name, *digests)] = outcomes[name]
        if scenario.general and record["general"]:
            key = (scenario.general.name, *record["general_active"])
            strategy.measured[key] = outcomes[f"general:{scenario.general.name}"]
    return records


def _by_metric(results: dict[str, dict[str, list[Scored]]], flat: bool = False) -> dict[str, Any]:
    """{metric: {task: {value, n, stderr}}}; `flat` drops the task level. The primary metric is 'score'."""
    from .matrix import mean_stderr

    table: dict[str, Any] = {}
    for task, metrics in results.items():
        for number, (metric, outcomes) in enumerate(metrics.items()):
            scores = [o.score for o in outcomes]
            cell = {
                "value": sum(scores) / len(scores),
                "n": len(scores),
                "stderr": mean_stderr(scores),
            }
            key = "score" if number == 0 else metric
            if flat:
                table[key] = cell
            else:
                table.setdefault(key, {})[task] = cell
    return table


def _example_lines(results: dict[str, dict[str, list[Scored]]]) -> list[dict[str, Any]]:
    return [
        {"task": task, "metric": metric, "index": i, **asdict(outcome)}
        for task, metrics in results.items()
        for metric, outcomes in metrics.items()
        for i, outcome in enumerate(outcomes)
    ]


def summarise(config: RunConfig, folder: CellFolder, budget: Budget) -> dict[str, Any]:
    """The cell's result, from what is on disk; works for a cell that is still under way, too."""
    identity, records = read_json(folder.path / "cell.json"), folder.stages()
    return result_object(identity, records)


def result_object(identity: dict[str, Any], records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The object of one cell: matrix with row 0 the base, null where unmeasured, and everything beside it."""
    from .matrix import PerformanceMatrix

    config, tasks = RunConfig(**identity["config"]), list(identity["tasks"])
    rows = len(tasks) + 1

    def table(metric: str, key: str) -> list[list[float | None]]:
        filled = [[r["scores"].get(metric, {}).get(t, {}).get(key) for t in tasks] for r in records]
        return filled + [[None] * len(tasks)] * (rows - len(filled))

    matrix = table("score", "value")
    further = sorted({m for r in records for m in r["scores"]} - {"score"})
    metrics = PerformanceMatrix(matrix, tasks=tasks).metrics()
    kinds = records[0]["seconds"] if records else {}
    return {
        "scenario": config.short(config.scenario),
        "strategy": config.short(config.strategy),
        "label": config.label,
        "model": config.model,
        "seed": config.seed,
        "budget": config.budget,
        "budget_bytes": identity["budget_bytes"],
        "tasks": tasks,
        "matrix": matrix,
        "n": table("score", "n"),
        "stderr": table("score", "stderr"),
        "metrics": {k: None if v != v else v for k, v in metrics.items()},
        "extra_matrices": {m: table(m, "value") for m in further},
        "general": [r["general"]["score"]["value"] if r["general"] else None for r in records],
        "pack_bytes": [r["pack_bytes"] for r in records if r["pack_bytes"] is not None],
        "base_bytes": identity["base_bytes"],
        "seconds": {kind: sum(r["seconds"][kind] for r in records) for kind in kinds},
        "tokens": sum(r["tokens"] for r in records),
        "peak_memory_mb": max((r["peak_memory_mb"] for r in records), default=None),
        "options": identity["options"],
        "versions": identity["versions"],
        "complete": len(records) == rows,
    }


def collect(path: Path) -> dict[str, Any]:
    """The result of the cell in `path`, complete or not."""
    identity = read_json(path / "cell.json")
    if identity.get("format") != 1:
        raise CLGraftError(
            f"{path} was written in results format {identity.get('format')} and this version reads 1; "
            "report it with the version that wrote it."
        )
    return result_object(identity, CellFolder(path).stages())


def data_fingerprint(scenario: Scenario) -> str:
    """Digest of every example and recipe of the scenario."""
    digest = hashlib.blake2b(digest_size=16)

    def add(task: Task) -> None:
        digest.update(json.dumps([task.name, task.metrics, asdict(task.training)]).encode())
        for example in (*task.train, *task.test):
            digest.update(json.dumps(asdict(example)).encode())

    for task in scenario.tasks + ((scenario.general,) if scenario.general else ()):
        add(task)
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Versions that a result depends on."""
    names = ("torch", "transformers", "trl", "peft", "avalanche-lib", "safetensors")
    return {
        "cl_graft": __version__,
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in names},
    }


def peak_memory_mb() -> float:
    """Peak resident memory of this process so far, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1024 * 1024 if sys.platform == "darwin" else 1024)
