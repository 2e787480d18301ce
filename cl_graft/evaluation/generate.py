"""What a causal LM says and how likely it finds a text: batched, greedy or sampled, deterministic for a seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BATCH = 64  # one size for every cell of a matrix: scores must not move with the batch


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_new_tokens: int,
    temperature: float | None = None,
    seed: int = 0,
) -> list[str]:
    """Answers in the order of the prompts; greedy unless a temperature is given.

    Prompts are batched by length and padded on the left.
    """
    model.eval()
    encoded = [tokenizer(p)["input_ids"] for p in prompts]
    order = sorted(range(len(prompts)), key=lambda i: (len(encoded[i]), i))
    answers = [""] * len(prompts)
    if temperature is not None:
        torch.manual_seed(seed)
    for start in range(0, len(order), BATCH):
        chunk = order[start : start + BATCH]
        width = max(len(encoded[i]) for i in chunk)
        ids = torch.full((len(chunk), width), tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(chunk):
            ids[row, width - len(encoded[i]) :] = torch.tensor(encoded[i])
            mask[row, width - len(encoded[i]) :] = 1
        sampling = (
            {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
            if temperature is None
            else {"do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": 0}
        )
        output = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            **sampling,
        )
        texts = tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
        for i, text in zip(chunk, texts, strict=True):
            answers[i] = text
    return answers


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
    from ..training.stage import encode

    model.eval()
    rows = [encode(tokenizer, prompt, completion, max_length) for prompt, completion in pairs]
    order = sorted(range(len(rows)), key=lambda i: (sum(map(len, rows[i])), i))
    result = [0.0] * len(rows)
    for start in range(0, len(order), BATCH):
        chunk = order[start : start + BATCH]
        width = max(sum(map(len, rows[i])) for i in chunk)
        keep = max(len(rows[i][1]) for i in chunk) + 1
        ids = torch.full((len(chunk), width), tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(chunk):
            tokens = torch.tensor(rows[i][0] + rows[i][1])
            ids[row, width - len(tokens) :] = tokens
            mask[row, width - len(tokens) :] = 1
        ids, mask = ids.to(model.device), mask.to(model.device)
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        logits = model(
            input_ids=ids, attention_mask=mask, position_ids=positions, logits_to_keep=keep
        ).logits
        scores = logits[:, -keep:-1].float().log_softmax(-1)
        picked = scores.gather(-1, ids[:, width - keep + 1 :, None])[..., 0].cpu()
        for row, i in enumerate(chunk):
            result[i] = picked[row, -len(rows[i][1]) :].sum().item()
    return result
