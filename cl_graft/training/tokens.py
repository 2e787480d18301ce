"""The rows of a stage as token ids, made once by whoever starts it; TRL is given nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from cl_graft.models.text import encode_all
from cl_graft.training.config import Row, StageConfig, order

ROWS = "rows"  # the column that says which row of the stage an example is

Tokens = dict[
    str, Any
]  # an example: input_ids and labels (sft), or prompt_ids, chosen_ids and rejected_ids (dpo)


def tokens(tokenizer: Any, rows: Iterable[Row], config: StageConfig) -> list[Tokens]:
    """An example a row, with the number of the row, by which a term knows it in a batch; none is left out.

    All end and are cut as in models/text.py, so that what is trained on is what is generated from. The prompt of a
    pair is the same for both answers: it is cut by what the longer one leaves.
    """
    answers = ("completion",) if config.kind == "sft" else ("chosen", "rejected")
    texts = ((row["prompt"], tuple(row[answer] for answer in answers)) for row in rows)
    examples = []
    for number, (head, tails) in enumerate(encode_all(tokenizer, texts, config.max_length)):
        if config.kind == "sft":
            (tail,) = tails
            example = {"input_ids": head + tail, "labels": [-100] * len(head) + tail}
        else:
            example = {"prompt_ids": head, "chosen_ids": tails[0], "rejected_ids": tails[1]}
        examples.append({**example, ROWS: number})
    return examples


def lengths(examples: Iterable[Tokens]) -> list[int]:
    """Tokens of each text that is read, its prompt included: one of a row, or one for each answer of a pair."""
    counts = []
    for example in examples:
        if "input_ids" in example:
            counts.append(len(example["input_ids"]))
        else:
            prompt = len(example["prompt_ids"])
            counts += [prompt + len(example[answer]) for answer in ("chosen_ids", "rejected_ids")]
    return counts


def largest(examples: Sequence[Tokens], config: StageConfig, micro: int) -> tuple[int, int]:
    """The most tokens, and the most labels, of the job's micro-batches of so many rows."""
    read, told = [], []
    for example in examples:
        counts = lengths([example])
        heads = len(example["prompt_ids"]) * len(counts) if "prompt_ids" in example else 0
        read.append(sum(counts))
        told.append(sum(x != -100 for x in example["labels"]) if not heads else read[-1] - heads)
    rows = order(len(examples), config)
    parts = [rows[start : start + micro] for start in range(0, len(rows), micro)]
    return max(sum(read[i] for i in p) for p in parts), max(sum(told[i] for i in p) for p in parts)


def tokens_of_a_step(lengths: Sequence[int], rows: int, config: StageConfig) -> float:
    """Tokens of one step on average, where so many rows have texts of these lengths."""
    return sum(lengths) / rows * config.batch
