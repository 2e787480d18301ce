"""Examples as token ids: the one way for what is trained on, generated from, measured and looked at."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[list[int]]:
    """Token ids of each prompt, at least one of them.

    Without any, there would be nothing to predict an answer's first token from: an empty prompt of a tokenizer that
    puts no token before a text is its beginning-of-text token, or, without one, its end-of-sequence token, as in
    lm-evaluation-harness.
    """
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    start = [] if begin is None else [begin]
    return [ids or start for ids in tokenizer(list(prompts))["input_ids"]] if prompts else []


def encode(
    tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str, max_length: int
) -> tuple[list[int], list[int]]:
    """Token ids of prompt and completion, the completion closed by end-of-sequence.

    An example longer than `max_length` loses the start of its prompt, never its answer's start.
    """
    ((head, (tail,)),) = encode_all(tokenizer, [(prompt, (completion,))], max_length)
    return head, tail


def encode_all(
    tokenizer: PreTrainedTokenizerBase,
    rows: Iterable[tuple[str, tuple[str, ...]]],
    max_length: int,
) -> Iterator[tuple[list[int], list[list[int]]]]:
    """`encode` for many rows of a prompt and its answers, which all follow what the longest of them leaves of it.

    The tokenizer is called once for hundreds of rows.
    """
    rest = iter(rows)
    while part := list(islice(rest, 512)):
        heads = encode_prompts(tokenizer, [prompt for prompt, _ in part])
        every = [answer for _, answers in part for answer in answers]
        tails = iter(tokenizer(every, add_special_tokens=False)["input_ids"])
        for head, (_, answers) in zip(heads, part, strict=True):
            closed = [[*next(tails), tokenizer.eos_token_id] for _ in answers]
            yield _cut(head, closed, max_length)


def _cut(
    head: list[int], tails: list[list[int]], max_length: int
) -> tuple[list[int], list[list[int]]]:
    tails = [tail[: max(1, max_length - 1)] for tail in tails]
    room = max(0, max_length - max(map(len, tails)))
    return head[max(0, len(head) - room) :], tails
