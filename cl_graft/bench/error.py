"""Held-out output error at equal bytes: the engine against the textbook, on deltas that training made."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import plugins
from ..models.load import load
from ..models.text import encode
from ..skillpack.calibrate import Moments, linear_layers, moments
from ..skillpack.codecs import decode, payload_bytes
from ..skillpack.compress import Piece, Room, compress, fetch
from ..skillpack.policy import Adaptive
from ..skillpack.shelf import Item
from ..task import Example, Task
from ..training.shared import train_or_recall
from ..training.stage import sft
from . import textbook
from .layer import inputs_of, relative

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BUDGET = 0.10  # of the matrices in bf16
CALIBRATION, HELD_OUT = 512, 256  # examples

Deltas = dict[str, Tensor]


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
    train_or_recall(
        cache, model, task, seed, lambda: sft(model, tokenizer, task.train, task.training, seed)
    )
    tuned = dict(model.named_parameters())
    names = [n for n in linear_layers(model) if model.get_submodule(n) is not _head(model)]
    deltas = {n: (tuned[f"{n}.weight"] - start[f"{n}.weight"]).detach() for n in names}
    rows = Random(seed).sample(list(task.train), min(CALIBRATION, len(task.train)))
    found = moments(model, _batches(tokenizer, rows, task), gradients=False)
    inputs = _held_out(model, _batches(tokenizer, list(task.test)[:HELD_OUT], task), names)

    plain = {n: _textbook(d, found.hessian(f"{n}.weight")) for n, d in deltas.items()}
    whole = _ours(deltas, found)
    each = {n: _ours({n: d}, found)[n] for n, d in deltas.items()}
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


def _ours(deltas: Deltas, found: Moments) -> Deltas:
    limit = int(sum(BUDGET * 2 * d.numel() for d in deltas.values()))
    room = Room(lambda specs: sum(payload_bytes(*s) for s in specs.values()), limit, "10%")
    shelf: dict[str, Item] = {}
    pieces = [
        Piece(f"{n}.weight", tuple(d.shape), "other", partial(d.clone)) for n, d in deltas.items()
    ]
    compress(pieces, found, Adaptive(), room, shelf)
    return {n: decode(fetch(shelf, f"{n}.weight")) for n in deltas}


def _batches(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Example], task: Task, size: int = 32
) -> list[dict[str, Tensor]]:
    """One example a row, padded on the right."""
    batches = []
    for start in range(0, len(rows), size):
        texts: list[list[int]] = []
        for e in rows[start : start + size]:
            head, tail = encode(tokenizer, e.prompt, e.completion, task.training.max_length)
            texts.append([*head, *tail])
        ids = torch.zeros(len(texts), max(map(len, texts)), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, text in enumerate(texts):
            ids[row, : len(text)], mask[row, : len(text)] = torch.tensor(text), 1
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches


def _held_out(
    model: PreTrainedModel, batches: list[dict[str, Tensor]], names: list[str]
) -> dict[str, Tensor]:
    parts = []
    for batch in batches:
        keep = batch["attention_mask"].flatten().bool()
        found = inputs_of(model.eval(), batch, names)
        parts.append({n: x[keep] for n, x in found.items()})
    return {n: torch.cat([part[n] for part in parts]) for n in names}


def tasks(data_dir: Path | None, seed: int = 0) -> list[tuple[str, Task]]:
    """(model, task): mini's math and code, and a real text classification where its data are at hand."""
    mini = plugins.load("scenario", "mini")(seed=seed)
    found = [("mini-llama", task) for task in mini.tasks[:2]]
    if data_dir is not None:
        real = plugins.load("scenario", "text_classification")(seed=seed, data_dir=data_dir)
        found.append(("text-llama", real.tasks[0]))
    return found
