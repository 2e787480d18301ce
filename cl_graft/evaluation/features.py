"""Features of prompts: the base model's last hidden state, averaged over the prompt's tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cl_graft.evaluation.generate import BATCH
from cl_graft.models.spread import device_of
from cl_graft.models.text import encode_prompts
from cl_graft.skillpack.compress.text import padded


class Features:
    """Features of prompts under a base model; a prompt is read once, however often it is asked about.

    Whoever asks sees to it that the model is the base: no pack is active.
    """

    def __init__(self, model: Any, tokenizer: Any):
        self.model, self.tokenizer = model, tokenizer
        self._known: dict[str, Tensor] = {}

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """float32 (prompts, width), on the CPU."""
        missing = sorted({p for p in prompts if p not in self._known}, key=lambda p: (len(p), p))
        for first in range(0, len(missing), BATCH):
            some = missing[first : first + BATCH]
            self._known.update(zip(some, self._read(some), strict=True))
        return torch.stack([self._known[prompt] for prompt in prompts])

    @torch.no_grad()
    def _read(self, prompts: list[str]) -> Tensor:
        self.model.eval()
        rows = encode_prompts(self.tokenizer, prompts)
        # on the right, where causal attention never looks
        batch = padded([(row, len(row)) for row in rows], self.tokenizer.pad_token_id)
        ids, mask = (batch[k].to(device_of(self.model)) for k in ("input_ids", "attention_mask"))
        output = self.model(
            input_ids=ids, attention_mask=mask, output_hidden_states=True, logits_to_keep=1
        )
        weights = mask[..., None].float()
        summed = (output.hidden_states[-1].float() * weights).sum(1)
        return (summed / weights.sum(1).clamp_min(1)).cpu()
