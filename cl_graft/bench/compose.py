"""Peak memory of learning five tasks, by strategy: what answers is composed tensor by tensor, never a whole model."""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import nn

from cl_graft import plugins
from cl_graft.budget import Budget
from cl_graft.models.load import load
from cl_graft.store.digests import forget_peak_memory, resident_bytes
from cl_graft.stream import benchmark
from cl_graft.task import Example, Scenario, Task
from cl_graft.training import checkpoint
from cl_graft.training.stages import Log, Stages

STRATEGIES = ("individual", "ties", "task_arithmetic", "tall_mask", "emr")
TASKS = 5
# factors that are else chosen on validation data, which is no question of memory
FIXED = {"ties": {"scale": 1.0}, "tall_mask": {"mask_lambda": 0.4}}
SHAPE = {  # 21 of the 30 layers of SmolLM-135M: more than a quarter of the weights are one tied table
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 21,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
NOISE = 1e-3  # size of a task's delta, at random


def bench_compose(
    strategies: Sequence[str] = STRATEGIES,
    shape: dict[str, Any] | None = None,
    say: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:
    """Peak resident memory, MB, that each strategy adds to a process with its libraries, and ties over individual.

    A randomly initialised Llama in float32 learns five tasks through `Strategy.train`, and each is answered after each
    one by `Strategy.eval` (one example, two tokens), as in a cell. Training itself is left out, for its optimizer would
    hide the rest: a stand-in adds noise to the weights and writes the stage's folder. Every strategy has a process of
    its own. peak: model, its base, packs, and all that composing takes. kept: bytes of what the strategy keeps.
    """
    runs = {}
    for name in strategies:
        say(f"{name} …")
        with (
            tempfile.TemporaryDirectory(prefix="cl-graft-bench-") as folder,
            multiprocessing.get_context("spawn").Pool(1) as pool,
        ):
            runs[name] = pool.apply(_learn, (name, Path(folder), SHAPE | (shape or {})))
    peaks = {name: run["peak_mb"] for name, run in runs.items()}
    measured = {}
    if {"ties", "individual"} <= peaks.keys():
        measured["ties_over_individual"] = peaks["ties"] / peaks["individual"]
    conditions = {"dtype": "float32", "tasks": TASKS, "training": "stand-in", "threads": 1}
    return {**measured, "peaks_mb": peaks, "runs": runs, "conditions": conditions}


class _Drawn(Stages):
    """Stages whose training adds noise to the weights, of which only the last folder is left on the disk."""

    def run(self, model: Any, tokenizer: Any, rows: Any, job: Any, *more: Any, **told: Any):
        target = self.folder / "stage"
        generator = torch.Generator().manual_seed(job.seed)
        with torch.no_grad():
            for parameter in model.parameters():
                for part in parameter.view(-1).split(1 << 20):
                    part.add_(torch.randn(part.shape, generator=generator), alpha=NOISE)
        for file in target.glob("*"):
            file.unlink()
        target.mkdir(exist_ok=True)
        checkpoint.save(model, tokenizer, target)
        return target, Log()


def _learn(name: str, folder: Path, shape: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(1)
    _, tokenizer = load("nano-llama")
    scenario = Scenario("five", tuple(_task(number) for number in range(TASKS)))
    strategy_class, stream = plugins.load("strategy", name), benchmark(scenario)
    model: Any = _model(
        8, shape | {"hidden_size": 72, "intermediate_size": 96, "num_hidden_layers": 1}
    )
    model.generate(torch.zeros(1, 2, dtype=torch.long), max_new_tokens=1)  # imports what it needs
    del model
    before, begun = resident_bytes("VmRSS"), perf_counter()
    forget_peak_memory()
    model = _model(0, shape)
    strategy = strategy_class(
        model=model,
        tokenizer=tokenizer,
        scenario=scenario,
        budget=Budget("100%", sum(p.numel() for p in model.parameters())),
        seed=0,
        options=plugins.check_options("strategy", name, strategy_class, FIXED.get(name, {})),
        stages=_Drawn(folder),
    )
    for experience in stream.train_stream:
        strategy.train(experience, eval_streams=[])
        strategy.eval(stream.test_stream)
    return {
        "peak_mb": (resident_bytes("VmHWM") - before) / 1e6,
        "kept_mb": sum(pack.nbytes for pack in strategy.alive) / 1e6,
        "parameters": sum(p.numel() for p in model.parameters()),
        "s": perf_counter() - begun,
    }


def _task(number: int) -> Task:
    rows = (Example("1+1=", "2"),)
    return Task(f"task-{number}", rows, rows, "exact", max_new_tokens=2)


def _model(seed: int, shape: dict[str, Any]) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**shape)).eval()
