"""How much a model is surprised by texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from cl_graft.models.spread import device_of
from cl_graft.strategy.memory import some, tokens
from cl_graft.training.config import Row

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@torch.no_grad()
def surprise(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    max_length: int,
    size: int = 8,
) -> list[float]:
    """The mean negative log-likelihood of a token of each row, prompt included and its first token left out, in nats.

    Of a pair the chosen answer. Dropout is off; `size` rows are computed at a time. A model without weights, as
    `cl-graft plan` has, is surprised by nothing.
    """
    if device_of(model).type == "meta":
        return [0.0] * len(rows)
    texts = [
        {"prompt": r["prompt"], "completion": r.get("completion", r.get("chosen", ""))}
        for r in rows
    ]
    everything, training = tokens(tokenizer, texts, max_length), model.training
    model.eval()
    found: list[float] = []
    for start in range(0, len(rows), size):
        batch = some(everything, range(start, min(start + size, len(rows))))
        batch = {name: x.to(device_of(model)) for name, x in batch.items()}
        ids, mask = batch["input_ids"], batch["attention_mask"]
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        losses = functional.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
        ).view_as(ids[:, 1:])
        read = mask[:, 1:]
        found += ((losses * read).sum(1) / read.sum(1).clamp(min=1)).tolist()
    model.train(training)
    return found
