"""Singular vectors of the packs' own deltas as prototypes: Arrow (arXiv 2405.11157), and SpectR (arXiv 2504.03454).

Both choose for every token and layer; here a prompt is answered as one task, so their scores are averaged.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from cl_graft.routing.base import PackRouter, State, View, require_seen
from cl_graft.skillpack.compress.calibrate import linear_layers, stored_transposed

NOTHING = 1e-4  # singular values below that share of the largest are rounding


class arrow(PackRouter):
    """The mean over tokens and linear layers of how far a token's input lies along what a pack changes there."""

    temperature = 0.02

    def __init__(self, *, spectrum: Literal["top", "full", "scaled"] = "top"):
        """spectrum: top, abs(x.v) of the first right singular vector, as Arrow; full, the norm of S V^T x, as SpectR,
        over the mean norm of the tasks' deltas, so that layers weigh the same; scaled, over each delta's own norm, so
        that tasks do, too. x is brought to length 1."""
        self.spectrum = spectrum
        self._known: tuple[list[str], dict[str, list[Tensor]]] = [], {}

    @torch.no_grad()
    def judge(self, state: State, prompts: Sequence[str], view: View) -> Tensor:
        require_seen(self, view.packs)
        directions, layers = self._directions(view), linear_layers(view.grafted.model)
        found = torch.zeros(len(prompts), len(view.packs))
        for chunk, ids, mask in view.batches(prompts):
            sums = found.new_zeros(len(chunk), len(view.packs), device=ids.device)
            with ExitStack() as hooks:
                for name, rows in directions.items():
                    look = partial(_add, sums, mask, rows)
                    hooks.callback(layers[name].register_forward_pre_hook(look).remove)
                view.grafted.model(input_ids=ids, attention_mask=mask, logits_to_keep=1)
            found[chunk] = (sums / mask.sum(1, keepdim=True) / max(1, len(directions))).cpu()
        return found

    def _directions(self, view: View) -> dict[str, list[Tensor]]:
        """{linear layer: what its input is held against, float32 (directions, in) for each task}, while packs stay."""
        told = [pack.digest for packs in view.packs for pack in packs]
        if told != self._known[0]:
            turned, every = stored_transposed(view.grafted.model), {}
            for name, module in linear_layers(view.grafted.model).items():
                weight = f"{name}.weight"
                deltas = [view.delta(k, weight, module) for k in range(len(view.packs))]
                if any(delta.any() for delta in deltas):
                    every[name] = self._rows([d.T if weight in turned else d for d in deltas])
            self._known = told, every
        return self._known[1]

    def _rows(self, deltas: Sequence[Tensor]) -> list[Tensor]:
        """The first right singular vector of each delta (out, in), or S V^T over a norm."""
        parts = [torch.linalg.svd(delta, full_matrices=False)[1:] for delta in deltas]
        if self.spectrum == "top":
            return [right[:1] * bool(size[0]) for size, right in parts]
        norms = torch.stack([size.norm() for size, _ in parts])
        norms = norms.mean().expand(len(parts)) if self.spectrum == "full" else norms
        kept = [size > NOTHING * size[0] for size, _ in parts]
        rows = [size[k, None] * right[k] for (size, right), k in zip(parts, kept, strict=True)]
        return [each / (norm or 1.0) for each, norm in zip(rows, norms, strict=True)]


def _add(sums: Tensor, mask: Tensor, rows: list[Tensor], module: Any, given: Any) -> None:
    """Add to sums (prompts, tasks) the norm of each task's rows times the layer's input, over the prompt's tokens."""
    if given[0].shape[:-1] == mask.shape:  # not the head, of the last token alone, nor an expert
        x = given[0].to(rows[0].device)  # where the layer runs, of a model that is spread
        x = normalize(x.float(), dim=-1) * mask[..., None].to(x.device)
        sums += torch.stack([(x @ each.T).norm(dim=-1).sum(1) for each in rows], 1).to(sums.device)
