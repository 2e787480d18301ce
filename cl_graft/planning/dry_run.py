"""A strategy learns its tasks with a stand-in for training, which writes down what it is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from cl_graft.config import RunConfig
from cl_graft.errors import CLGraftError, first_line
from cl_graft.models.spread import named_weights
from cl_graft.planning import cost
from cl_graft.planning.memory import Job, Memory, estimate, of_terms
from cl_graft.skillpack.format.file import SkillPack, fingerprint
from cl_graft.store.digests import digest
from cl_graft.task import Pair, Preference, Task
from cl_graft.training import checkpoint
from cl_graft.training.config import Row, StageConfig, accumulation, dpo_job, order, sft_job
from cl_graft.training.fit import fit
from cl_graft.training.flat import flattens
from cl_graft.training.preferences import Sampled
from cl_graft.training.stages import MARKER, Log, stage_key
from cl_graft.training.term import Term
from cl_graft.training.tokens import largest, lengths, tokens, tokens_of_a_step
from cl_graft.training.zero import BUCKET

if TYPE_CHECKING:
    from cl_graft.strategy.base import Strategy


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


class _Enough(Exception):
    """The last stage of a task was asked for; what a method does after it needs what training made."""


class DryRun:
    """Stands in for training/stages.py: says what a strategy asks for, and what is finished of it."""

    def __init__(
        self,
        config: RunConfig,
        strategy: Strategy,
        exact: bool,
        memories: dict[Any, Memory],
        timer: Timer,
        gpu: bool,
    ):
        self.config, self.strategy, self.memories, self.timer = config, strategy, memories, timer
        self.gpu, self.flattens = gpu, flattens(strategy.model)
        self.stages = strategy.stages
        self.exact = exact  # whether the model holds the weights that it would hold
        self.real = exact
        self.start, self.task = "base", strategy.scenario.tasks[0]
        self.chain = ""  # the stage that the next one goes on from, if it was planned
        self.found: list[tuple[str, PlannedStage]] = []
        self.trained: tuple[Any, int, list[str]] = (None, 0, [])  # of the last stage
        strategy.stages = self  # type: ignore[assignment]

    def learn(self, task: Task) -> None:
        """Let the strategy learn the task as far as its last stage."""
        strategy, number = self.strategy, len(self.strategy.packs)
        task = strategy.at_rate(task)
        self.task, self.start, self.chain = task, "base", ""
        if number and strategy.keeps in ("sum", "latest"):
            self.start, self.exact = f"after {strategy.packs[-1].task}", False
            self.chain = f"{self.config.cell}, {self.start}"
        before, shared = len(self.found), dict[str, Any]()
        try:
            strategy.turn(task)(task, strategy.context(task), **strategy.options)
        except _Enough:
            shared = dict(strategy.foreseen())
        except CLGraftError:
            raise
        except Exception as error:
            if len(self.found) == before and not number:
                told = first_line(error)
                raise CLGraftError(
                    f"{type(strategy).__name__} cannot learn the first task, {task.name!r}: it fails before it trains "
                    f"({type(error).__name__}: {told}); mend the method, or choose another for this model."
                ) from error
            # A method that goes on from its own last pack, which is empty here, asks for the same once more.
            if len(self.found) == before:
                self._by_recipe(task)
        strategy.restore_base()
        self.exact = self.real
        header = SkillPack({}, task.name, "", {}, strategy.grafted.base, {})
        strategy.packs.append(header)
        strategy.shared |= {name: replace(header, tensors=x) for name, x in shared.items()}
        strategy.grafted.active = ()

    def run(
        self,
        model: Any,
        tokenizer: Any,
        rows: Sequence[Row],
        job: StageConfig,
        progress: Any = None,
        terms: Sequence[Term] = (),
        origin: str = "",
    ) -> tuple[Path, Log]:
        lora = model.peft_config["default"] if checkpoint.is_adapted(model) else None
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        frozen = checkpoint.frozen(model)
        self.trained = (lora, trained, frozen)
        if any(x.is_meta for term in terms for x in term.state.values()):
            self.exact = False
        told = [(t.name, t.kind, dict(t.options)) for t in terms]  # their tensors are not known
        asked = (list(rows), asdict(job), told, origin, frozen)
        key, state = f"{self.chain} > {digest(*asked)}", "to run"
        if self.exact:
            start = fingerprint(named_weights(model))
            key = stage_key(start, tokenizer, rows, job, terms, origin, frozen)
            folder = self.stages.folder / "stages" / key
            state = "cached" if (folder / MARKER).is_file() else "to run"
        self.chain = key
        self._enter(key, rows, job, state, terms)
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
    ) -> Sampled:
        """The pairs that were sampled before, or as many as can be, each with the longest answers there may be."""
        if self.exact:
            start = fingerprint(named_weights(model))
            if self.stages.pairs_file(start, tokenizer, task, half, seed).is_file():
                known = self.stages.pairs(model, tokenizer, task, half, seed, allow)
                if not known.pairs:  # so SFT was the last stage
                    raise _Enough
                return known
        chosen = list(task.train)[: half.prompts]
        self.exact = False
        return Sampled([Pair(e.prompt, e.completion, e.completion) for e in chosen], 0)

    @property
    def folder(self) -> Path:
        return self.stages.folder

    def recalled(self, file: Path, make: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """What a method had drawn before, or nothing: a plan draws none."""
        return self.stages.recalled(file, lambda: ({}, [])) if file.is_file() else ({}, [])

    def _by_recipe(self, task: Task) -> None:
        self.exact = False
        seed, half = self.strategy._stage_seed, task.training.preference
        rows, job = sft_job(task, seed)
        self._enter(f"{self.chain} > sft", rows, job, "to run")
        if half:
            pairs = task.pairs or self.pairs(None, None, task, half, seed, False).pairs
            rows, job = dpo_job(task, pairs, seed)
            self.start = f"after sft of {task.name}"
            self._enter(f"{self.chain} > dpo", rows, job, "to run")

    def _enter(
        self,
        key: str,
        rows: Sequence[Row],
        job: StageConfig,
        state: str,
        terms: Sequence[Term] = (),
    ) -> None:
        lora, trained, frozen = self.trained
        examples = tokens(self.strategy.tokenizer, rows, job)
        counts = lengths(examples)
        needs = replace(self._needs(job, max(counts), lora), frozen=tuple(frozen))
        if self.flattens and not any(t.logits for t in terms):
            needs = replace(needs, flat=largest(examples, job, needs.micro_batch))
        vocabulary = self.strategy.model.get_input_embeddings().weight.shape[0]
        held = of_terms(terms, needs, trained, vocabulary)
        named = self.strategy.model.named_parameters()
        everything = sum(p.numel() for n, p in named if ".lora_" not in n)
        resume = cost.step_bytes(
            everything,
            trained=trained,
            adapter=lora is not None,
            stage=needs.stage,
            precision=needs.precision,
        )
        stage = PlannedStage(
            task=self.task.name,
            kind=job.kind,
            start=self.start,
            rows=len(rows),
            config=job,
            micro_batch=needs.micro_batch,
            accumulation=needs.accumulation,
            processes=needs.processes,
            parameters=everything,
            trained=trained,
            tokens=round(tokens_of_a_step(counts, len(rows), job) * job.steps),
            memory=replace(self._memory(needs), terms=held),
            disk=cost.stage_bytes(everything if lora is None else trained) + 2 * resume,
            state=state,
            seconds=None,
            cells=[],
        )
        if state != "cached":
            stage.seconds = self.timer(self.strategy, stage, rows, needs, self.config, self.real)
        self.found.append((key, stage))

    def _needs(self, job: StageConfig, length: int, lora: Any) -> Job:
        launch = self.config.launch
        micro, accumulated = accumulation(job.batch, launch)
        return Job(
            job.kind,
            micro,
            length,
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

    def _memory(self, needs: Job) -> Memory:
        """Memory of a stage, as estimated for another one alike, or now."""
        known = (self.config.model, replace(needs, lora=None), str(needs.lora))
        if known not in self.memories:
            self.memories[known] = estimate(self.strategy.model.config, needs)
        return self.memories[known]


class Timer:
    """Seconds of a stage: of three real steps, or by its operations."""

    def __init__(self, probe: bool, peak: float | None, utilisation: float):
        self.probe, self.peak, self.utilisation = probe, peak, utilisation
        self.known: dict[Any, float] = {}

    def __call__(
        self,
        strategy: Strategy,
        stage: PlannedStage,
        rows: Sequence[Row],
        needs: Job,
        config: RunConfig,
        real: bool,
    ) -> float | None:
        job = stage.config
        if self.probe and real and not config.launch.processes:
            trained = (str(needs.lora), needs.frozen)
            what = (config.model, config.launch, job.kind, job.batch, stage.task, *trained)
            if what not in self.known:
                self.known[what] = _probed(strategy, rows, replace(job, steps=3), needs, config)
            return self.known[what] * stage.tokens
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
    strategy: Strategy, rows: Sequence[Row], job: StageConfig, needs: Job, config: RunConfig
) -> float:
    """Seconds a token of the second and third step, whose rows may be shorter or longer than others."""
    from cl_graft.models.load import load

    model, tokenizer = load(config.model, config.data_dir)
    checkpoint.freeze(model, needs.frozen)
    if needs.lora is not None:
        from peft import get_peft_model

        model = get_peft_model(model, needs.lora)  # type: ignore[assignment]
    some = list(rows)[: 3 * job.batch]
    examples = tokens(tokenizer, some, job)
    timed = [examples[i] for i in order(len(some), job)[job.batch :]]  # the first step is not
    with TemporaryDirectory() as work:
        step = cost.probe(
            lambda progress: fit(
                model, tokenizer, some, job, config.launch, Path(work), progress=progress
            )
        )
    return step * (job.steps - 1) / sum(lengths(timed))
