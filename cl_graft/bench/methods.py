"""Held-out error of every method that compresses a delta, at equal bytes: one task, the same files."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cl_graft import plugins
from cl_graft.bench.layer import inputs_of, relative
from cl_graft.budget import Budget
from cl_graft.errors import OverBudget
from cl_graft.models.load import load
from cl_graft.models.roles import ROLES
from cl_graft.skillpack.compress.calibrate import linear_layers, stored_transposed
from cl_graft.strategy.context import batch_of
from cl_graft.stream import benchmark
from cl_graft.task import Scenario, Task
from cl_graft.training.config import sft_job
from cl_graft.training.stages import Stages

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BUDGETS = ("10%", "5%")
HELD_OUT, SIZE = 256, 32  # examples, and how many go through the model together
Method = tuple[str, Mapping[str, Any]]


def methods() -> list[Method]:
    """(strategy, options) of all that keep a function of a whole delta within a budget, and of their variants."""
    found: list[Method] = []
    for name in plugins.names("strategy"):
        kind = plugins.load("strategy", name)
        first = next(iter(inspect.signature(kind.function).parameters))
        if first == "delta" and kind.budgeted and {*kind.touches} == {*ROLES}:
            found.append((name, {}))
    found.append(("bitdelta", {"scales": "axis"}))
    if find_spec("auto_gptq") is not None:
        found += [(name, {"solver": "auto-gptq"}) for name in ("delta_come", "graftllm")]
    return sorted(found, key=lambda method: (method[0], str(method[1])))


def bench_methods(
    model_name: str,
    task: Task,
    seed: int,
    cache: Path,
    data_dir: Path | None = None,
    chosen: Sequence[Method] | None = None,
    budgets: Sequence[str] = BUDGETS,
    tell: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Measure bytes, seconds, error and loss of each method at each budget, on test examples that nobody chose by.

    error: of the output of each decoder matrix against the delta's, relative, the mean over matrices; inputs are those
    of the tuned model. loss: of the answers' tokens under the base and the pack; `tuned_loss` and `base_loss` are those
    of the whole delta and of none. budgets: shares of the base in bf16, as of `Budget`, the whole file counted; what a
    budget does not hold has `refused` instead.
    """
    torch.manual_seed(seed)
    task = task.with_validation()
    model, tokenizer = load(model_name, data_dir)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    stages = Stages(cache)
    stages.run(model, tokenizer, *sft_job(task, seed))
    rows = task.test[:HELD_OUT]
    batches = [
        batch_of(model, tokenizer, task, rows[i : i + SIZE]) for i in range(0, len(rows), SIZE)
    ]
    tuned = dict(model.named_parameters())
    head, turned = model.get_output_embeddings(), stored_transposed(model)
    names = [n for n, m in linear_layers(model).items() if m is not head]
    deltas = {n: (tuned[f"{n}.weight"] - start[f"{n}.weight"]).detach() for n in names}
    inputs, tuned_loss = _inputs(model, batches, names), _loss(model, batches)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(start[name])
    about = {"tuned_loss": tuned_loss, "base_loss": _loss(model, batches)}

    def measured(name: str, options: Mapping[str, Any], budget: str) -> dict[str, Any]:
        kind = plugins.load("strategy", name)
        strategy = kind(
            model=model,
            tokenizer=tokenizer,
            scenario=Scenario("bench", (task,)),
            budget=Budget(budget, sum(p.numel() for p in model.parameters())),
            seed=seed,
            options=plugins.check_options("strategy", name, kind, options),
            stages=stages,
        )
        row = {"method": name, "options": dict(options), "budget": budget}
        try:
            strategy.require_possible()
            begun = perf_counter()
            strategy.train(benchmark(strategy.scenario).train_stream[0], eval_streams=[])
        except OverBudget as error:
            return row | {"refused": str(error)}
        seconds, (pack,) = perf_counter() - begun, strategy.packs
        kept = {n: pack.tensors.get(f"{n}.weight") for n in names}
        errors = []
        for n, delta in deltas.items():
            rebuilt = pack.delta(f"{n}.weight") if kept[n] else torch.zeros_like(delta)
            pair = [x.T if f"{n}.weight" in turned else x for x in (delta, rebuilt)]
            errors.append(relative(inputs[n], *pair))
        strategy.grafted.activate([pack])
        loss = _loss(model, batches)
        strategy.restore_base()
        return row | {
            "bytes": pack.nbytes,
            "of_budget": pack.nbytes / strategy.budget.bytes,
            "error": sum(errors) / len(errors),
            "worst": max(errors),
            "loss": loss,
            "seconds": seconds,
        }

    found = []
    for budget in budgets:
        for name, options in methods() if chosen is None else chosen:
            tell(f"{name} {dict(options) or ''} at {budget}")
            found.append(measured(name, options, budget))
    return {"delta": f"{model_name}, {task.name}", "matrices": len(deltas), **about, "rows": found}


def _inputs(
    model: PreTrainedModel, batches: Sequence[Mapping[str, Tensor]], names: list[str]
) -> dict[str, Tensor]:
    """What each layer reads, (tokens, in), without padding."""
    parts = []
    for batch in batches:
        keep = batch["attention_mask"].flatten().bool()
        parts.append({n: x[keep] for n, x in inputs_of(model.eval(), batch, names).items()})
    return {n: torch.cat([part[n] for part in parts]) for n in names}


@torch.no_grad()
def _loss(model: PreTrainedModel, batches: Sequence[Mapping[str, Tensor]]) -> float:
    """Mean loss of a token of the answers."""
    total, tokens = 0.0, 0
    for batch in batches:
        answers = int((batch["labels"] != -100).sum())
        total += model.eval()(**batch).loss.item() * answers
        tokens += answers
    return total / tokens
