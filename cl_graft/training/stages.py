"""Train once, graft many: a stage's outcome is a folder under the hash of everything that determines it.

<cache>/stages/<key>/            the checkpoint (training/checkpoint.py), log.jsonl, and stage.json: what made it
<cache>/stages/<key>.work/       step checkpoints of one that is not finished
<cache>/pairs/<key>.jsonl        how many preference pairs a model sampled, then one a line
<cache>/answers/<key>.jsonl      what it was asked for (training/drawn.py), then an answer a line

Strategies that start a task from the same weights, with the same data, recipe and seed, share its training. A
folder appears whole or not at all, and may be deleted at any time: what is missing is trained again.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from cl_graft.config import Launch
from cl_graft.errors import Diverged
from cl_graft.evaluation import generate
from cl_graft.evaluation.scorers import base, described
from cl_graft.models import pairs as own_pairs
from cl_graft.models import text
from cl_graft.models.spread import named_weights, offloaded
from cl_graft.skillpack import rounding
from cl_graft.skillpack.folders.checkpoint import CheckpointError, new_folder
from cl_graft.skillpack.format.file import fingerprint
from cl_graft.store.digests import code_digest, digest, place, versions, vocabulary
from cl_graft.store.files import (
    RecordError,
    flush,
    read_json,
    read_jsonl,
    read_lines,
    refused,
    write_json,
    write_lines,
)
from cl_graft.store.locks import locked, use
from cl_graft.store.mirror import Mirror
from cl_graft.task import Pair, Preference, Task
from cl_graft.training import (
    acting,
    adapters,
    checkpoint,
    config,
    fit,
    flat,
    launch,
    loss,
    preferences,
    term,
    tokens,
    trainer,
)
from cl_graft.training.config import Row, StageConfig
from cl_graft.training.term import Term

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MARKER = "stage.json"
Lines = Callable[[], tuple[dict[str, Any], list[dict[str, Any]]]]
DISKS = {  # what disks say; memory, processes and sockets have words of their own
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.EIO, errno.ESTALE, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG),
}


@dataclass
class Log:
    """What training cost and how its loss went.

    spent: seconds of this run, waiting for another that trains the same included; next to none for a recalled stage.
    """

    seconds: float = 0.0
    spent: float = 0.0
    tokens: int = 0
    losses: list[dict[str, float]] = field(default_factory=list)

    def add(self, other: Log) -> None:
        self.seconds += other.seconds
        self.spent += other.spent
        self.tokens += other.tokens
        self.losses += other.losses


@dataclass(frozen=True)
class Stages:
    """The folder of finished stages, and how those that are missing are run.

    patient: wait for a stage that another process is running; else locks.Busy is raised.
    """

    folder: Path
    launch: Launch = Launch()
    patient: bool = True
    mirror: Mirror | None = None

    def run(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        rows: Sequence[Row],
        job: StageConfig,
        progress: fit.Progress = lambda done, at: None,
        terms: Sequence[Term] = (),
        origin: str = "",
    ) -> tuple[Path, Log]:
        """Train the model, or the PEFT adapter on it, in place, now or by recalling who did; its folder and log.

        terms: what a method adds to the loss or the gradients. origin: the identity of a method that trains in a way
        of its own beside; stages with another are not shared. The log is the one of the run that did the work, so
        that costs are those of training, shared or not. Raises CLGraftError for terms that the launch cannot carry,
        Diverged for training whose loss, gradients or weights are no finite numbers: no stage is left then.
        """
        term.check({t.kind for t in terms}, self.launch, ", ".join(t.name for t in terms))
        start = fingerprint(named_weights(model))
        kept = checkpoint.frozen(model)
        key = stage_key(start, tokenizer, rows, job, terms, origin, kept)
        target, begun = self.folder / "stages" / key, perf_counter()
        with _refusals(target), locked(target, self.patient):
            waited = perf_counter() - begun
            use(target, self)
            self._fetch(target)
            work = target.with_name(f"{key}.work")
            if not is_whole(target):
                shutil.rmtree(target, ignore_errors=True)
                work.mkdir(parents=True, exist_ok=True)
                begun = perf_counter()
                with _none_diverged(work), new_folder(target) as building:
                    if self.launch.processes:
                        given = (model, tokenizer, rows, job, self.launch, work, building)
                        launch.launched(*given, progress, terms)
                    else:
                        fit.fit(
                            model, tokenizer, rows, job, self.launch, work, None, progress, terms
                        )
                    spent = perf_counter() - begun
                    if self.launch.processes:
                        checkpoint.load_into(model, building)
                    _require_finite(model, job)
                    if not self.launch.processes:
                        checkpoint.save(model, tokenizer, building)
                    about = {"terms": [t.about for t in terms], "origin": origin, "frozen": kept}
                    self._mark(building, work, model, len(rows), job, about)
                _discard(work)
                if self.mirror:
                    self.mirror.push(target, self._name(target))
                return target, self.log(target, waited + spent)
            _discard(work)  # of one that was killed before it could
        checkpoint.load_into(model, target)
        return target, self.log(target, waited)

    def _mark(
        self,
        building: Path,
        work: Path,
        model: nn.Module,
        rows: int,
        job: StageConfig,
        about: dict[str, Any],
    ) -> None:
        """Put the log beside the checkpoint, and last the marker that says what made them."""
        shutil.copy(work / fit.LOG, building / fit.LOG)
        if (work / term.FOLLOWED).is_file():
            shutil.copy(work / term.FOLLOWED, building / term.FOLLOWED)
        flush(building)
        about |= {
            "config": asdict(job),
            "rows": rows,
            "lines": len(list(read_jsonl(building / fit.LOG))),
            "tokens": read_json(work / fit.TOKENS),
            "weights": fingerprint(named_weights(model)),
            "launch": self.launch.model_dump(mode="json"),
            "made_by": {"code": training_code(), **versions()},
        }
        write_json(building / MARKER, about)

    def log(self, folder: Path, spent: float = 0.0) -> Log:
        """The log of a finished stage, on which this run has spent so many seconds."""
        lines = list(read_jsonl(folder / fit.LOG))
        about = read_json(folder / MARKER)
        return Log(lines[-1]["seconds"] if lines else 0.0, spent, round(about["tokens"]), lines)

    def pairs(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        task: Task,
        half: Preference,
        seed: int,
        allow_code: bool,
    ) -> preferences.Sampled:
        """The model's own preference pairs for the task, sampled now or recalled."""
        start = fingerprint(named_weights(model))
        file = self.pairs_file(start, tokenizer, task, half, seed)

        def make() -> tuple[dict[str, Any], list[dict[str, Any]]]:
            made = preferences.sampled(model, tokenizer, task, half, seed, allow_code)
            return {"cut_off": made.cut_off}, [asdict(pair) for pair in made.pairs]

        first, lines = self.recalled(file, make)
        return preferences.Sampled([Pair(**line) for line in lines], first["cut_off"])

    def recalled(self, file: Path, make: Lines) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """What a file of the cache holds, its first line and the others; made and kept now where it is not there."""
        with locked(file, self.patient):
            self._fetch(file)
            if (known := read_lines(file)) is not None:
                return known[0], list(known[1])
            first, lines = make()
            write_lines(file, first, lines)
            if self.mirror:
                self.mirror.push(file, self._name(file))
            return first, lines

    def _fetch(self, path: Path) -> None:
        """What another machine has made of it, or the rest of that; a folder without its marker is none."""
        if self.mirror and not (path.is_file() or is_whole(path)):
            self.mirror.pull(self._name(path), path)
            if path.is_dir() and not (path / MARKER).is_file():
                shutil.rmtree(path)

    def _name(self, path: Path) -> str:
        return f"cache/{path.relative_to(self.folder).as_posix()}"

    def pairs_file(
        self,
        start: str,
        tokenizer: PreTrainedTokenizerBase,
        task: Task,
        half: Preference,
        seed: int,
    ) -> Path:
        """The file of the pairs that a model of this fingerprint samples."""
        scored = described(task.scorings[0])
        lengths = [task.max_new_tokens, task.training.max_length]
        asked = [asdict(half), scored, lengths, [asdict(e) for e in task.train]]
        code = code_digest(preferences, *generate.CODE, base, own_pairs, text)
        key = digest(start, vocabulary(tokenizer), asked, seed, place(), code, versions())
        return self.folder / "pairs" / f"{key}.jsonl"


@contextmanager
def _none_diverged(work: Path) -> Iterator[None]:
    """Training that diverged leaves no step checkpoint: what goes on from one would diverge again."""
    try:
        yield
    except Diverged:
        _discard(work)
        raise


def _require_finite(model: nn.Module, job: StageConfig) -> None:
    """Raises Diverged for weights that the last step made: the loss has not seen them."""
    for name, weight in named_weights(model):
        if not torch.isfinite(weight).all():
            raise Diverged(
                f"it diverged in step {job.steps} of {job.steps} ({name} holds NaN or Inf) at a learning rate of "
                f"{job.learning_rate:g}, so the stage is not kept; lower the learning rate."
            )


def _discard(work: Path) -> None:
    """Remove step checkpoints, out of sight at once: what is half removed must not be gone on from."""
    gone = work.with_name(f".{work.name}.gone.tmp")
    shutil.rmtree(gone, ignore_errors=True)  # of one that was killed in here
    if work.is_dir():
        os.replace(work, gone)
        shutil.rmtree(gone, ignore_errors=True)


def is_whole(folder: Path) -> bool:
    """Whether a finished stage is there to its last line; its marker says how many the log has."""
    try:
        lines = list(read_jsonl(folder / fit.LOG))
        return (folder / MARKER).is_file() and read_json(folder / MARKER)["lines"] == len(lines)
    except RecordError:
        return False


def stage_key(
    start: str,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    job: StageConfig,
    terms: Sequence[Term] = (),
    origin: str = "",
    frozen: Sequence[str] = (),
) -> str:
    """Digest of start weights, vocabulary, rows, recipe with its seed, kind of device, code and library versions.

    And of the terms, in their order, with which of them share a state, of the origin, and of the parameters that are
    frozen, where there are any.

    How many processes share the work is no part of it: the batch is the same, and so, but for the order of sums,
    is the result.
    """
    parts = (start, vocabulary(tokenizer), list(rows), asdict(job), place())
    told = [(t.digest, term.holder(terms, t)) for t in terms]
    added = [{"terms": told, "origin": origin}] if terms or origin else []
    added += [{"frozen": [*frozen]}] if frozen else []
    return digest(*parts, *added, training_code(), versions())


def training_code() -> str:
    """Digest of the code that a stage's outcome depends on."""
    return code_digest(fit, flat, trainer, loss, acting, term, tokens, config, adapters, text)


@contextmanager
def _refusals(path: Path) -> Iterator[None]:
    """What a full disk, or one that cannot be written, says; it comes from several libraries in as many ways."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError, CheckpointError) as error:
        beneath = error.__cause__ if isinstance(error.__cause__, OSError) else error
        if isinstance(beneath, OSError) and beneath.errno not in DISKS:
            raise beneath from None
        reason = getattr(beneath, "strerror", None) or str(beneath)
    except RuntimeError as error:  # torch.save on a full disk
        if not re.search("PytorchStreamWriter|iostream|inline_container", str(error)):
            raise
        reason = "the disk is full, or takes no such file"
    else:
        return
    raise refused(path, reason)


@contextmanager
def holding(model: nn.Module, names: Collection[str]) -> Iterator[None]:
    """Parameters of these names are frozen meanwhile; those of a model that PEFT wraps have others, and are already."""
    named = model.named_parameters()
    held = [p for name, p in named if name in names and p.requires_grad]
    for parameter in held:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in held:
            parameter.requires_grad_(True)


@contextmanager
def in_full_precision(model: nn.Module) -> Iterator[None]:
    """Trainable parameters in float32 while they are trained: steps of 1e-6 are lost in bfloat16, and would be when
    they are back in it, were they not rounded stochastically, seeded by their names."""
    narrow = [
        (name, p, p.dtype)
        for name, p in model.named_parameters()
        if p.requires_grad and p.dtype in rounding.NARROW
    ]
    for _, parameter, _ in narrow:
        parameter.data = parameter.data.float()
    try:
        yield
    finally:
        held = offloaded(model)
        for name, parameter, dtype in narrow:
            seed = rounding.seed_of([], name)
            if name in held:
                held.put(name, partial(_rounded, held.reader(name), dtype, seed))
                parameter.data = parameter.data.to(dtype)
            else:
                parameter.data = rounding.summed(parameter.data, dtype, seed)


def _rounded(read: Callable[[], torch.Tensor], dtype: torch.dtype, seed: int) -> torch.Tensor:
    return rounding.summed(read().float(), dtype, seed)
