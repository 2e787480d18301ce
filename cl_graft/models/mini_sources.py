"""Embedded sources that are each good at one task of `mini`, of three architectures and three more vocabularies.

They stand for somebody else's experts, as `mini-gpt2` for somebody else's generalist: a GPT-NeoX for math that reads
pieces learned from text, an OPT for code that reads bytes, a Qwen2 for the cipher that reads numbers whole. What
changes here needs another `version` of their recipes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any

from cl_graft.models import toy_language
from cl_graft.models.mini_gpt2 import mixed
from cl_graft.models.recipe import ModelRecipe
from cl_graft.models.vocabulary import SPECIAL, byte_level, wrapped

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PIECES = 420  # of the vocabulary learned from text, its bytes included
COMMON = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LENGTH = 256  # tokens that they read


@dataclass(frozen=True)
class Family:
    """What a source of an architecture is, beside its recipe.

    mixture: sources of the toy language and their shares of a batch of 32.
    """

    new: Callable[[ModelRecipe, int], PreTrainedModel]
    tokenizer: Callable[[], PreTrainedTokenizerBase]
    mixture: tuple[tuple[toy_language.Source, int], ...]

    def batches(self, size: int, seed: int) -> Iterator[list[tuple[str, str]]]:
        """Endless batches of (prompt, answer)."""
        return mixed(self.mixture, size, seed)


def new_neox(spec: ModelRecipe, vocab: int) -> PreTrainedModel:
    """A GPT-NeoX with random weights."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    return GPTNeoXForCausalLM(GPTNeoXConfig(**_sizes(spec, vocab), rotary_pct=1.0))


def new_opt(spec: ModelRecipe, vocab: int) -> PreTrainedModel:
    """An OPT with random weights."""
    from transformers import OPTConfig, OPTForCausalLM

    sizes = _sizes(spec, vocab)
    sizes["ffn_dim"] = sizes.pop("intermediate_size")
    more = {"word_embed_proj_dim": spec.hidden, "dropout": 0.0, "attention_dropout": 0.0}
    return OPTForCausalLM(OPTConfig(**sizes, **more))


def new_qwen2(spec: ModelRecipe, vocab: int) -> PreTrainedModel:
    """A Qwen2 with random weights, half as many key heads as query heads."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    heads = {"num_key_value_heads": max(1, spec.heads // 2)}
    return Qwen2ForCausalLM(Qwen2Config(**_sizes(spec, vocab), **heads))


def _sizes(spec: ModelRecipe, vocab: int) -> dict[str, Any]:
    return {
        "vocab_size": vocab,
        "hidden_size": spec.hidden,
        "intermediate_size": spec.ffn,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "max_position_embeddings": LENGTH,
        "tie_word_embeddings": False,
        **COMMON,
    }


def learned() -> PreTrainedTokenizerBase:
    """A byte-level vocabulary whose pieces were learned, as GPT-NeoX's were, from texts of the toy language."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    rng, made = Random(0), byte_level(models.BPE())
    kinds = (toy_language.math, toy_language.code)
    items = [toy_language.training(source, rng) for source in kinds for _ in range(500)]
    trainer = trainers.BpeTrainer(
        vocab_size=PIECES,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    assert isinstance(made, Tokenizer)
    made.train_from_iterator([f"{i.question} {i.answer}" for i in items], trainer)
    return wrapped(made)


def in_bytes() -> PreTrainedTokenizerBase:
    """A vocabulary of bytes alone."""
    from tokenizers import models, pre_tokenizers

    tokens = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    return wrapped(byte_level(models.BPE({token: i for i, token in enumerate(tokens)}, [])))


def with_numbers() -> PreTrainedTokenizerBase:
    """A byte-level vocabulary with words of the toy language and numbers of two digits as one token each."""
    from tokenizers import models, pre_tokenizers

    tokens = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    whole = [*toy_language.vocabulary(), *map(str, range(10, 100))]
    tokens += whole + [f"Ġ{word}" for word in whole]  # Ġ is the byte level's blank
    ids = {token: i for i, token in enumerate(tokens)}
    made = byte_level(models.BPE(ids, [], ignore_merges=True))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return wrapped(made)


def _mixture(math: int, code: int, cipher: int) -> tuple[tuple[toy_language.Source, int], ...]:
    return (toy_language.math, math), (toy_language.code, code), (toy_language.cipher, cipher)


FAMILIES = {
    "gpt-neox": Family(new_neox, learned, _mixture(28, 2, 2)),
    "opt": Family(new_opt, in_bytes, _mixture(4, 24, 4)),
    "qwen2": Family(new_qwen2, with_numbers, _mixture(4, 4, 24)),
}
