"""What a model says of given answers, token by token: its likeliest tokens, stored beside the rows they were said of.

<out>/logits-0.safetensors, logits-1.safetensors, ...: a source each, in the order of the build, with

- `starts` int64 (rows + 1): the answer of row i is the tokens from `starts[i]` to `starts[i + 1]`, its end included;
- `tokens` int32 (tokens): the answers in the source's own vocabulary;
- `ids` int32, `logits` float32 (tokens, K): what it would have said there, the likeliest first;
- `nll` float64 (rows): the mean over the answer's tokens, infinite for a row that is longer than the source reads;

and as metadata the source's name, a digest of what was asked, and the texts of all tokens that occur.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from cl_graft.evaluation.generate import BATCH, left_padded
from cl_graft.models.spread import device_of
from cl_graft.models.text import encode_all
from cl_graft.store.files import RecordError, write_bytes
from cl_graft.transfer.align import texts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TENSORS = ("starts", "tokens", "ids", "logits", "nll")


@dataclass(frozen=True)
class Said:
    """What one model says of the answers of some rows; tensors as in the file, texts {id: text of the token}."""

    starts: Tensor
    tokens: Tensor
    ids: Tensor
    logits: Tensor
    nll: Tensor
    texts: Mapping[int, str]
    source: str = ""

    def row(self, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (n,), ids and logits (n, K) of a row's answer."""
        here = slice(int(self.starts[number]), int(self.starts[number + 1]))
        return self.tokens[here], self.ids[here], self.logits[here]


@torch.no_grad()
def say(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[tuple[str, str]],
    count: int,
    max_length: int | None = None,
    progress: Callable[[float], None] = lambda done: None,
) -> Said:
    """Read answers after their prompts, and keep the `count` likeliest tokens at each token of an answer.

    rows: (prompt, answer), of which each is closed by end-of-sequence. max_length: in tokens; of a longer row the
    prompt's start is cut; left out, what the model's positions hold. A row whose answer alone is longer is not read.
    """
    training = model.training
    model.eval()
    room = getattr(model.config, "max_position_embeddings", None) or 1 << 30
    room = min(room, max_length or room)
    given = ((prompt, (answer,)) for prompt, answer in rows)
    encoded = [(head, tail) for head, (tail,) in encode_all(tokenizer, given, 1 << 30)]
    read = [i for i, (_, tail) in enumerate(encoded) if len(tail) < room]
    order = sorted(read, key=lambda i: (sum(map(len, encoded[i])), i))
    count = min(count, len(tokenizer))
    found: dict[int, tuple[Tensor, Tensor]] = {}
    nll = torch.full((len(rows),), math.inf, dtype=torch.float64)
    for start in range(0, len(order), BATCH):
        chunk = order[start : start + BATCH]
        whole = [(encoded[i][0] + encoded[i][1])[-room:] for i in chunk]
        ids, mask = left_padded(whole, tokenizer.pad_token_id)
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        given_ids = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        keep = max(len(encoded[i][1]) for i in chunk) + 1
        on_device = {name: x.to(device_of(model)) for name, x in given_ids.items()}
        logits = model(**on_device, logits_to_keep=keep).logits[:, -keep:-1].float()
        logits = logits[..., : len(tokenizer)]  # of a padded vocabulary the rest is no token
        logs = logits.log_softmax(-1)
        gold = on_device["input_ids"][:, 1 - keep :, None]
        lost = -logs.gather(-1, gold)[..., 0].cpu()
        best = logits.topk(count, dim=-1)
        for n, i in enumerate(chunk):
            size = len(encoded[i][1])
            found[i] = best.indices[n, -size:].int().cpu(), best.values[n, -size:].cpu()
            nll[i] = lost[n, -size:].double().mean()
        progress((start + len(chunk)) / len(order))
    model.train(training)
    tails = [encoded[i][1] if i in found else [] for i in range(len(rows))]
    tokens = torch.tensor([token for tail in tails for token in tail], dtype=torch.int32)
    every = [found[i] for i in sorted(found)]
    ids = torch.cat([x for x, _ in every]) if every else torch.zeros(0, count, dtype=torch.int32)
    logits = torch.cat([x for _, x in every]) if every else torch.zeros(0, count)
    spelt = texts(tokenizer)
    known = {int(i): spelt[i] for i in torch.cat([tokens, ids.flatten()]).unique()}
    starts = torch.tensor([0, *accumulate(map(len, tails))])
    return Said(starts, tokens, ids, logits, nll, known)


def write(path: Path, said: Said, source: str, asked: str) -> None:
    """Write the file whole or not at all. asked: a digest of what was asked of whom."""
    tensors = {name: getattr(said, name).contiguous() for name in TENSORS}
    known = {str(i): text for i, text in sorted(said.texts.items())}
    # one entry, since safetensors (0.8) writes several in another order each time
    about = {"about": json.dumps({"source": source, "asked": asked, "texts": known})}
    write_bytes(path, save(tensors, about))


def asked_of(path: Path) -> str | None:
    """The digest that a file was written with; None where there is none, or none that can be read."""
    try:
        with safe_open(path, "pt") as file:
            return json.loads(file.metadata()["about"])["asked"]
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None


def read(path: Path) -> Said:
    """Read what `write` wrote. Raises RecordError for a file that is none."""
    try:
        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["about"])
            tensors = {name: file.get_tensor(name) for name in TENSORS}
        known = {int(i): text for i, text in about["texts"].items()}
        return Said(**tensors, texts=known, source=about["source"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise RecordError(
            f"{path} holds no logits of a source; build the data again by `cl-graft transfer build --logits`."
        ) from error
