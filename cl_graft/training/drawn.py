"""Answers that a method has a model draw to train on them later: drawn once, kept in the cache beside the stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from cl_graft.evaluation import generate
from cl_graft.evaluation.generate import Answer
from cl_graft.models import text
from cl_graft.models.spread import device_of, named_weights
from cl_graft.skillpack.format.file import fingerprint
from cl_graft.store.digests import code_digest, digest, place, versions, vocabulary
from cl_graft.training.stages import Stages

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def drawn(
    stages: Stages,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_new_tokens: int,
    seed: int,
    top_k: int = 0,
) -> list[Answer]:
    """Answers at temperature 1, their special tokens in the text, drawn now or recalled: a cell that goes on finds the
    same ones. None at all while `cl-graft plan` stands in for training, unless they are known.

    top_k: as of `answers` in evaluation/generate.py.
    """
    if device_of(model).type == "meta":  # of a plan
        return []
    asked = [list(prompts), max_new_tokens, seed, top_k]
    start, code = fingerprint(named_weights(model)), code_digest(generate, text)
    key = digest(start, vocabulary(tokenizer), asked, place(), code, versions())

    def make() -> tuple[dict, list[dict]]:
        said = generate.answers(
            model, tokenizer, prompts, max_new_tokens, 1.0, seed, top_k=top_k, special=True
        )
        return {"prompts": len(prompts)}, [asdict(answer) for answer in said]

    _, lines = stages.recalled(stages.folder / "answers" / f"{key}.jsonl", make)
    return [Answer(**line) for line in lines]
