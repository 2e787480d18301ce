"""A memory of training rows of earlier tasks, of bounded size, kept as one artefact that tasks share."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field
from random import Random
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cl_graft.errors import CLGraftError
from cl_graft.models.text import encode
from cl_graft.skillpack.codecs import Encoded
from cl_graft.skillpack.codecs.exact import exact, original
from cl_graft.skillpack.compress.text import padded
from cl_graft.strategy.kept import Tensors
from cl_graft.training.config import Row, StageConfig

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


@dataclass
class Surprising:
    """The rows that surprised a model most, as many of each task (SuRe, arXiv 2511.22367).

    size: of all together. tasks: the rows of each task, the most surprising first, at most size // tasks of each.
    """

    size: int
    tasks: list[list[Row]] = field(default_factory=list)

    @property
    def rows(self) -> list[Row]:
        return [row for rows in self.tasks for row in rows]

    def see(self, rows: Sequence[Row], surprise: Sequence[float]) -> None:
        """Keep the most surprising rows of the next task, and fewer of those before: the less surprising ones go."""
        order = sorted(range(len(rows)), key=lambda n: -surprise[n])
        self.tasks.append([rows[n] for n in order])
        share = self.size // len(self.tasks)
        self.tasks = [kept[:share] for kept in self.tasks]


def draw(rows: Sequence[Row], count: int, seed: int) -> list[Row]:
    """Draw `count` of the rows, none twice before each has come once; none at all where there are none."""
    rng, drawn = Random(f"draw/{seed}"), list[Row]()
    while rows and len(drawn) < count:
        drawn += rng.sample(rows, len(rows))
    return drawn[:count]


class Memory:
    """Rows of training stages, apart by a name such as the kind of stage, `sft` or `dpo`, `size` rows of each.

    kept: what `tensors` of the memory so far has given, or None at the start. part: how the rows of one name are
    kept, a reservoir or the most surprising ones. Raises CLGraftError for a size that holds nothing.
    """

    def __init__(
        self,
        size: int,
        seed: int,
        kept: Tensors | None = None,
        part: type[Reservoir] | type[Surprising] = Reservoir,
    ):
        if size < 1:
            raise CLGraftError(f"a memory of size={size} holds nothing; give a size of 1 or more.")
        told = json.loads(original(kept["json"]).numpy().tobytes()) if kept else {}
        self.size, self.seed, self.part = size, seed, part
        self.kinds: dict[str, Any] = {name: part(size, **about) for name, about in told.items()}

    def __getitem__(self, name: str) -> Any:
        return self.kinds.setdefault(name, self.part(self.size))

    def see(self, name: str, rows: Sequence[Row], surprise: Sequence[float] = ()) -> None:
        """Let the rows of a stage pass. surprise: of each row, where the most surprising ones are kept."""
        self[name].see(rows, self.seed if self.part is Reservoir else surprise)

    def mixed(self, rows: Sequence[Row], job: StageConfig, share: float) -> list[Row]:
        """The rows of a stage, and behind them old ones of its kind: that share of all, to the nearest row."""
        count = round(len(rows) * share / (1 - share))
        return [*rows, *draw(self[job.kind].rows, count, job.seed)]

    def tensors(self) -> dict[str, Encoded]:
        """The memory as `json`, UTF-8 in a uint8 tensor (bytes,)."""
        told = {name: asdict(part) for name, part in sorted(self.kinds.items())}
        for about in told.values():
            del about["size"]
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


def gradients(
    model: Any, batch: dict[str, Tensor], names: Collection[str]
) -> dict[str, Tensor | None]:
    """{name: gradient} of these parameters, of a batch's mean loss over its labels; None where there is no way to it.

    batch: as `some` gives it. Gradients that the parameters hold are left as they are.
    """
    parameters = dict(model.named_parameters())
    loss = model(**batch, use_cache=False).loss
    wanted = [parameters[name] for name in names]
    return dict(zip(names, torch.autograd.grad(loss, wanted, allow_unused=True), strict=True))
