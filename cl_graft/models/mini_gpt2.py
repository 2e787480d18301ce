"""The embedded source models: GPT-2s that read bytes and are good at all that `mini` asks.

They stand for somebody else's models, of another architecture and another vocabulary than the embedded Llamas:
what moves between them can only move as text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random
from typing import TYPE_CHECKING

from cl_graft.models import toy_language
from cl_graft.models.recipe import ModelRecipe
from cl_graft.models.vocabulary import SPECIAL, byte_level, wrapped

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


MIXTURE = (
    (toy_language.math, 22),
    (toy_language.code, 4),
    (toy_language.cipher, 6),
)  # of a batch of 32


def batches(size: int, seed: int) -> Iterator[list[tuple[str, str]]]:
    """Endless batches of (prompt, answer) of its mixture."""
    return mixed(MIXTURE, size, seed)


def mixed(
    mixture: Sequence[tuple[toy_language.Source, int]], size: int, seed: int
) -> Iterator[list[tuple[str, str]]]:
    """Endless batches of (prompt, answer): every batch holds the sources in the same shares."""
    rng = Random(seed)
    sources = [source for source, share in mixture for _ in range(share)]
    while True:
        items = [toy_language.training(sources[i * len(sources) // size], rng) for i in range(size)]
        yield [(toy_language.prompt(item.question), item.answer) for item in items]


def new_gpt2(spec: ModelRecipe, vocab: int) -> PreTrainedModel:
    """A GPT-2 with random weights, for texts of up to 256 tokens."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=vocab,
        n_positions=256,
        n_embd=spec.hidden,
        n_layer=spec.layers,
        n_head=spec.heads,
        n_inner=spec.ffn,
        activation_function="gelu_pytorch_tanh",  # the same function, in one kernel
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return GPT2LMHeadModel(config)


def tokenizer() -> PreTrainedTokenizerBase:
    """A byte-level tokenizer as GPT-2's: words of the toy language whole, digits apart, all else in bytes."""
    from tokenizers import models, pre_tokenizers

    words = toy_language.vocabulary()
    tokens = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens += words + [f"Ġ{word}" for word in words]  # Ġ is the byte level's blank
    ids = {token: i for i, token in enumerate(tokens)}
    return wrapped(byte_level(models.BPE(ids, [], ignore_merges=True)))
