"""Preference pairs that a model can tell apart: what is alike as far as it is read teaches nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from cl_graft.errors import CLGraftError
from cl_graft.models.text import encode_all
from cl_graft.task import Pair, Scenario, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def different(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair], max_length: int
) -> list[Pair]:
    """The pairs whose answers still differ when they are cut to `max_length` tokens."""
    texts = ((p.prompt, (p.chosen, p.rejected)) for p in pairs)
    encoded = encode_all(tokenizer, texts, max_length)
    return [p for p, (_, (a, b)) in zip(pairs, encoded, strict=True) if a != b]


def without_equal_pairs(
    scenario: Scenario, tokenizer: PreTrainedTokenizerBase
) -> tuple[Scenario, list[str]]:
    """The scenario without pairs whose answers are the same, and a sentence on each task that had such.

    Raises CLGraftError for a task whose recipe has a preference half and that has pairs, of which none is left.
    """
    told: list[str] = []

    def of(task: Task) -> Task:
        if not task.training.preference or not task.pairs:
            return task
        longest = task.training.max_length
        kept = different(tokenizer, task.pairs, longest)
        equal = len(task.pairs) - len(kept)
        if not kept:
            raise CLGraftError(
                f"task {task.name!r} has {equal} preference pairs, all with the same chosen and rejected answer within "
                f"max_length={longest} tokens; give pairs that differ, a larger max_length, or train without DPO."
            )
        if equal:
            told.append(
                f"task {task.name!r}: {equal} of {len(task.pairs)} preference pairs are left out, whose answers are "
                f"the same within max_length={longest} tokens"
            )
        return replace(task, pairs=kept) if equal else task

    return replace(scenario, tasks=tuple(map(of, scenario.tasks))), told
