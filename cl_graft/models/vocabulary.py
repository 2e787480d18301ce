"""What the vocabularies of the embedded models have in common.

The names of cached models do not tell of this file: what changes their vocabularies needs another `version` of their
recipes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

SPECIAL = ["<pad>", "<s>", "</s>"]  # ids 0, 1 and 2


def byte_level(model: Any) -> Tokenizer:
    """A tokenizer of bytes from a `tokenizers` model: digits one by one, blanks kept, so that any text survives."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers

    made = Tokenizer(model)
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    return made


def wrapped(made: Tokenizer, **more: str) -> PreTrainedTokenizerBase:
    """Wrap it for transformers: texts begin with `<s>`, batches are padded on the left. more: special tokens."""
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        **more,
    )
