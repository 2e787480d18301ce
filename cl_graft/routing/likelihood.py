"""How much likelier a prompt is under each task's pack than under the base: a forward pass a pack, and the base's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from cl_graft.routing.base import PackRouter, State, View, require_seen
from cl_graft.skillpack.format.file import SkillPack


class likelihood(PackRouter):
    """The log-likelihood of a prompt's tokens under a pack, less that under the base, in nats a token.

    Packs are tuned to answers, not to prompts: what they do to the likelihood of prompts is a side effect.
    """

    temperature = 0.05

    def judge(self, state: State, prompts: Sequence[str], view: View) -> Tensor:
        require_seen(self, view.packs)
        base = _of_tokens(view, (), prompts)
        gains = [_of_tokens(view, packs, prompts) - base for packs in view.packs]
        view.grafted.unload()
        return torch.stack(gains, 1)

    def passes(self, tasks: int) -> int:
        return tasks + 1


@torch.no_grad()
def _of_tokens(view: View, packs: Sequence[SkillPack], prompts: Sequence[str]) -> Tensor:
    """Mean log-probability of each prompt's tokens but the first, float32 (prompts,); 0 where there is but one."""
    view.grafted.activate(packs)
    found = torch.zeros(len(prompts))
    for chunk, ids, mask in view.batches(prompts):
        logits = view.grafted.model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
        lost = cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none") * mask[:, 1:]
        found[chunk] = -(lost.sum(1) / mask[:, 1:].sum(1).clamp_min(1)).cpu()
    return found
