"""What a sweep is going to do, before any of it is done: every stage, what it needs, and what is there already.

Strategies are really built, and asked to learn every task with a stand-in for training that writes down what it is
asked for. A model whose weights are at hand is loaded, so that a finished stage is known by its key; of any other,
the configuration is built on the meta device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch

from . import cell
from .budget import Budget
from .config import RunConfig
from .errors import CLGraftError
from .identity import digest
from .models.chat import rendered
from .models.load import locate
from .record import CellFolder
from .skillpack.file import SkillPack, fingerprint
from .task import Example, Pair, Preference, Task
from .training import checkpoint, cost
from .training.config import Row, StageConfig, accumulation, dpo_job, sft_job
from .training.fit import fit, tokens_of_a_step
from .training.memory import Job, Memory, estimate, longest
from .training.stages import MARKER, Log, Stages, stage_key
from .training.zero import BUCKET

if TYPE_CHECKING:
    from .strategy import Strategy

LOADED = 4e9  # bytes of weights up to which a model is loaded to plan with

# Dense bf16 operations a second, from NVIDIA's data sheets (without sparsity).
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "A10": 125e12}


@dataclass
class PlannedStage:
    """One training job of a sweep.

    start: what its weights are. state: `cached` or `to run`; what starts from a result that is not there yet counts as
    to run. rows: at most, for pairs yet to be sampled. memory: of one process. seconds: of training
    alone; None where neither a probe nor a peak was given. cells: names of those that ask for it.
    """

    task: str
    kind: str
    start: str
    rows: int
    config: StageConfig
    micro_batch: int
    accumulation: int
    processes: int
    parameters: int
    trained: int
    tokens: int
    memory: Memory
    disk: int
    state: str
    seconds: float | None
    cells: list[str]


@dataclass(frozen=True)
class Plan:
    """stages: each once, however many cells share it. cells: {name: its pack budget in bytes, tasks, finished}."""

    stages: list[PlannedStage]
    cells: dict[str, dict[str, Any]]
    disk: int
    disk_free: int

    @property
    def seconds(self) -> float | None:
        """Of the training that is not cached; None where a part of it could not be estimated."""
        found = [s.seconds for s in self.stages if s.state != "cached"]
        return None if any(s is None for s in found) else float(sum(s for s in found if s))

    def json(self) -> dict[str, Any]:
        stages = [asdict(s) | {"memory_device": s.memory.device} for s in self.stages]
        return {
            "stages": stages,
            "cells": self.cells,
            "seconds": self.seconds,
            "disk": self.disk,
            "disk_free": self.disk_free,
        }


class _Enough(Exception):
    """The last stage of a task was asked for; what a method does after it needs what training made."""


def plan(
    cells: Sequence[RunConfig],
    probe: bool = False,
    peak: float | None = None,
    utilisation: float = cost.UTILISATION,
    gpu: bool = False,
) -> Plan:
    """Raises, in one sentence, all that `cl_graft.run` would raise before its first stage.

    probe: three real steps of each stage of a model that could be loaded tell its time. Else time follows from
    operations at `utilisation` of `peak`, operations a second of one device; None takes the one of this GPU.
    gpu: memory is that of GPUs, with bf16, though this machine has none.
    """
    import shutil

    stages: dict[str, PlannedStage] = {}
    found: dict[str, dict[str, Any]] = {}
    memories: dict[Any, Memory] = {}
    timer = _Timer(probe, peak or _own_peak(), utilisation)
    gpu = gpu or torch.cuda.is_available()
    for config in cells:
        own, about = _of_cell(config, memories, timer, gpu)
        found[config.cell] = about
        for key, stage in [] if about["finished"] else own:
            stages.setdefault(key, stage).cells.append(config.cell)
    listed = list(stages.values())
    packs = sum(c["tasks"] * c["pack_bytes"] for c in found.values() if not c["finished"])
    disk = packs + sum(s.disk for s in listed if s.state != "cached")
    out = cells[0].out.absolute()
    existing = next(p for p in (out, *out.parents) if p.exists())
    return Plan(listed, found, disk, shutil.disk_usage(existing).free)


def _of_cell(
    config: RunConfig, memories: dict[Any, Memory], timer: _Timer, gpu: bool
) -> tuple[list[tuple[str, PlannedStage]], dict[str, Any]]:
    # nothing is executed here, so nobody needs to consent to it
    scenario, strategy_class, options = cell.prepare(
        config.model_copy(update={"allow_code_execution": True})
    )
    torch.set_num_threads(config.threads)
    model, tokenizer, exact = _model(config)
    if scenario.chat:
        scenario = rendered(scenario, tokenizer)
    parameters = sum(p.numel() for p in model.parameters())
    budget = Budget(config.budget, parameters)
    strategy = strategy_class(
        model=model,
        tokenizer=tokenizer,
        scenario=scenario,
        budget=budget,
        seed=config.seed,
        options=options,
    )
    if not exact:
        strategy.grafted._base = "planned"  # a fingerprint needs the weights
    recorder = _Recorder(config, strategy, exact, memories, timer, gpu)
    folder = CellFolder(config.out / config.cell)
    learned = max(0, len(folder.stages()) - 1)  # the first record is the base's
    for task in scenario.tasks:
        recorder.learn(task)
    limit = budget.bytes if strategy_class.budgeted else 2 * parameters
    done = cell.finished(config) is not None
    about = {"pack_bytes": limit, "tasks": len(scenario.tasks), "finished": done}
    left = scenario.task_names[learned:]
    return [(key, stage) for key, stage in recorder.found if stage.task in left], about


def _model(config: RunConfig) -> tuple[Any, Any, bool]:
    """Model, tokenizer, and whether the weights are the real ones."""
    from transformers import AutoTokenizer

    from .models.load import load
    from .models.skeleton import skeleton

    place = locate(config.model, config.data_dir)
    weights = list(Path(place).glob("*.safetensors")) if Path(place).is_dir() else []
    if weights and sum(f.stat().st_size for f in weights) <= LOADED:
        return *load(config.model, config.data_dir), True
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    except Exception as error:
        raise CLGraftError(
            f"the tokenizer of {config.model!r} cannot be loaded ({type(error).__name__}); fetch the model's "
            "configuration and tokenizer first."
        ) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return skeleton(place).model, tokenizer, False


class _Recorder:
    """Stands in for training/stages.py: says what a strategy asks for, and what is finished of it."""

    def __init__(
        self,
        config: RunConfig,
        strategy: Strategy,
        exact: bool,
        memories: dict[Any, Memory],
        timer: _Timer,
        gpu: bool,
    ):
        self.config, self.strategy, self.memories, self.timer = config, strategy, memories, timer
        self.gpu = gpu
        self.stages = Stages(config.store, config.launch)
        self.exact = exact  # whether the model holds the weights that it would hold
        self.real = exact
        self.start, self.task = "base", strategy.scenario.tasks[0]
        self.chain = ""  # the stage that the next one goes on from, if it was planned
        self.found: list[tuple[str, PlannedStage]] = []
        self.adapter: tuple[Any, int] | None = None
        strategy.stages = self  # type: ignore[assignment]

    def learn(self, task: Task) -> None:
        """Let the strategy learn the task as far as its last stage."""
        strategy, number = self.strategy, len(self.strategy.packs)
        self.task, self.start, self.chain = task, "base", ""
        if number and strategy.keeps in ("sum", "latest"):
            self.start, self.exact = f"after {strategy.packs[-1].task}", False
            self.chain = f"{self.config.cell}, {self.start}"
        before = len(self.found)
        try:
            strategy.learn(task, strategy.context(task), **strategy.options)
        except _Enough:
            pass
        except CLGraftError:
            raise
        except Exception:
            # A method that goes on from its own last pack, which is empty here, asks for the same once more.
            if len(self.found) == before:
                self._by_recipe(task)
        strategy._restore_base()
        self.exact = self.real
        header = SkillPack({}, task.name, "", {}, strategy.grafted.base, {})
        strategy.packs.append(header)
        strategy.grafted.active = ()

    def run(
        self,
        model: Any,
        tokenizer: Any,
        rows: Sequence[Row],
        job: StageConfig,
        progress: Any = None,
    ) -> tuple[Path, Log]:
        lora = model.peft_config["default"] if checkpoint.is_adapted(model) else None
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self.adapter = (lora, trained)
        key, state = f"{self.chain} > {digest(list(rows), asdict(job))}", "to run"
        if self.exact:
            key = stage_key(fingerprint(model.named_parameters()), tokenizer, rows, job)
            folder = self.stages.folder / "stages" / key
            state = "cached" if (folder / MARKER).is_file() else "to run"
        self.chain = key
        self._enter(key, rows, job, lora, trained, state)
        if state == "cached":
            checkpoint.load_into(model, folder)
        else:
            self.exact = False
        self.start = f"after {job.kind} of {self.task.name}"
        if job.kind == "dpo" or self.task.training.preference is None:
            raise _Enough
        return Path(), Log()

    def pairs(
        self, model: Any, tokenizer: Any, task: Task, half: Preference, seed: int, allow: bool
    ) -> list[Pair]:
        """Those that were sampled before, or as many as can be, each with the longest answers there may be."""
        if self.exact:
            start = fingerprint(model.named_parameters())
            if self.stages.pairs_file(start, tokenizer, task, half, seed).is_file():
                return self.stages.pairs(model, tokenizer, task, half, seed, allow)
        chosen = list(task.train)[: half.prompts]
        self.exact = False
        return [Pair(e.prompt, e.completion, e.completion) for e in chosen]

    def _by_recipe(self, task: Task) -> None:
        lora, trained = self.adapter or (None, 0)
        self.exact = False
        seed, half = self.strategy._stage_seed, task.training.preference
        rows, job = sft_job(task, seed)
        self._enter(f"{self.chain} > sft", rows, job, lora, trained, "to run")
        if half:
            pairs = task.pairs or self.pairs(None, None, task, half, seed, False)
            rows, job = dpo_job(task, pairs, seed)
            self.start = f"after sft of {task.name}"
            self._enter(f"{self.chain} > dpo", rows, job, lora, trained, "to run")

    def _enter(
        self,
        key: str,
        rows: Sequence[Row],
        job: StageConfig,
        lora: Any,
        trained: int,
        state: str,
    ) -> None:
        launch, model = self.config.launch, self.strategy.model
        tokenizer = self.strategy.tokenizer
        micro, accumulated = accumulation(job.batch, launch)
        everything = sum(p.numel() for n, p in model.named_parameters() if ".lora_" not in n)
        examples = [
            Pair(r["prompt"], r["chosen"], r["rejected"])
            if job.kind == "dpo"
            else Example(r["prompt"], r["completion"])
            for r in rows
        ]
        needs = Job(
            job.kind,
            micro,
            longest(tokenizer, examples, job.max_length),  # type: ignore[arg-type]
            accumulated,
            lora=lora,
            precision="bf16" if self.gpu else "fp32",
            checkpointing=launch.checkpointing,
            stage=launch.zero if launch.processes else 0,  # type: ignore[arg-type]
            processes=launch.processes or 1,
            offload=launch.offload,
            bucket=BUCKET,
            gpu=self.gpu,
        )
        known = (self.config.model, replace(needs, lora=None), str(lora))
        if known not in self.memories:
            self.memories[known] = estimate(model.config, needs)
        per_step = tokens_of_a_step(tokenizer, rows, job)
        tokens = round(per_step * job.steps)
        learned = None if lora is None else trained
        resume = cost.step_bytes(
            everything, trained=learned, stage=needs.stage, precision=needs.precision
        )
        stage = PlannedStage(
            self.task.name,
            job.kind,
            self.start,
            len(rows),
            job,
            micro,
            accumulated,
            launch.processes or 1,
            everything,
            trained,
            tokens,
            self.memories[known],
            cost.stage_bytes(trained if lora is not None else everything) + 2 * resume,
            state,
            None,
            [],
        )
        if state != "cached":
            stage.seconds = self.timer(self.strategy, stage, rows, lora, self.config, self.real)
        self.found.append((key, stage))


class _Timer:
    """Seconds of a stage: of three real steps, or by its operations."""

    def __init__(self, probe: bool, peak: float | None, utilisation: float):
        self.probe, self.peak, self.utilisation = probe, peak, utilisation
        self.known: dict[Any, float] = {}

    def __call__(
        self,
        strategy: Strategy,
        stage: PlannedStage,
        rows: Sequence[Row],
        lora: Any,
        config: RunConfig,
        real: bool,
    ) -> float | None:
        job = stage.config
        if self.probe and real and not config.launch.processes:
            what = (config.model, config.launch, job.kind, job.batch, stage.task, str(lora))
            if what not in self.known:
                self.known[what] = _probed(strategy, rows, replace(job, steps=3), lora, config)
            return self.known[what] * job.steps
        if self.peak is None:
            return None
        embedding = strategy.model.get_input_embeddings().weight
        tied = strategy.model.get_output_embeddings().weight is embedding
        flops = cost.train_flops(
            stage.parameters - (0 if tied else embedding.numel()),
            stage.tokens,
            trained=None if stage.trained == stage.parameters else stage.trained,
            checkpointing=config.launch.checkpointing,
            reference_tokens=round(stage.tokens / job.steps / job.batch * len(rows))
            if job.kind == "dpo"
            else 0,
        )
        return cost.train_seconds(flops, self.peak, stage.processes, self.utilisation)


def _probed(
    strategy: Strategy, rows: Sequence[Row], job: StageConfig, lora: Any, config: RunConfig
) -> float:
    from .models.load import load

    model, tokenizer = load(config.model, config.data_dir)
    if lora is not None:
        from peft import get_peft_model

        model = get_peft_model(model, lora)  # type: ignore[assignment]
    some = list(rows)[: max(3 * job.batch, 1)]
    with TemporaryDirectory() as work:
        return cost.probe(
            lambda progress: fit(
                model, tokenizer, some, job, config.launch, Path(work), progress=progress
            )
        )


def _own_peak() -> float | None:
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((peak for model, peak in PEAKS.items() if model in name), None)
