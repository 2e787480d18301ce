"""What a sweep is going to do, before any of it is done: every stage, what it needs, and what is there already.

Strategies are really built, and asked to learn every task with a stand-in for training that writes down what it is
asked for. A model whose weights are at hand is loaded, so that a finished stage is known by its key; of any other,
the configuration is built on the meta device.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from cl_graft.config import RunConfig
from cl_graft.experiment import cell
from cl_graft.experiment.prepare import UNKNOWN, prepare, strategy_of
from cl_graft.models.load import load, load_tokenizer, locate
from cl_graft.models.weights import is_bare
from cl_graft.planning import cost
from cl_graft.planning.dry_run import DryRun, PlannedStage, Timer
from cl_graft.planning.evaluations import Clock, Evaluations, PlannedEvaluation
from cl_graft.planning.memory import Memory
from cl_graft.store.record import CellFolder

LOADED = 4e9  # bytes of weights up to which a model is loaded to plan with

# Dense bf16 operations a second, from NVIDIA's data sheets (without sparsity).
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "A10": 125e12}


@dataclass(frozen=True)
class Plan:
    """stages, evaluations: each once, however many cells share it; evaluations at most, since weights that will turn
    out alike are measured once. cells: {name: its pack budget in bytes, tasks, finished}."""

    stages: list[PlannedStage]
    evaluations: list[PlannedEvaluation]
    cells: dict[str, dict[str, Any]]
    disk: int
    disk_free: int

    @property
    def seconds(self) -> float | None:
        """Seconds of the training that is not cached; None where a part of it could not be estimated."""
        return _sum(self.stages)

    @property
    def evaluation_seconds(self) -> float | None:
        """Seconds of the evaluations that are not cached; None where a part of it was not probed."""
        return _sum(self.evaluations)

    def json(self) -> dict[str, Any]:
        stages = [asdict(s) | {"memory_device": s.memory.device} for s in self.stages]
        return {
            "stages": stages,
            "cells": self.cells,
            "evaluations": [asdict(e) for e in self.evaluations],
            "seconds": self.seconds,
            "evaluation_seconds": self.evaluation_seconds,
            "disk": self.disk,
            "disk_free": self.disk_free,
        }


def plan(
    cells: Sequence[RunConfig],
    probe: bool = False,
    peak: float | None = None,
    utilisation: float = cost.UTILISATION,
    gpu: bool = False,
    told: Callable[[float], None] = lambda done: None,
) -> Plan:
    """Raises, in one sentence, all that `cl_graft.run` would raise before its first stage.

    probe: three real steps of each stage of a model that could be loaded, and some test examples of each task, tell its
    time. Else that of training follows from operations at `utilisation` of `peak`, operations a second of one device;
    None takes the one of this GPU.
    gpu: memory is that of GPUs, with bf16, though this machine has none. told: is told, between
    two cells, the share of them that is planned.
    """
    stages: dict[str, PlannedStage] = {}
    evaluations: dict[str, PlannedEvaluation] = {}
    planned: dict[str, dict[str, Any]] = {}
    memories: dict[Any, Memory] = {}
    timer, clock = Timer(probe, peak or _own_peak(), utilisation), Clock(probe)
    gpu = gpu or torch.cuda.is_available()
    for number, config in enumerate(cells):
        if number:
            told(number / len(cells))
        own, measured, about = _of_cell(config, memories, timer, clock, gpu)
        planned[config.cell] = about
        for key, stage in own:
            stages.setdefault(key, stage).cells.append(config.cell)
        for key, evaluation in measured:
            evaluations.setdefault(key, evaluation).cells.append(config.cell)
    listed = list(stages.values())
    packs = sum(c["tasks"] * c["pack_bytes"] for c in planned.values() if not c["finished"])
    disk = packs + sum(s.disk for s in listed if s.state != "cached")
    out = cells[0].out.absolute()
    existing = next(p for p in (out, *out.parents) if p.exists())
    return Plan(listed, list(evaluations.values()), planned, disk, shutil.disk_usage(existing).free)


def _sum(planned: Sequence[PlannedStage] | Sequence[PlannedEvaluation]) -> float | None:
    estimates = [each.seconds for each in planned if each.state != "cached"]
    return None if any(s is None for s in estimates) else float(sum(s for s in estimates if s))


def _of_cell(
    config: RunConfig, memories: dict[Any, Memory], timer: Timer, clock: Clock, gpu: bool
) -> tuple[list[tuple[str, PlannedStage]], list[tuple[str, PlannedEvaluation]], dict[str, Any]]:
    # nothing is executed here, so nobody needs to consent to it
    scenario, strategy_class, options = prepare(
        config.model_copy(update={"allow_code_execution": True}), bare=True
    )
    torch.set_num_threads(config.threads)
    # anew for each cell: a dry run restores the weights alone, and LoRA leaves them frozen
    model, tokenizer, exact = _model(config)
    strategy = strategy_of(config, scenario, strategy_class, options, model, tokenizer)
    if not exact:
        strategy.grafted._base = UNKNOWN
    strategy.require_possible()
    done = cell.finished(config) is not None
    begun = CellFolder(config.out / config.cell).experiences()  # by a run that was killed
    left = [] if done else scenario.task_names[max(0, len(begun) - 1) :]  # the first is the base's
    measured = Evaluations(config, strategy, exact, clock)
    recorder = DryRun(config, strategy, exact, memories, timer, gpu)
    if left:
        measured.base()
    for task in strategy.scenario.tasks if left else ():
        recorder.learn(task)
        measured.learned()
    limit = strategy.budget.bytes if strategy.budgeted else strategy.budget.base_bytes
    about = {"pack_bytes": limit, "tasks": len(scenario.tasks), "finished": done}
    whose: set[str | None] = {*left} if begun else {None, *left}
    return (
        [(key, stage) for key, stage in recorder.found if stage.task in left],
        [(key, each) for key, each in measured.found if each.by in whose],
        about,
    )


def _model(config: RunConfig) -> tuple[Any, Any, bool]:
    """Model, tokenizer, and whether the weights are the real ones."""
    from cl_graft.models.meta_model import meta_model

    bare = is_bare(Path(config.model))
    place = config.model if bare else locate(config.model, config.data_dir)
    weights = list(Path(place).glob("*.safetensors")) if Path(place).is_dir() else []
    if weights and sum(f.stat().st_size for f in weights) <= LOADED:
        return *load(config.model, config.data_dir), True
    tokenizer = load_tokenizer(config.model, place)
    return meta_model(place).model.requires_grad_(True), tokenizer, False


def _own_peak() -> float | None:
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((peak for model, peak in PEAKS.items() if model in name), None)
