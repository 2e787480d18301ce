"""What a causal LM says and how likely it finds a text: batched, greedy or sampled, deterministic for a seed.

Where the model keeps keys and values of all tokens (`rows.can_read`), what texts begin with alike is read once, answers
leave the batch where they end, and likelihoods take the model's head at the tokens in question alone. Other models
answer by transformers' `generate`, and read each pair of texts by itself.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cl_graft.evaluation import batches, decode, rows
from cl_graft.evaluation import likelihoods as likelihoods_module
from cl_graft.evaluation.batches import BATCH, left_padded
from cl_graft.evaluation.decode import Decoding, drawn, likeliest
from cl_graft.evaluation.likelihoods import Told, likelihoods
from cl_graft.evaluation.rows import can_read
from cl_graft.models.spread import device_of
from cl_graft.models.text import encode, encode_prompts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# what answers and likelihoods depend on
CODE = (sys.modules[__name__], batches, decode, likelihoods_module, rows)
# what transforms the scores of a row by that row alone, however long it is
PROCESSORS = {
    "NoRepeatNGramLogitsProcessor",
    "RepetitionPenaltyLogitsProcessor",
    "SuppressTokensLogitsProcessor",
    "TemperatureLogitsWarper",
    "TopKLogitsWarper",
    "TopPLogitsWarper",
}


@dataclass(frozen=True)
class Answer:
    """What a model said: the text, its tokens (end-of-sequence not counted), and whether it came to an end."""

    text: str
    tokens: int
    finished: bool


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_new_tokens: int,
    temperature: float | None = None,
    seed: int = 0,
    top_p: float = 1.0,
    told: Told | None = None,
) -> list[str]:
    """The texts of `answers`: greedy unless a temperature is given."""
    said = answers(model, tokenizer, prompts, max_new_tokens, temperature, seed, top_p, told=told)
    return [answer.text for answer in said]


@torch.no_grad()
def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_new_tokens: int,
    temperature: float | None = None,
    seed: int = 0,
    top_p: float = 1.0,
    top_k: int = 0,
    special: bool = False,
    told: Told | None = None,
) -> list[Answer]:
    """Answers in the order of the prompts; greedy unless a temperature is given.

    An answer ends at the tokenizer's end-of-sequence token or at one of the model's own (a chat model may end its turn
    by another). What is drawn for a prompt depends on the seed, its place among the prompts and `max_new_tokens`.
    top_p: sample from the likeliest tokens whose probabilities make up this share. top_k: or from so many, 0 for all.
    special: leave special tokens in the texts, as of a chat template, but what ends them. told: called before each
    forward pass with the numbers of the prompts that its rows belong to, for `Attached.choose`.
    """
    model.eval()
    encoded, stops = encode_prompts(tokenizer, prompts), endings(model, tokenizer)
    greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    drawing = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": top_k}
    settings = {
        "max_new_tokens": max_new_tokens,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": stops,
        **(greedy if temperature is None else drawing),
    }
    found = _leaving(model, encoded, settings, seed, told) if can_read(model) else None
    if found is None:
        found = _together(model, encoded, settings, seed, told)
    said = []
    for row in found:
        tokens = next((k for k, token in enumerate(row) if token in stops), len(row))
        text = tokenizer.decode(row[:tokens] if special else row, skip_special_tokens=not special)
        said.append(Answer(text, tokens, tokens < len(row)))
    return said


def _leaving(
    model: Any, prompts: list[list[int]], settings: dict[str, Any], seed: int, told: Told | None
) -> list[list[int]] | None:
    """Tokens of answers, whose rows leave the batch where they end; None where the model's settings do not allow it.

    `generate` makes of the settings and of the model's own what is to be done with logits, and hands over.
    """
    found: list[list[int]] | None = None

    def loop(
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **kwargs: Any,
    ) -> Tensor:
        nonlocal found
        mode = generation_config.get_generation_mode().value
        if (
            mode in ("greedy_search", "sample")
            and {type(each).__name__ for each in logits_processor} <= PROCESSORS
        ):
            most = settings["max_new_tokens"]
            pick = likeliest if mode == "greedy_search" else drawn(len(prompts), most, seed)
            process = logits_processor if len(logits_processor) else None
            found = Decoding(
                model,
                prompts,
                most,
                settings["eos_token_id"],
                pick,
                process,
                settings["pad_token_id"],
                told,
            ).run()
        return input_ids

    if not prompts:
        return []
    ids = torch.tensor([max(prompts, key=len)], device=device_of(model))
    model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), **settings, custom_generate=loop
    )
    return found


def _together(
    model: Any, prompts: list[list[int]], settings: dict[str, Any], seed: int, told: Told | None
) -> list[list[int]]:
    """Tokens of answers by transformers' `generate`: batches by length, padded on the left."""
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    said: list[list[int]] = [[] for _ in prompts]
    if settings["do_sample"]:
        torch.manual_seed(seed)
    for start in range(0, len(order), BATCH):
        chunk = order[start : start + BATCH]
        if told:
            told(chunk)
        ids, mask = left_padded([prompts[i] for i in chunk], settings["pad_token_id"])
        output = model.generate(
            input_ids=ids.to(device_of(model)), attention_mask=mask.to(device_of(model)), **settings
        )
        for i, row in zip(chunk, output[:, ids.shape[1] :].tolist(), strict=True):
            said[i] = row
    return said


@torch.no_grad()
def log_likelihoods(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[str, str]],
    max_length: int,
    told: Told | None = None,
) -> list[float]:
    """Natural-log probability of each completion (end-of-sequence included) after its prompt.

    A prompt too long for `max_length` tokens loses its start. told: as of `answers`.
    """
    model.eval()
    both = [encode(tokenizer, prompt, completion, max_length) for prompt, completion in pairs]
    heads, tails = [head for head, _ in both], [[tail] for _, tail in both]
    found = likelihoods(model, tokenizer.pad_token_id, heads, tails, told)
    return [value for (value,) in found]


@torch.no_grad()
def choice_likelihoods(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    choices: Sequence[str],
    max_length: int,
    told: Told | None = None,
) -> list[list[float]]:
    """Natural-log probability of every choice (end-of-sequence included) after every prompt.

    Each prompt is read once, and what prompts begin with alike once for all; the choices continue side by side. A
    prompt that leaves no room for the longest choice within `max_length` tokens loses its start, the same for all
    choices. told: as of `answers`.
    """
    model.eval()
    heads, tails = choice_rows(tokenizer, prompts, choices, max_length)
    return likelihoods(model, tokenizer.pad_token_id, heads, [tails] * len(heads), told)


def choice_rows(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    choices: Sequence[str],
    max_length: int,
) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of the prompts and of the choices, closed by end-of-sequence, as `choice_likelihoods` reads them."""
    tails = [
        tokenizer(c, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        for c in choices
    ]
    tails = [tail[: max(1, max_length - 1)] for tail in tails]
    room = max(1, max_length - max(map(len, tails)))
    return [ids[-room:] for ids in encode_prompts(tokenizer, prompts)], tails


def endings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end an answer: the tokenizer's end-of-sequence token and the model's own."""
    own = model.generation_config.eos_token_id
    listed = own if isinstance(own, list) else [own]
    return sorted({tokenizer.eos_token_id, *(token for token in listed if token is not None)})
