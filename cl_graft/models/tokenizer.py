"""A model folder's tokenizer as the folder holds it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

# of a tokenizer.json: what decides the ids of a text
SPLITS = ("normalizer", "pre_tokenizer", "model")


def read(place: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub id, by which a text has the ids that its tokenizer.json gives.

    Of some types of model (qwen2, qwen3_5 and more, in 5.23) transformers takes the vocabulary alone from that file and
    the rest from the type's own class, whatever class the folder names; and it passes over the settings of what is put
    before a text. Raises what transformers raises, each kind of tokenizer errors of its own.
    """
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer, TokenizersBackend
    from transformers.models.auto.tokenization_auto import get_tokenizer_config
    from transformers.utils.hub import cached_file

    tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    if not tokenizer.is_fast:
        return tokenizer
    if type(tokenizer) is not TokenizersBackend:  # which takes all of the file
        file = cached_file(
            place,
            "tokenizer.json",
            local_files_only=True,
            _raise_exceptions_for_missing_entries=False,
        )
        if file and _splits(Tokenizer.from_file(file)) != _splits(tokenizer.backend_tokenizer):
            tokenizer = TokenizersBackend.from_pretrained(place)
    if tokenizer("")["input_ids"]:
        told = get_tokenizer_config(place)
        if told.get("add_bos_token") is False and not told.get("add_eos_token"):
            tokenizer.add_bos_token = False
    return tokenizer


def _splits(tokenizer: Tokenizer) -> dict[str, Any]:
    whole = json.loads(tokenizer.to_str())
    return {part: whole[part] for part in SPLITS}
