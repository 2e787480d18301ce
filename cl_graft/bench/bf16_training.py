"""Training whose weights are kept in bfloat16: which of them ever move."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from cl_graft.bench.held_out import BATCH, HeldOut
from cl_graft.models.load import load

RATE = 2e-5


@dataclass(frozen=True)
class Kept:
    """Parameters after training. moved: whether an entry had another value after any step, bool, as they are shaped."""

    before: Mapping[str, Tensor]
    after: Mapping[str, Tensor]
    moved: Mapping[str, Tensor]


def train_in_bf16(text: HeldOut, steps: int) -> Kept:
    """Train the base of a delta, all weights, gradients and states of AdamW in bfloat16, on the text that it learned.

    Batches of BATCH rows in the order of the delta's own training, loss on the answers, a constant learning rate of
    RATE, no weight decay and no dropout. One thread's sums are the same every time.
    """
    model = load(str(text.delta.base))[0].to(torch.bfloat16).eval()
    parameters = dict(model.named_parameters())
    before = {name: p.detach().clone() for name, p in parameters.items()}
    moved = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in parameters.items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    for batch in _batches(text, steps):
        last = {name: p.detach().clone() for name, p in parameters.items()}
        model(**batch, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        for name, parameter in parameters.items():
            moved[name] |= parameter.detach() != last[name]
    return Kept(before, {name: p.detach() for name, p in parameters.items()}, moved)


def _batches(text: HeldOut, steps: int) -> Iterator[dict[str, Tensor]]:
    rows = text.delta.seen[: steps * BATCH]
    assert len(rows) == steps * BATCH
    return text.batches(rows)
