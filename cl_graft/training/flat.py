"""The texts of a micro-batch laid end to end as one row, without padding; attention alone keeps them apart.

What a model computes of a token by itself (most of it) is then computed for no padding. Attention comes from flash
attention's kernels where the model has them, which take such rows; else from SDPA over the texts side by side, padded
for it alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from cl_graft.training.loss import FEW, MANY, scored

NAME = "cl_graft_flat"  # of the attention below, as a configuration has it
KERNELS = ("flash_attention_2", NAME)
FIELDS = ("log_probs", "entropy", "mean_logits", "is_top1", "label_mask")
UNDER_WAY: ContextVar[bool] = ContextVar("a flat row is under way", default=False)


Lay = Callable[..., Any]  # a model and a padded batch by name, to what its fused head gives


class Flat(NamedTuple):
    """A batch as one row of T tokens.

    inputs: what the model is called with. labels: (1, T), -100 where a text begins. mask: bool (batch, length), the
    places of the tokens in the batch.
    """

    inputs: dict[str, Any]
    labels: Tensor
    mask: Tensor

    @property
    def places(self) -> Tensor:
        """Which tokens of the row predict a label, int64 (labels,)."""
        return (self.labels[0, 1:] != -100).nonzero()[:, 0]

    def spread(self, values: Tensor) -> Tensor:
        """Values (1, T - 1) of the places of the row as (batch, length - 1), zero elsewhere."""
        whole = functional.pad(values[0], (0, 1))
        return values.new_zeros(self.mask.shape).masked_scatter(self.mask, whole)[:, :-1]


def flat(input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Flat:
    """Lay out a batch, each int64 (batch, length), its padding on the right."""
    mask = attention_mask.bool()
    lengths = mask.sum(1)
    starts = functional.pad(lengths.cumsum(0), (1, 0)).int()
    inputs: dict[str, Any] = {
        "input_ids": input_ids[mask][None],
        "position_ids": (mask.cumsum(1) - 1)[mask][None],
        "use_cache": False,
    }
    inputs["cu_seq_lens_q"] = inputs["cu_seq_lens_k"] = starts
    inputs["max_length_q"] = inputs["max_length_k"] = mask.shape[1]
    shifted = functional.pad(labels[:, 1:], (1, 0), value=-100)
    return Flat(inputs, shifted[mask][None], mask)


@contextmanager
def under_way() -> Iterator[None]:
    """While a model is called with a flat row, its layers are given no mask."""
    token = UNDER_WAY.set(True)
    try:
        yield
    finally:
        UNDER_WAY.reset(token)


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **given: Any
) -> tuple[Tensor, None]:
    """Attention as transformers asks for it, (1, heads, T, width) to (1, T, heads, width); SDPA for other rows."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    starts = given.pop("cu_seq_lens_q", None)
    if starts is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **given)
    longest, tokens = given["max_length_q"], query.shape[2]
    texts = len(starts) - 1
    numbers = torch.arange(texts, device=starts.device)
    text = torch.repeat_interleave(numbers, starts.diff(), output_size=tokens)
    place = torch.arange(tokens, device=starts.device) - starts[text] + text * longest

    def padded(x: Tensor) -> Tensor:
        x = x[0].transpose(0, 1)
        side = x.new_zeros(texts * longest, *x.shape[1:]).index_copy(0, place, x)
        return side.view(texts, longest, *x.shape[1:]).transpose(1, 2)

    # no text sees its padding, which comes after it
    window = given.pop("sliding_window", None)
    mask = _window(window, longest, query.device) if window and window < longest else None
    sides = padded(query), padded(key), padded(value)
    out, _ = sdpa_attention_forward(module, *sides, mask, **given)
    return out.flatten(0, 1)[place][None], None


def _window(size: int, longest: int, device: Any) -> Tensor:
    """Which place sees which, bool (1, 1, length, length): itself and those before it, `size` in all."""
    ones = torch.ones(longest, longest, dtype=torch.bool, device=device)
    return ones.tril().triu(1 - size)[None, None]


def _mask(*places: Any, **given: Any) -> Any:
    from transformers.masking_utils import sdpa_mask

    return None if UNDER_WAY.get() else sdpa_mask(*places, **given)


def flattens(model: Any) -> bool:
    """Whether the model reads a flat row as it reads its texts alone: by what its code says, and by trying it.

    A model without weights, on the meta device, is not tried.
    """
    inner = inner_of(model)
    config, kind = inner.config, type(inner)
    layers = set(getattr(config, "layer_types", None) or ())
    if (
        config.get_text_config() is not config
        or config._attn_implementation not in ("sdpa", *KERNELS)
        or not kind._supports_flash_attn
        or kind._is_stateful
        or not layers <= {"full_attention", "sliding_attention"}
    ):
        return False
    if any(p.is_meta for p in inner.parameters()) or config._attn_implementation == KERNELS[0]:
        return True
    return _tried(model)


def inner_of(model: Any) -> Any:
    """The model that PEFT wraps, or the model."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def _attend_flat(config: Any) -> None:
    """Give a model without flash attention the one above."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, _mask)
    if config._attn_implementation not in KERNELS:
        config._attn_implementation = NAME


@torch.no_grad()
def _tried(model: Any) -> bool:
    """Whether logits of three short texts are the same in a flat row as alone."""
    parameter = next(model.parameters())
    device, training, config = parameter.device, model.training, inner_of(model).config
    before, size = config._attn_implementation, config.vocab_size
    texts = [[(7 * n + 3 * i + 1) % size for i in range(n)] for n in (5, 2, 4)]
    rows = [torch.tensor(text, device=device) for text in texts]
    ids = pad_sequence(rows, batch_first=True)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    model.eval()
    try:
        alone = torch.cat([model(input_ids=row[None], use_cache=False).logits[0] for row in rows])
        _attend_flat(config)
        with under_way():
            together = model(**flat(ids, mask, ids).inputs).logits[0]
    except Exception:  # a model's own code says in any way that it takes no such row
        return False
    finally:
        config._attn_implementation = before
        model.train(training)
    near = 1e-4 if parameter.dtype == torch.float32 else 0.03
    return bool((alone - together).abs().max() <= near * alone.abs().max())


def layer(model: Any) -> Lay:
    """What `forward` is for a model that reads flat rows, whose attention is made to take them."""
    inner = inner_of(model)
    _attend_flat(inner.config)
    most = FEW if next(model.parameters()).is_cuda else MANY
    takes_places = "logits_to_keep" in signature(type(inner).forward).parameters
    return partial(forward, most // inner.config.vocab_size if takes_places else -1)


def forward(
    most: int, model: Any, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, **given: Any
) -> Any:
    """What a model with TRL's fused head gives of a padded batch, computed of a flat row.

    most: labels up to which the model's own head is run, at their places alone; above, TRL's runs in tiles.
    """
    from trl.trainer.utils import FusedCausalLMOutput

    laid = flat(input_ids, attention_mask, labels)
    inputs, places = {**given, **laid.inputs}, laid.places
    with under_way():
        if len(places) > most:
            output = model(**inputs, labels=laid.labels)
            fields = {name: output[name] for name in FIELDS if output.get(name) is not None}
        else:
            del inputs["fused_lm_head"]
            output = model(**inputs, logits_to_keep=places)
            known = scored(output.logits[0], laid.labels[0, places + 1])
            row = laid.labels[:, 1:] != -100
            fields = {n: x.new_zeros(row.shape).masked_scatter(row, x) for n, x in known.items()}
            fields["label_mask"] = row
    aux_loss = getattr(output, "aux_loss", None)
    return FusedCausalLMOutput(
        **{name: laid.spread(values) for name, values in fields.items()}, aux_loss=aux_loss
    )
