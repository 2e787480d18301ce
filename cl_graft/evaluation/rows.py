"""What a model has read: keys and values of a batch's rows, which are repeated, dropped and joined as texts need it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from cl_graft.models.spread import device_of

if TYPE_CHECKING:
    from transformers import DynamicCache


def can_read(model: Any) -> bool:
    """Whether the model keeps keys and values of all tokens, and of nothing else, so that `Rows` can hold them.

    Those with a state that runs through the tokens, or with chunks that are counted from the start of a row, do not.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    given, config = inspect.signature(model.forward).parameters, model.config
    if config.is_encoder_decoder or not {"past_key_values", "attention_mask"} <= given.keys():
        return False
    if "chunked_attention" in (getattr(config.get_text_config(), "layer_types", None) or ()):
        return False
    layers = DynamicCache(config=config).layers
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def _nothing() -> DynamicCache:
    from transformers import DynamicCache

    return DynamicCache()


@dataclass
class Rows:
    """Texts that have been read, one a row: its tokens fill the last of the row's slots, padding those before.

    Nothing is between the tokens of a row, so windows and biases by distance hold, too. lengths: tokens of each row. A
    row may be several in `cache`, as of an ensemble's members: then all rows come once for each. Keys and values are
    held in full, also of layers that look back over a window alone: what they do not look at is masked.
    """

    lengths: list[int]
    cache: DynamicCache = field(default_factory=_nothing)

    @property
    def width(self) -> int:
        """Slots of a row."""
        return max(self.lengths, default=0)

    @property
    def slot(self) -> int:
        """Bytes of one slot of one row in all layers; 0 before anything is read."""
        slots = self.width * len(self.lengths)
        held = (x.nbytes for layer in self.cache.layers for x in (layer.keys, layer.values))
        return sum(held) // slots if slots else 0

    def take(self, rows: Sequence[int]) -> Rows:
        """A copy of some rows; one may come several times."""
        taken = Rows(self.lengths)
        taken.cache.layers = [copy(layer) for layer in self.cache.layers]
        taken.keep(rows)
        return taken

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all other rows, and slots that are padding in each."""
        lengths = [self.lengths[row] for row in rows]
        cut, count = self.width - max(lengths, default=0), len(self.lengths)

        def kept(x: Tensor) -> Tensor:
            index = torch.tensor(rows, device=x.device)
            return x[..., cut:, :].unflatten(0, (-1, count)).index_select(1, index).flatten(0, 1)

        self._change(kept)
        self.lengths = lengths

    def join(self, others: Rows) -> None:
        """Move the rows of another batch of the same model below these."""
        if not self.lengths:
            self.lengths, self.cache = others.lengths, others.cache
            return
        width = max(self.width, others.width)

        def filled(x: Tensor, rows: Rows) -> Tensor:
            wide = pad(x, (0, 0, width - rows.width, 0))
            return wide.unflatten(0, (-1, len(rows.lengths)))

        for layer, other in zip(self.cache.layers, others.cache.layers, strict=True):
            for name in ("keys", "values"):
                parts = filled(getattr(layer, name), self), filled(getattr(other, name), others)
                setattr(layer, name, torch.cat(parts, 1).flatten(0, 1))
                setattr(other, name, None)  # so that nothing is held twice
        self.lengths = self.lengths + others.lengths

    def align(self, added: Sequence[int], read: int) -> None:
        """Count `read` slots more to each row, of which the first `added` are tokens and the others padding."""
        before, old = self.width, self.lengths
        self.lengths = [length + more for length, more in zip(old, added, strict=True)]
        if min(added) == read:
            return
        # of each row, the slot that comes to be its first; those before the start are padding, whatever is in them
        first = [before + more - self.width for more in added]

        def moved(x: Tensor) -> Tensor:
            start = torch.tensor(first, device=x.device)[:, None]
            index = (start + torch.arange(self.width, device=x.device)).clamp_min(0)
            index = index.repeat(len(x) // len(first), 1)[:, None, :, None]
            return x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[3]))

        self._change(moved)

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        for layer in self.cache.layers:
            layer.keys, layer.values = change(layer.keys), change(layer.values)


class Reader:
    """Has a model read tokens after what it has read. pad: a token that stands for none."""

    def __init__(self, model: Any, pad_token: int):
        self.model, self.pad = model, pad_token
        given = inspect.signature(model.forward).parameters
        self._positions = "position_ids" in given
        self._keep = "logits_to_keep" in given

    def read(self, rows: Rows, texts: Sequence[Sequence[int]]) -> Rows:
        """The rows, each with its text after what it had; no logits are worth the computing."""
        width = max(map(len, texts))
        if width or not rows.cache.layers:
            self.logits(rows, texts, 1)
            rows.align([len(text) for text in texts], max(1, width))
        return rows

    def logits(self, rows: Rows, texts: Sequence[Sequence[int]], keep: int) -> Tensor:
        """Logits (rows, keep, V) of the last tokens of texts that are padded at their ends to the longest.

        `rows` holds them afterwards as they are; `align` makes rows of them again.
        """
        device, width = device_of(self.model), rows.width
        ids = torch.full((len(texts), max(1, *map(len, texts))), self.pad)
        for index, text in enumerate(texts):
            ids[index, : len(text)] = torch.tensor(text, dtype=torch.long)
        lengths = torch.tensor(rows.lengths)[:, None]
        # what follows a text is never looked at, for attention is causal
        mask = torch.arange(width + ids.shape[1]) >= width - lengths
        more: dict[str, Any] = {"logits_to_keep": keep} if self._keep else {}
        if self._positions:
            more["position_ids"] = (lengths + torch.arange(ids.shape[1])).to(device)
        output = self.model(
            input_ids=ids.to(device),
            attention_mask=mask.long().to(device),
            past_key_values=rows.cache,
            use_cache=True,
            **more,
        )
        return output.logits[:, -keep:]
