"""LAMOL: the model rehearses old tasks by rows of them that it writes itself (Sun et al. 2019, arXiv 1909.03329)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cl_graft.models.text import encode_prompts
from cl_graft.ranges import Count, NotNegative, Share
from cl_graft.skillpack.codecs import Encoded
from cl_graft.skillpack.compress.text import padded
from cl_graft.strategy import Context, Strategy
from cl_graft.strategy.memory import some
from cl_graft.task import Task
from cl_graft.training.config import Row, StageConfig, sft_job
from cl_graft.training.drawn import drawn
from cl_graft.training.term import Term

ANSWER = "__ans__"  # between prompt and answer of a row that the model writes


class lamol(Strategy):
    """loss = L_QA + lambda L_LM in SFT: beside each answer the model learns the whole row, prompt, `__ans__` and
    answer, after a mark of its task, `__name__`. Before a task it writes gamma times as many rows as the task has, of
    each old task as many as of another, by top-k sampling after the mark; those with one `__ans__` that come to their
    end are trained on in both ways among the task's own, in as many steps as the recipe has without them.

    Nothing is kept but the weights. The two marks are words of the tokenizer's, where the paper adds tokens to the
    vocabulary (its task-specific ones), which a pack for the same base cannot. DPO, where a recipe has that half, is as
    it is: no pairs are written. L_LM costs a second pass over each row, with its logits.
    """

    keeps = "latest"
    terms = ("penalty",)
    budgeted = False

    def learn(
        self,
        task: Task,
        context: Context,
        *,
        gamma: Share = 0.2,
        weight: NotNegative = 0.25,
        top_k: Count = 20,
    ) -> dict[str, Encoded]:
        """gamma, weight (the paper's lambda), top_k: the paper's; it also tries a gamma of .05."""
        rows = sft_job(task, self.seed)[0]
        self.written = self._write(round(gamma * len(rows)), task, top_k)
        everything = [(task.name, row) for row in rows] + self.written
        state = whole(context.tokenizer, everything, task.training.max_length)
        mean = (state["labels"][:, 1:] != -100).sum().item() / len(everything)
        terms = [Term.penalty(penalty, state, weight=weight, mean=mean)] if weight else []
        return context.dense(self.fine_tune(task, context, terms))

    def _write(self, count: int, task: Task, top_k: int) -> list[tuple[str, Row]]:
        """Rows of the tasks so far with the names of these: of `count` that the model begins, those that are rows."""
        old = [pack.task for pack in self.packs]
        names = [name for i, name in enumerate(old) for _ in range(*_part(count, i, len(old)))]
        prompts = [_mark(name) for name in names]
        longest = task.training.max_length
        if at_most := getattr(self.model.config, "max_position_embeddings", None):
            longest = min(longest, at_most)
        room = longest - max(map(len, encode_prompts(self.tokenizer, prompts)), default=0)
        given = (self.stages, self.model, self.tokenizer, prompts, max(1, room), self._stage_seed)
        said = drawn(*given, top_k) if prompts else []
        found = []
        for name, answer in zip(names, said, strict=False):
            prompt, *completion = answer.text.split(ANSWER)
            if answer.finished and len(completion) == 1:
                found.append((name, {"prompt": prompt, "completion": completion[0]}))
        return found

    def training_rows(self, rows: Sequence[Row], job: StageConfig) -> Sequence[Row]:
        return [*rows, *(row for _, row in self.written)] if job.kind == "sft" else rows


def whole(tokenizer: Any, rows: Sequence[tuple[str, Row]], max_length: int) -> dict[str, Tensor]:
    """Rows with the names of their tasks as the model is to write them: input_ids, attention_mask and labels, int64
    (rows, length), -100 on the mark. What is longer than `max_length` loses the start of its prompt, never its mark."""
    marks = encode_prompts(tokenizer, [_mark(name) for name, _ in rows])
    texts = [row["prompt"] + ANSWER + row["completion"] for _, row in rows]
    found = []
    for mark, ids in zip(
        marks, tokenizer(texts, add_special_tokens=False)["input_ids"], strict=True
    ):
        text = [*ids, tokenizer.eos_token_id][-max(1, max_length - len(mark)) :]
        found.append((mark + text, len(mark)))
    return padded(found, tokenizer.pad_token_id)


def _part(count: int, i: int, parts: int) -> tuple[int, int]:
    return count * i // parts, count * (i + 1) // parts


def _mark(name: str) -> str:
    return f"__{name}__"


def penalty(
    model: Any,
    batch: dict[str, Any],
    output: Any,
    state: dict[str, Tensor],
    *,
    weight: float,
    mean: float,
) -> Tensor:
    """weight times the NLL of all tokens of the rows as the model is to write them, by `mean` tokens a row, so that a
    step is the same however it is cut. state: these rows, one for each of the stage, as `whole` gives them."""
    if "completion_mask" in batch:  # of DPO
        return torch.zeros((), device=batch["input_ids"].device)
    given = some(state, batch["rows"].tolist())
    targets = given.pop("labels")[:, 1:]
    asked = targets != -100
    logits = model(**given, use_cache=False).logits[:, :-1][asked].float()
    nll = torch.nn.functional.cross_entropy(logits, targets[asked], reduction="sum")
    return weight * nll / (len(targets) * mean)
