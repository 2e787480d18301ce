"""Examples as token ids."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode(tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str, max_length: int):
    """Token ids of prompt and completion, the completion closed by end-of-sequence.

    An example longer than `max_length` loses the start of its prompt, never its answer's start.
    """
    head = tokenizer(prompt)["input_ids"]
    tail = tokenizer(completion, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    tail = tail[: max(1, max_length - 1)]
    room = max(0, max_length - len(tail))
    return head[max(0, len(head) - room) :], tail
