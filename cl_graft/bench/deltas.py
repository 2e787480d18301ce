"""Deltas that training made: of embedded models, and of SmolLM2 on SST-2; made once, then found in the cache."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import torch

from cl_graft import plugins
from cl_graft.config import Launch
from cl_graft.data import labels, records
from cl_graft.models.chat import render
from cl_graft.models.embedded import cache_root
from cl_graft.models.load import load, load_tokenizer, locate
from cl_graft.models.published import PUBLISHED
from cl_graft.skillpack.folders.checkpoint import Checkpoint, new_folder
from cl_graft.store.digests import digest, vocabulary
from cl_graft.store.files import read_json, write_json
from cl_graft.store.locks import locked
from cl_graft.task import Example, Task
from cl_graft.training import checkpoint
from cl_graft.training.config import StageConfig, order, sft_job
from cl_graft.training.fit import LOG, fit
from cl_graft.training.stages import Stages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MODEL, SST2 = "smollm2-135m", "cl_benchmark/SC/SST-2"
STEPS = (12, 300)
ROWS = 2400  # of SST-2, which 300 steps of 8 read once
CALIBRATION = 64  # rows of the training set that packs are calibrated on
MARKER = "delta.json"


@dataclass(frozen=True)
class Delta:
    """Two model folders, and text of the task: training examples, of which the first calibrate, and test examples.

    seen: the examples that it was trained on, in their order.
    """

    name: str
    base: Path
    tuned: Path
    train: Sequence[Example]
    test: Sequence[Example]
    max_length: int
    seen: Sequence[Example] = ()

    @cached_property
    def digest(self) -> str:
        """Digest of both folders' weights and of the text."""
        texts = [[e.prompt, e.completion] for e in (*self.train[:CALIBRATION], *self.test)]
        weights = [Checkpoint(folder).fingerprint() for folder in (self.base, self.tuned)]
        return digest(weights, texts, self.max_length)

    def calibration(self, file: Path) -> Path:
        """Write the rows that packs are calibrated on, as `pack create --calibration` reads them."""
        rows = ({"prompt": e.prompt, "completion": e.completion} for e in self.train[:CALIBRATION])
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return file


def embedded_deltas(data_dir: Path | None, seed: int = 0) -> Iterator[Delta]:
    """Mini's math and code on `mini-llama`, and AG News on `text-llama`; each is trained when it is asked for."""
    mini = plugins.load("scenario", "mini")(seed=seed)
    real = plugins.load("scenario", "text_classification")(seed=seed, data_dir=data_dir)
    for name, task in (*(("mini-llama", t) for t in mini.tasks[:2]), ("text-llama", real.tasks[0])):
        yield _embedded(name, task, seed, data_dir)


def _embedded(name: str, task: Task, seed: int, data_dir: Path | None) -> Delta:
    torch.manual_seed(seed)
    model, tokenizer = load(name, data_dir)
    rows, job = sft_job(task, seed)
    tuned, _ = Stages(cache_root()).run(model, tokenizer, rows, job)
    seen = [task.train[i] for i in order(len(rows), job)]
    train = Random(seed).sample(list(task.train), CALIBRATION)
    base = Path(locate(name, data_dir))
    return Delta(
        f"{name}, {task.name}", base, tuned, train, list(task.test), task.training.max_length, seen
    )


def smollm2_delta(
    steps: int,
    data_dir: Path | None,
    say: Callable[[str], None] = lambda text: None,
    model_name: str = MODEL,
    save_steps: int = 10,
) -> Delta:
    """SmolLM2-135M-Instruct after so many AdamW steps on SST-2, trained now or found in the cache.

    Batches of 8, learning rate 2e-5 falling along a cosine, float32, prompts as a user's turn, loss on the label. A
    killed run is continued by the same call, from one of its checkpoints, which lie `save_steps` apart. Raises
    NotFetched, DataError.
    """
    base = Path(locate(model_name))
    tokenizer = load_tokenizer(model_name, str(base))
    train, test = (_sst2(tokenizer, data_dir, part) for part in ("train", "test"))
    job = StageConfig("sft", steps, 8, 2e-5, 0.0, 0.0, 256, seed=0)
    rows = [{"prompt": e.prompt, "completion": e.completion} for e in train]
    start = PUBLISHED[model_name].sha256 if model_name in PUBLISHED else model_name
    key = digest(start, vocabulary(tokenizer), rows, asdict(job))
    target = cache_root() / "deltas" / f"{Path(model_name).name}-sst2-{steps}-{key[:12]}"
    work = target.with_name(f"{target.name}.work")
    with locked(target):
        if not (target / MARKER).is_file():
            shutil.rmtree(target, ignore_errors=True)
            work.mkdir(parents=True, exist_ok=True)
            model, _ = load(model_name)

            def told(done: float, at: str) -> None:
                say(f"{model_name} on SST-2: {at}")

            with new_folder(target) as building:
                fit(model, tokenizer, rows, job, Launch(save_steps=save_steps), work, None, told)
                checkpoint.save(model, tokenizer, building)
                shutil.copy(work / LOG, building / LOG)
                write_json(building / MARKER, {"job": asdict(job), "base": str(start)})
        shutil.rmtree(work, ignore_errors=True)
    seen = [train[i] for i in order(len(train), job)]
    name = f"{Path(model_name).name}, SST-2 {steps} steps"
    return Delta(name, base, target, train, test, job.max_length, seen)


def bench_deltas(
    steps: Sequence[int], data_dir: Path | None, say: Callable[[str], None] = lambda text: None
) -> list[dict[str, Any]]:
    """Make the deltas of SmolLM2 and say where they are: {delta, base, tuned, loss, seconds, size}.

    loss: the last one logged. seconds: of training. size: of the delta over the base, Frobenius.
    """
    return [_told(smollm2_delta(count, data_dir, say)) for count in steps]


def _told(delta: Delta) -> dict[str, Any]:
    lines = [json.loads(line) for line in (delta.tuned / LOG).read_text().splitlines()]
    before, after = Checkpoint(delta.base), Checkpoint(delta.tuned)
    moved = whole = 0.0
    for name in before.floating:
        x = before.read(name).float()
        moved += float((after.read(name).float() - x).norm() ** 2)
        whole += float(x.norm() ** 2)
    job = read_json(delta.tuned / MARKER)["job"]
    return {
        "delta": delta.name,
        "steps": job["steps"],
        "base": str(delta.base),
        "tuned": str(delta.tuned),
        "loss": lines[-1]["loss"],
        "seconds": lines[-1]["seconds"],
        "size": (moved / whole) ** 0.5,
    }


def _sst2(tokenizer: PreTrainedTokenizerBase, data_dir: Path | None, part: str) -> list[Example]:
    """ROWS examples of a part, in an order of a fixed seed; each a user's turn and a label."""
    options = labels(data_dir, f"{SST2}/labels.json")
    rows = list(records(data_dir, f"{SST2}/{part}.json", {"sentence": str, "label": str}))
    asked = f"What is the sentiment of this sentence, {' or '.join(options)}?\n"
    drawn = Random(0).sample(rows, min(ROWS, len(rows)))
    prompts = render(tokenizer, [asked + row["sentence"].strip() for row in drawn])
    return [Example(prompt, row["label"]) for prompt, row in zip(prompts, drawn, strict=True)]
