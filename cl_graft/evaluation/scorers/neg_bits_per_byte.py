"""Minus the bits that the model spends on each byte of the reference answer: moves even for a tiny model."""

from collections.abc import Sequence
from math import log

from cl_graft.evaluation.scorers.base import Examinee, scorer
from cl_graft.models.text import encode
from cl_graft.task import Example


@scorer(
    needs="likelihoods", convention="bits per UTF-8 byte of the reference, end-of-sequence included"
)
def neg_bits_per_byte(examinee: Examinee, examples: Sequence[Example]) -> list[float]:
    """Minus bits per UTF-8 byte of each reference answer; one longer than `max_length` counts as far as it is read."""
    values = examinee.likelihoods([(e.prompt, e.completion) for e in examples])
    return [
        value / log(2) / max(1, len(_read(examinee, e).encode()))
        for value, e in zip(values, examples, strict=True)
    ]


def _read(examinee: Examinee, example: Example) -> str:
    tokenizer = examinee.tokenizer
    _, tail = encode(tokenizer, example.prompt, example.completion, examinee.max_length)
    whole = tail[-1] == tokenizer.eos_token_id
    return example.completion if whole else tokenizer.decode(tail)
