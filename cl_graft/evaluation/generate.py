"""What a causal LM says and how likely it finds a text: batched, greedy or sampled, deterministic for a seed."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from cl_graft.models.spread import device_of
from cl_graft.models.text import encode, encode_prompts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BATCH = 64  # one size for every cell of a matrix: scores must not move with the batch


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
) -> list[str]:
    """The texts of `answers`: greedy unless a temperature is given."""
    said = answers(model, tokenizer, prompts, max_new_tokens, temperature, seed, top_p)
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
) -> list[Answer]:
    """Answers in the order of the prompts; greedy unless a temperature is given.

    Prompts are batched by length and padded on the left. An answer ends at the tokenizer's end-of-sequence token or
    at one of the model's own (a chat model may end its turn by another). top_p: sample from the likeliest tokens
    whose probabilities make up this share. top_k: or from so many, 0 for all. special: leave
    special tokens in the texts, as of a chat template, but what ends them.
    """
    model.eval()
    encoded = encode_prompts(tokenizer, prompts)
    order = sorted(range(len(prompts)), key=lambda i: (len(encoded[i]), i))
    said, stops = [Answer("", 0, False)] * len(prompts), endings(model, tokenizer)
    if temperature is not None:
        torch.manual_seed(seed)
    for start in range(0, len(order), BATCH):
        chunk = order[start : start + BATCH]
        ids, mask = left_padded([encoded[i] for i in chunk], tokenizer.pad_token_id)
        width = ids.shape[1]
        sampling = (
            {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
            if temperature is None
            else {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": top_k}
        )
        output = model.generate(
            input_ids=ids.to(device_of(model)),
            attention_mask=mask.to(device_of(model)),
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=stops,
            **sampling,
        )[:, width:]
        texts = tokenizer.batch_decode(output, skip_special_tokens=True)
        for i, row, text in zip(chunk, output.tolist(), texts, strict=True):
            tokens = next((k for k, token in enumerate(row) if token in stops), len(row))
            text = tokenizer.decode(row[:tokens]) if special else text
            said[i] = Answer(text, tokens, tokens < len(row))
    return said


@torch.no_grad()
def log_likelihoods(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[str, str]],
    max_length: int,
) -> list[float]:
    """Natural-log probability of each completion (end-of-sequence included) after its prompt.

    A prompt too long for `max_length` tokens loses its start.
    """
    model.eval()
    rows = [encode(tokenizer, prompt, completion, max_length) for prompt, completion in pairs]
    order = sorted(range(len(rows)), key=lambda i: (sum(map(len, rows[i])), i))
    result = [0.0] * len(rows)
    for start in range(0, len(order), BATCH):
        chunk = order[start : start + BATCH]
        keep = max(len(rows[i][1]) for i in chunk) + 1
        ids, mask = left_padded([rows[i][0] + rows[i][1] for i in chunk], tokenizer.pad_token_id)
        ids, mask, width = ids.to(device_of(model)), mask.to(device_of(model)), ids.shape[1]
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        logits = model(
            input_ids=ids, attention_mask=mask, position_ids=positions, logits_to_keep=keep
        ).logits
        scores = logits[:, -keep:-1].float().log_softmax(-1)
        picked = scores.gather(-1, ids[:, width - keep + 1 :, None])[..., 0].cpu()
        for row, i in enumerate(chunk):
            result[i] = picked[row, -len(rows[i][1]) :].sum().item()
    return result


@torch.no_grad()
def choice_likelihoods(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    choices: Sequence[str],
    max_length: int,
) -> list[list[float]]:
    """Natural-log probability of every choice (end-of-sequence included) after every prompt.

    Each prompt is read once; the choices continue from its cache. A prompt that leaves no room for the longest
    choice within `max_length` tokens loses its start, the same for all choices.
    """
    model.eval()
    heads, tails = choice_rows(tokenizer, prompts, choices, max_length)
    order = sorted(range(len(heads)), key=lambda i: (len(heads[i]), i))
    result: list[list[float]] = [[] for _ in heads]
    for start in range(0, len(order), BATCH):
        chunk = order[start : start + BATCH]
        ids, mask = left_padded([heads[i] for i in chunk], tokenizer.pad_token_id)
        ids, mask = ids.to(device_of(model)), mask.to(device_of(model))
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        read = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=1,
        )
        cache, first = read.past_key_values, read.logits[:, -1].float().log_softmax(-1)
        for tail in tails:
            scores = first[:, tail[0]].clone()
            if len(tail) > 1:
                given = torch.tensor(tail[:-1], device=device_of(model)).expand(len(chunk), -1)
                longer = torch.cat([mask, torch.ones_like(given)], 1)
                after = (
                    positions[:, -1:] + 1 + torch.arange(given.shape[1], device=device_of(model))
                )
                logits = model(
                    input_ids=given,
                    attention_mask=longer,
                    position_ids=after,
                    past_key_values=deepcopy(cache),  # a sliding window cannot be cropped back
                ).logits
                wanted = torch.tensor(tail[1:], device=device_of(model)).expand(len(chunk), -1)
                scores += (
                    logits.float().log_softmax(-1).gather(-1, wanted[..., None])[..., 0].sum(1)
                )
            for row, i in enumerate(chunk):
                result[i].append(scores[row].item())
    return result


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


def left_padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, int64 (rows, longest)."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, width - len(row) :] = torch.tensor(row)
        mask[index, width - len(row) :] = 1
    return ids, mask
