"""SFT stages of SmolLM2 beside plain TRL on the same rows in the same order: examples a second, losses, peak memory."""

from __future__ import annotations

import multiprocessing
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from cl_graft import plugins
from cl_graft.bench.clock import Clock
from cl_graft.config import Launch
from cl_graft.models.load import load
from cl_graft.store.digests import peak_memory_mb
from cl_graft.store.files import read_jsonl
from cl_graft.training.config import Row, StageConfig, order, sft_job
from cl_graft.training.fit import LOG, fit, quiet
from cl_graft.training.tokens import lengths, tokens

MODEL, BATCH, STEPS = "smollm2-135m", 8, 2  # the first step warms up
TURNS = 2
DATA = {
    "classification": ("text_classification", {"tasks": "agnews", "max_length": 256}),
    "math": ("math_then_code", {"math": "gsm8k", "max_length": 512}),
}
RUNS = ("stage", "trl", "trl_without_checkpointing")


def bench_beside_trl(
    only: Sequence[str], data_dir: Path | None, say: Callable[[str], None] = lambda what: None
) -> dict[str, Any]:
    """{`<data>_speedup`: examples a second over TRL's, in float32 on one thread}, and below the data's name the rest.

    By the processor's time, which other processes change little, or by the clock on a GPU; medians over runs in turn,
    each in a process of its own, whose peak of resident memory is told, too. TRL as SFTTrainer comes, but for float32,
    rows that are tokens already, and their order. It computes activations again for the gradient by default, to need
    less memory, so that it is measured without that, too.
    """
    found = {name: _compare(name, data_dir, say) for name in only}
    return {f"{name}_speedup": told["speedup"] for name, told in found.items()} | found


def markdown(figures: dict[str, Any]) -> str:
    """The figures as a Markdown table with a column for each data set."""
    told = {name: figures[name] for name in DATA if name in figures}
    lines = [["", *told], ["---", *("--:" for _ in told)]]
    for key, value in next(iter(told.values())).items():
        if isinstance(value, float):
            lines.append([key, *(f"{x[key]:.3g}" for x in told.values())])
    for part in ("step_s", "peak_mb"):
        for run in RUNS:
            lines.append([f"{run}, {part}", *(f"{x[part][run]:,.1f}" for x in told.values())])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _compare(name: str, data_dir: Path | None, say: Callable[[str], None]) -> dict[str, Any]:
    done: dict[str, list[dict[str, Any]]] = {run: [] for run in RUNS}
    for turn in range(TURNS):
        for run in reversed(RUNS) if turn % 2 else RUNS:
            say(f"{name}, turn {turn + 1} of {TURNS}: {run}")
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                done[run].append(pool.apply(_run, (run, name, data_dir)))
    clock = 0 if torch.cuda.is_available() else 1

    def ratio(run: str, of: Callable[[dict[str, Any]], float]) -> float:
        ours, theirs = (statistics.median(map(of, done[x])) for x in ("stage", run))
        return theirs / ours

    losses = {run: told[0]["losses"] for run, told in done.items()}
    pairs = zip(losses["stage"], losses["trl"], strict=True)
    first = done["stage"][0]
    return {
        "speedup": ratio("trl", lambda x: x["step"][clock]),
        "speedup_wall": ratio("trl", lambda x: x["step"][0]),
        "speedup_without_checkpointing": ratio(RUNS[2], lambda x: x["step"][clock]),
        "peak_over_trl": 1 / ratio("trl", lambda x: x["peak_mb"]),
        "peak_over_trl_without_checkpointing": 1 / ratio(RUNS[2], lambda x: x["peak_mb"]),
        "largest_difference_of_losses": max(abs(a - b) for a, b in pairs),
        "tokens": first["tokens"],
        "tokens_padded": first["padded"],
        "losses": losses,
        "step_s": {n: statistics.median(x["step"][clock] for x in t) for n, t in done.items()},
        "peak_mb": {n: statistics.median(x["peak_mb"] for x in t) for n, t in done.items()},
    }


def _run(run: str, name: str, data_dir: Path | None) -> dict[str, Any]:
    """Seconds of a step by the wall's clock and the processor's, losses, and peak memory, MB, of a run here."""
    torch.set_num_threads(1)
    model, tokenizer = load(MODEL)
    model.float()
    rows, job = _rows(name, data_dir)
    examples = tokens(tokenizer, rows, job)
    job = _typical(lengths(examples), job)
    some = [examples[i] for i in order(len(examples), job)]
    clock = Clock()
    with tempfile.TemporaryDirectory(prefix="cl-graft-bench-") as folder:
        if run == "stage":
            fit(model, tokenizer, rows, job, Launch(), Path(folder), None, clock.tick)
            losses = [line["loss"] for line in read_jsonl(Path(folder) / LOG)]
        else:
            losses = _trl(model, tokenizer, some, job, run == "trl", Path(folder), clock)
    read, padded = _sizes(lengths(some)[BATCH:])
    return {
        "step": clock.found()["step"],
        "losses": losses,
        "peak_mb": peak_memory_mb() * 2**20 / 1e6,
        "tokens": read,
        "padded": padded,
    }


def _sizes(lengths: list[int]) -> tuple[float, float]:
    """Tokens of a batch on average, without padding and with it."""
    batches = [lengths[i : i + BATCH] for i in range(0, len(lengths), BATCH)]
    padded = sum(BATCH * max(batch) for batch in batches)
    return sum(lengths) / len(batches), padded / len(batches)


def _typical(lengths: list[int], job: StageConfig) -> StageConfig:
    """The job by that seed of fifty whose timed batches are most like hundreds, in tokens with padding and without."""

    def sizes(job: StageConfig, first: int) -> tuple[float, float]:
        return _sizes([lengths[i] for i in order(len(lengths), job)[first * BATCH :]])

    wanted = sizes(replace(job, steps=400), 0)

    def off(seed: int) -> float:
        found = sizes(replace(job, seed=seed), 1)
        return max(abs(a / b - 1) for a, b in zip(found, wanted, strict=True))

    return replace(job, seed=min(range(50), key=off))


def _rows(name: str, data_dir: Path | None) -> tuple[list[Row], StageConfig]:
    scenario, options = DATA[name]
    task = plugins.load("scenario", scenario)(seed=0, data_dir=data_dir, **options).tasks[0]
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
    from transformers import PrinterCallback, TrainerCallback
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
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]
