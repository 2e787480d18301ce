"""SFT stages of SmolLM2 beside plain TRL on the same rows in the same order: examples a second, losses, peak memory."""

from __future__ import annotations

import gc
import json
import multiprocessing
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cl_graft import plugins
from cl_graft.bench.clock import Clock
from cl_graft.config import Launch
from cl_graft.models.load import load
from cl_graft.store.digests import peak_memory_mb
from cl_graft.training.config import Row, StageConfig, order, sft_job
from cl_graft.training.fit import LOG, fit, quiet
from cl_graft.training.tokens import lengths, tokens

MODEL, BATCH, STEPS = "smollm2-135m", 8, 3  # the first step warms up
DATA = {
    "classification": ("text_classification", {"tasks": "agnews", "max_length": 256}),
    "math": ("math_then_code", {"math": "gsm8k", "max_length": 512}),
}
RUNS = ("stage", "trl", "trl_without_checkpointing")


@dataclass(frozen=True)
class Work:
    """Which rows are trained on, and how often each run takes its turn."""

    name: str
    data_dir: Path | None
    turns: int


def bench_beside_trl(
    data_dir: Path | None, turns: int = 2, say: Callable[[str], None] = lambda what: None
) -> dict[str, Any]:
    """{`<data>_speedup`: examples a second over TRL's, in float32 on one thread, and what it was made of}.

    By the processor's time, which other processes change little, or by the clock on a GPU; medians over runs in turn.
    TRL as SFTTrainer comes but for float32, rows that are tokens already, and their order; it computes activations
    again for the gradient by default, so that it is measured without, too. peak_over_trl: of resident memory.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = {name: _compare(Work(name, data_dir, turns), say) for name in DATA}
    finally:
        torch.set_num_threads(before)
    speedups = {f"{name}_speedup": told["speedup"] for name, told in found.items()}
    return {**speedups, "beside_trl": found}


def _compare(work: Work, say: Callable[[str], None]) -> dict[str, Any]:
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in RUNS}
    for turn in range(work.turns):
        for name in RUNS if turn % 2 else reversed(RUNS):
            say(f"{work.name}, {turn + 1} of {work.turns}: {name}")
            runs[name].append(_run(name, work))
    on_gpu = torch.cuda.is_available()
    seconds = {
        name: [statistics.median(run["step"][clock] for run in done) for clock in (0, 1)]
        for name, done in runs.items()
    }
    peaks = {name: _peak_of(name, work) for name in RUNS}
    stage, clock = seconds["stage"], 0 if on_gpu else 1
    losses = {name: done[0]["losses"] for name, done in runs.items()}
    return {
        "speedup": seconds["trl"][clock] / stage[clock],
        "speedup_wall": seconds["trl"][0] / stage[0],
        "speedup_without_checkpointing": seconds["trl_without_checkpointing"][clock] / stage[clock],
        "peak_over_trl": peaks["stage"] / peaks["trl"],
        "peak_over_trl_without_checkpointing": peaks["stage"] / peaks["trl_without_checkpointing"],
        "largest_difference_of_losses": max(
            abs(a - b) for a, b in zip(losses["stage"], losses["trl"], strict=True)
        ),
        "losses": losses,
        "step_s": {name: found[clock] for name, found in seconds.items()},
        "peak_mb": peaks,
        **runs["stage"][0]["rows"],
    }


def _run(name: str, work: Work) -> dict[str, Any]:
    """Seconds of a step, by the wall's clock and the processor's, and the losses of a run on the model as it is."""
    model, tokenizer = load(MODEL)
    model.float()
    rows, job = _rows(work)
    examples = tokens(tokenizer, rows, job)
    indices = order(len(examples), job)
    gc.collect()
    clock = Clock()
    with tempfile.TemporaryDirectory(prefix="cl-graft-bench-") as folder:
        if name == "stage":
            fit(model, tokenizer, rows, job, Launch(), Path(folder), None, clock.tick)
            lines = (Path(folder) / LOG).read_text().splitlines()
            losses = [json.loads(line)["loss"] for line in lines]
        else:
            some = [examples[i] for i in indices]
            checkpointing = name == "trl"
            losses = _trl(model, tokenizer, some, job, checkpointing, Path(folder), clock)
    sizes = lengths([examples[i] for i in indices])
    batches = [sizes[i : i + BATCH] for i in range(0, len(sizes), BATCH)]
    about = {
        "tokens": sum(sizes) / len(batches),
        "padded": sum(BATCH * max(batch) for batch in batches) / len(batches),
    }
    return {"step": clock.found()["step"], "losses": losses, "rows": about}


def _rows(work: Work) -> tuple[list[Row], StageConfig]:
    scenario, options = DATA[work.name]
    task = plugins.load("scenario", scenario)(seed=0, data_dir=work.data_dir, **options).tasks[0]
    recipe = replace(
        task.training, steps=STEPS, batch=BATCH, learning_rate=2e-5, warmup=0.0, epochs=None
    )
    return sft_job(replace(task, training=recipe), 0)


def _trl(
    model: Any,
    tokenizer: Any,
    examples: list[dict[str, Any]],
    job: StageConfig,
    checkpointing: bool,
    folder: Path,
    clock: Clock,
) -> list[float]:
    """Train by TRL's SFTTrainer, completions only, on the examples in their order; its losses."""
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class InOrder(SFTTrainer):
        def _get_train_sampler(self, dataset: Any = None) -> Any:
            return SequentialSampler(self.train_dataset)

    class Tick(TrainerCallback):
        def on_step_end(self, *_: Any, **given: Any) -> None:
            clock.tick()

    rows = [
        {
            "input_ids": example["input_ids"],
            "completion_mask": [int(label != -100) for label in example["labels"]],
        }
        for example in examples
    ]
    with quiet():
        trainer = InOrder(
            model=model,
            processing_class=tokenizer,
            train_dataset=Dataset.from_list(rows),
            args=SFTConfig(
                output_dir=str(folder),
                max_steps=job.steps,
                per_device_train_batch_size=BATCH,
                learning_rate=job.learning_rate,
                lr_scheduler_type="cosine",
                completion_only_loss=True,
                max_length=None,
                bf16=False,
                use_cpu=not torch.cuda.is_available(),
                gradient_checkpointing=checkpointing,
                logging_steps=1,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
            ),
            callbacks=[Tick()],
        )
        trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def _peak_of(name: str, work: Work) -> float:
    """Peak resident memory of a process that loads the model and trains it for a few steps, MB."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_peak, (name, work))


def _peak(name: str, work: Work) -> float:
    torch.set_num_threads(1)
    _run(name, work)
    return peak_memory_mb() * 2**20 / 1e6
