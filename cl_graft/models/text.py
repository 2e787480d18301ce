"""Examples as token ids."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode(
    tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str, max_length: int
) -> tuple[list[int], list[int]]:
    """Token ids of prompt and completion, the completion closed by end-of-sequence.

    An example longer than `max_length` loses the start of its prompt, never its answer's start.
    """
    return next(encode_all(tokenizer, [(prompt, completion)], max_length))


def encode_all(
    tokenizer: PreTrainedTokenizerBase, pairs: Iterable[tuple[str, str]], max_length: int
) -> Iterator[tuple[list[int], list[int]]]:
    """`encode` for many pairs of prompt and completion; the tokenizer is called once for hundreds of them."""
    rest = iter(pairs)
    while part := list(islice(rest, 512)):
        prompts, completions = map(list, zip(*part, strict=True))
        heads = tokenizer(prompts)["input_ids"]
        tails = tokenizer(completions, add_special_tokens=False)["input_ids"]
        for head, tail in zip(heads, tails, strict=True):
            yield _cut(head, [*tail, tokenizer.eos_token_id], max_length)


def _cut(head: list[int], tail: list[int], max_length: int) -> tuple[list[int], list[int]]:
    tail = tail[: max(1, max_length - 1)]
    room = max(0, max_length - len(tail))
    return head[max(0, len(head) - room) :], tail
