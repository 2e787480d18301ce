"""A memory of training rows of earlier tasks, of bounded size, kept as one artefact that tasks share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cl_graft.errors import CLGraftError
from cl_graft.models.text import encode
from cl_graft.skillpack.codecs import Encoded
from cl_graft.skillpack.codecs.exact import exact, original
from cl_graft.skillpack.compress.text import padded
from cl_graft.strategy.kept import Tensors
from cl_graft.training.config import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MEMORY = "memory"  # the shared artefact


@dataclass
class Reservoir:
    """A sample of a stream in which every row so far is with the same chance (algorithm R, Vitter 1985).

    seen: rows of the stream so far. rows: as many of them as there are, at most `size`.
    """

    size: int
    seen: int = 0
    rows: list[Row] = field(default_factory=list)

    def see(self, rows: Sequence[Row], seed: int) -> None:
        """Let the rows of the stream that come next pass; chance follows from the seed and what was seen before."""
        rng = Random(f"reservoir/{seed}/{self.seen}")
        for row in rows:
            self.seen += 1
            if len(self.rows) < self.size:
                self.rows.append(row)
            elif (place := rng.randrange(self.seen)) < self.size:
                self.rows[place] = row

    def draw(self, count: int, seed: int) -> list[Row]:
        """Draw `count` rows, none twice before each has come once; none at all of an empty reservoir."""
        rng, drawn = Random(f"draw/{seed}"), list[Row]()
        while self.rows and len(drawn) < count:
            drawn += rng.sample(self.rows, len(self.rows))
        return drawn[:count]


class Memory:
    """Reservoirs of the rows of training stages, one for each kind of stage, `sft` and `dpo`, of `size` rows each.

    kept: what `tensors` of the memory so far has given, or None at the start.
    Raises CLGraftError for a size that holds nothing.
    """

    def __init__(self, size: int, seed: int, kept: Tensors | None = None):
        if size < 1:
            raise CLGraftError(f"a memory of size={size} holds nothing; give a size of 1 or more.")
        told = json.loads(original(kept["json"]).numpy().tobytes()) if kept else {}
        self.size, self.seed = size, seed
        self.kinds = {kind: Reservoir(size, **about) for kind, about in told.items()}

    def __getitem__(self, kind: str) -> Reservoir:
        return self.kinds.setdefault(kind, Reservoir(self.size))

    def see(self, kind: str, rows: Sequence[Row]) -> None:
        """Let the rows of a stage of this kind pass."""
        self[kind].see(rows, self.seed)

    def tensors(self) -> dict[str, Encoded]:
        """The memory as `json`, UTF-8 in a uint8 tensor (bytes,)."""
        told = {k: {"seen": r.seen, "rows": r.rows} for k, r in sorted(self.kinds.items())}
        text = json.dumps(told, ensure_ascii=False).encode()
        return {"json": exact(torch.frombuffer(bytearray(text), dtype=torch.uint8))}


def tokens(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], max_length: int
) -> dict[str, Tensor]:
    """Rows of SFT as one batch: input_ids, attention_mask, labels, int64 (rows, length), -100 outside the answer."""
    texts = [encode(tokenizer, r["prompt"], r["completion"], max_length) for r in rows]
    return padded([(head + tail, len(head)) for head, tail in texts], tokenizer.pad_token_id)


def some(batch: dict[str, Tensor], rows: Sequence[int]) -> dict[str, Tensor]:
    """Some rows of a batch as `tokens` gives it, cut to the longest of them."""
    picked = {name: x[list(rows)] for name, x in batch.items()}
    width = int(picked["attention_mask"].sum(1).max())
    return {name: x[:, :width] for name, x in picked.items()}
