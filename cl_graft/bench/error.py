"""Held-out output error at equal bytes: the engine against the textbook, on deltas that training made."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cl_graft import plugins
from cl_graft.bench import textbook
from cl_graft.bench.layer import BUDGET, inputs_of, relative, within_budget
from cl_graft.models.load import load
from cl_graft.models.text import encode
from cl_graft.skillpack.compress.calibrate import linear_layers, moments
from cl_graft.skillpack.compress.text import padded
from cl_graft.task import Example, Task
from cl_graft.training.config import sft_job
from cl_graft.training.stages import Stages

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CALIBRATION, HELD_OUT = 512, 256  # examples


def bench_error(
    model_name: str, task: Task, seed: int, cache: Path, data_dir: Path | None = None
) -> dict[str, Any]:
    """Mean over the decoder's matrices of the relative output error on examples that were not used, of both.

    Inputs are those of the tuned model; calibration on the task's training examples, error on its test examples.
    `error_ratio` is at the same bytes in all for both; `error_ratio_same_bytes_each` gives ours no more than the
    textbook's bytes in any one matrix.
    """
    torch.manual_seed(seed)
    model, tokenizer = load(model_name, data_dir)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    Stages(cache).run(model, tokenizer, *sft_job(task, seed))
    tuned = dict(model.named_parameters())
    names = [n for n in linear_layers(model) if model.get_submodule(n) is not _head(model)]
    deltas = {n: (tuned[f"{n}.weight"] - start[f"{n}.weight"]).detach() for n in names}
    rows = Random(seed).sample(list(task.train), min(CALIBRATION, len(task.train)))
    measured = moments(model, _batches(tokenizer, rows, task), gradients=False)
    inputs = _held_out(model, _batches(tokenizer, list(task.test)[:HELD_OUT], task), names)

    plain = {n: _textbook(d, measured.hessian(f"{n}.weight")) for n, d in deltas.items()}
    whole = within_budget(deltas, measured)
    each = {n: within_budget({n: d}, measured)[n] for n, d in deltas.items()}
    errors = {
        kind: [relative(inputs[n], d, approximation[n]) for n, d in deltas.items()]
        for kind, approximation in (("textbook", plain), ("ours", whole), ("each", each))
    }
    mean = {kind: sum(e) / len(e) for kind, e in errors.items()}
    return {
        "delta": f"{model_name}, {task.name}",
        "matrices": len(deltas),
        "textbook_error": mean["textbook"],
        "error": mean["ours"],
        "error_ratio": mean["ours"] / mean["textbook"],
        "error_ratio_same_bytes_each": mean["each"] / mean["textbook"],
        "worst_matrix_ratio": max(
            a / b for a, b in zip(errors["ours"], errors["textbook"], strict=True)
        ),
    }


def _head(model: PreTrainedModel) -> Any:
    return model.get_output_embeddings()


def _textbook(delta: Tensor, hessian: Tensor | None) -> Tensor:
    assert hessian is not None
    rows, cols = delta.shape
    counts = textbook.ranks_within((rows, cols), BUDGET * 2 * delta.numel())
    return textbook.compress(delta, hessian, counts)


def _batches(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Example], task: Task, size: int = 32
) -> list[dict[str, Tensor]]:
    """input_ids and attention_mask, one example a row."""
    texts = [encode(tokenizer, e.prompt, e.completion, task.training.max_length) for e in rows]
    batches = []
    for start in range(0, len(texts), size):
        batch = padded([(h + t, len(h)) for h, t in texts[start : start + size]], 0)
        batches.append({key: batch[key] for key in ("input_ids", "attention_mask")})
    return batches


def _held_out(
    model: PreTrainedModel, batches: list[dict[str, Tensor]], names: list[str]
) -> dict[str, Tensor]:
    parts = []
    for batch in batches:
        keep = batch["attention_mask"].flatten().bool()
        inputs = inputs_of(model.eval(), batch, names)
        parts.append({n: x[keep] for n, x in inputs.items()})
    return {n: torch.cat([part[n] for part in parts]) for n in names}


def tasks(data_dir: Path | None, seed: int = 0) -> list[tuple[str, Task]]:
    """(model, task): mini's math and code, and a real text classification where its data are at hand."""
    mini = plugins.load("scenario", "mini")(seed=seed)
    chosen = [("mini-llama", task) for task in mini.tasks[:2]]
    if data_dir is not None:
        real = plugins.load("scenario", "text_classification")(seed=seed, data_dir=data_dir)
        chosen.append(("text-llama", real.tasks[0]))
    return chosen
