"""The product's SFT stage beside a bare PyTorch loop over the same batches, and beside plain TRL: time and memory."""

from __future__ import annotations

import cProfile
import gc
import multiprocessing
import pstats
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cl_graft import plugins
from cl_graft.bench import beside_trl
from cl_graft.bench.beside_trl import DATA, bench_beside_trl
from cl_graft.bench.clock import Clock, Seconds
from cl_graft.bench.plan import Case, texts
from cl_graft.config import Launch
from cl_graft.errors import UnknownName
from cl_graft.models.embedded import toy_tokenizer
from cl_graft.models.text import encode_all
from cl_graft.task import Example, Task, Training
from cl_graft.training.config import Row, StageConfig, order, sft_job
from cl_graft.training.stages import Stages

Stage = tuple[list[Row], StageConfig]


@dataclass(frozen=True)
class Subject:
    """A model drawn at random, the text it is trained on, and how often; None for mini's own math."""

    case: Case
    steps: int
    alternations: int


MINI = Subject(Case("mini-llama", 128, 384, 3, 4, 224, batch=16, length=None), 60, 7)
WIDE = Subject(Case("llama-100m", 768, 2048, 11, 12, 32000, batch=4, length=128), 3, 3)
SUBJECTS = (MINI, WIDE)
PARTS_OF_IT = ("loop", *DATA)


# Parts of a stage, each a function whose time, with what it calls, is told; the last two are the library's set-up.
PARTS = {
    "batches": ("transformers/trainer.py", "get_batch_samples"),
    "forward and loss": ("training/trainer.py", "compute_loss"),
    "backward": ("accelerate/accelerator.py", "backward"),
    "clip": ("training/trainer.py", "_clip_grad_norm"),
    "optimizer": ("accelerate/optimizer.py", "step"),
    "log and step checkpoints": ("transformers/trainer.py", "_maybe_log_save_evaluate"),
    "tokenise": ("models/text.py", "encode_all"),
    "fingerprints": ("format/fingerprint.py", "fingerprint"),
    "save the stage": ("training/checkpoint.py", "save"),
    "make TRL's trainer": ("trl/trainer/sft_trainer.py", "__init__"),
    "collect garbage": ("~", "<built-in method gc.collect>"),
}


def bench_train(
    only: Sequence[str], data_dir: Path | None, say: Callable[[str], None] = lambda what: None
) -> dict[str, Any]:
    """`loop`: stages of random models beside a bare loop; the others SmolLM2 beside TRL (bench/beside_trl.py)."""
    for part in only:
        if part not in PARTS_OF_IT:
            raise UnknownName("part of the benchmark", part, PARTS_OF_IT)
    figures = bench_loop(say=say) if "loop" in only else {}
    return figures | bench_beside_trl([part for part in only if part in DATA], data_dir, say)


def bench_loop(
    subjects: tuple[Subject, ...] = SUBJECTS, say: Callable[[str], None] = lambda what: None
) -> dict[str, Any]:
    """{model: figures}: ratios of medians over runs in turn, on one thread, and of peaks in processes of their own.

    sft_over_loop: seconds of a step, set-up left out (first step's end to the last one's). sft_over_loop_with_setup:
    of the whole stage, from weights and text to a finished stage on disk. Both by the processor's time, which
    another process on the machine changes little; `_wall` by the clock. peak_over_loop: of resident memory, the
    interpreter and libraries included.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return {s.case.name: _compare(s, say) for s in subjects}
    finally:
        torch.set_num_threads(before)


def markdown(figures: dict[str, Any]) -> str:
    """The figures as Markdown tables with a column for each model, and for each data set beside TRL."""
    beside = beside_trl.markdown(figures) if any(name in figures for name in DATA) else ""
    figures = {s.case.name: figures[s.case.name] for s in SUBJECTS if s.case.name in figures}
    return "\n\n".join(filter(None, [_of_loop(figures) if figures else "", beside]))


def _of_loop(figures: dict[str, Any]) -> str:
    lines = [["", *figures], ["---", *("--:" for _ in figures)]]
    for key in ("sft_over_loop", "sft_over_loop_with_setup", "peak_over_loop"):
        lines.append([key, *(f"{x[key]:.2f}" for x in figures.values())])
        if key + "_wall" in next(iter(figures.values())):
            lines.append(
                [f"{key}, by the clock", *(f"{x[key + '_wall']:.2f}" for x in figures.values())]
            )
    for name, told in (("loop", "bare loop"), ("sft", "stage")):
        for part in ("step_ms", "setup_ms", "peak_mb"):
            lines.append([f"{told}, {part}", *(f"{x[name][part]:,.1f}" for x in figures.values())])
    for part in PARTS:
        lines.append(
            [f"stage, {part}, ms", *(f"{x['sft_parts_ms'][part]:,.0f}" for x in figures.values())]
        )
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _compare(subject: Subject, say: Callable[[str], None]) -> dict[str, Any]:
    runs: dict[str, list[dict[str, Seconds]]] = {"loop": [], "sft": []}
    for name in RUNS:  # imports, caches and the allocator's first pages are nobody's
        timed(name, subject, steps=2)
    for turn in range(subject.alternations):
        say(f"{subject.case.name}: {turn + 1} of {subject.alternations}")
        for name in RUNS if turn % 2 else reversed(RUNS):
            runs[name].append(timed(name, subject))

    def median(name: str, part: str, clock: int) -> float:
        return statistics.median(run[part][clock] for run in runs[name])

    figures: dict[str, Any] = {}
    for key, part in (("sft_over_loop", "step"), ("sft_over_loop_with_setup", "whole")):
        for suffix, clock in (("", 1), ("_wall", 0)):
            figures[key + suffix] = median("sft", part, clock) / median("loop", part, clock)
    peaks = {name: peak_mb(name, subject) for name in RUNS}
    figures["peak_over_loop"] = peaks["sft"] / peaks["loop"]
    steps = subject.steps
    for name in RUNS:
        step, whole = median(name, "step", 1), median(name, "whole", 1)
        split = {"step_ms": 1e3 * step, "setup_ms": 1e3 * (whole - steps * step)}
        figures[name] = {**split, "peak_mb": peaks[name]}
    figures["sft_parts_ms"] = parts(subject)
    figures["conditions"] = {
        "steps": steps,
        "batch": subject.case.batch,
        "alternations": subject.alternations,
        "threads": 1,
    }
    return figures


def timed(name: str, subject: Subject, steps: int | None = None) -> dict[str, Seconds]:
    """Seconds of one run on a fresh model."""
    model, tokenizer, (rows, job) = made(subject)
    if steps:
        job = replace(job, steps=steps)
    gc.collect()
    clock = Clock()
    RUNS[name](model, tokenizer, rows, job, clock)
    return clock.found()


def parts(subject: Subject) -> dict[str, float]:
    """Processor milliseconds of one stage by where they go; the profiler's own are in them."""
    model, tokenizer, (rows, job) = made(subject)
    profile = cProfile.Profile(time.process_time)
    profile.runcall(sft, model, tokenizer, rows, job, Clock())
    times = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    return {
        part: sum(
            1e3 * row[3]
            for (path, _, name), row in times.items()
            if path.endswith(file) and name == function
        )
        for part, (file, function) in PARTS.items()
    }


def made(subject: Subject) -> tuple[Any, Any, Stage]:
    """A model drawn at random, its tokenizer, and rows with a recipe."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(subject.case.config, dtype=torch.float32)
    if subject.case.length is None:
        task = plugins.load("scenario", "mini")(seed=0, data_dir=None, tasks="math").tasks[0]
        recipe = replace(task.training, steps=subject.steps, batch=subject.case.batch)
        return model, toy_tokenizer(), sft_job(replace(task, training=recipe), 0)
    examples = [Example(*pair) for pair in texts(subject.case, 64)]
    recipe = Training(steps=subject.steps, batch=subject.case.batch)
    return model, toy_tokenizer(), sft_job(Task("", examples, (), "exact", training=recipe), 0)


def loop(model: Any, tokenizer: Any, rows: list[Row], job: StageConfig, clock: Clock) -> None:
    """Pad, forward, backward, clip, AdamW, cosine."""
    from torch.nn.functional import cross_entropy
    from torch.nn.utils.rnn import pad_sequence
    from transformers import get_cosine_schedule_with_warmup

    texts = ((row["prompt"], (row["completion"],)) for row in rows)
    examples = [
        (torch.tensor(head + tail), torch.tensor([-100] * len(head) + tail))
        for head, (tail,) in encode_all(tokenizer, texts, job.max_length)
    ]
    indices = order(len(rows), job)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=job.learning_rate, weight_decay=job.weight_decay
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, round(job.warmup * job.steps), job.steps)
    model.train()
    for step in range(job.steps):
        picked = [examples[i] for i in indices[step * job.batch : (step + 1) * job.batch]]
        ids = pad_sequence([x for x, _ in picked], True, tokenizer.pad_token_id)
        labels = pad_sequence([y for _, y in picked], True, -100)
        mask = pad_sequence([torch.ones_like(x) for x, _ in picked], True, 0)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        clock.tick()


def sft(model: Any, tokenizer: Any, rows: list[Row], job: StageConfig, clock: Clock) -> None:
    """The stage as a strategy asks for it."""
    with tempfile.TemporaryDirectory(prefix="cl-graft-bench-") as folder:
        Stages(Path(folder), Launch()).run(model, tokenizer, rows, job, clock.tick)


RUNS: dict[str, Callable[..., None]] = {"loop": loop, "sft": sft}


def peak_mb(name: str, subject: Subject) -> float:
    """Peak resident memory of a process that makes the model and trains it for a few steps, MB."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_peak, (name, subject))


def _peak(name: str, subject: Subject) -> float:
    from trl import SFTTrainer  # noqa: F401  so that both hold the same libraries

    from cl_graft.store.digests import peak_memory_mb

    torch.set_num_threads(1)
    timed(name, subject, steps=min(5, subject.steps))
    return peak_memory_mb() * 2**20 / 1e6
