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

# a model and a padded batch by name, to what the model's fused head gives
Lay = Callable[..., Any]


class Flat(NamedTuple):
    """A batch as one row of T tokens.

    inputs: what the model is called with. labels: int64 (1, T), -100 where a text begins. places: int64 (labels,),
    which tokens of the row predict one. mask: bool (batch, length), the places of the tokens in the batch.
    """

    inputs: dict[str, Any]
    labels: Tensor
    places: Tensor
    mask: Tensor

    def spread(self, values: Tensor) -> Tensor:
        """Values (1, T - 1) of the places of the row as (batch, length - 1), zero elsewhere."""
        whole = functional.pad(values[0], (0, 1))
        return values.new_zeros(self.mask.shape).masked_scatter(self.mask, whole)[:, :-1]


def flat(input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Flat:
    """Lay out a batch, each int64 (batch, length), its padding on the right."""
    mask = attention_mask.bool()
    starts = functional.pad(mask.sum(1).cumsum(0), (1, 0)).int()
    row = functional.pad(labels[:, 1:], (1, 0), value=-100)[mask][None]
    places = (row[0, 1:] != -100).nonzero()[:, 0]
    where = (mask.cumsum(1) - 1)[mask][None]
    return Flat(_inputs(input_ids[mask][None], where, starts, mask.shape[1]), row, places, mask)


def _inputs(row: Tensor, where: Tensor, starts: Tensor, longest: int) -> dict[str, Any]:
    """What a model is called with, by the names that transformers' flash attention has."""
    return {
        "input_ids": row,
        "position_ids": where,
        "cu_seq_lens_q": starts,
        "cu_seq_lens_k": starts,
        "max_length_q": longest,
        "max_length_k": longest,
        "use_cache": False,
    }


def blank(texts: int, longest: int, tokens: int, labels: int) -> Flat:
    """The shapes of a row of so many tokens and labels, made of so many texts; its numbers mean nothing."""
    row = torch.zeros(1, tokens, dtype=torch.long)
    starts = torch.zeros(texts + 1, dtype=torch.int)
    places = torch.zeros(labels, dtype=torch.long)
    mask = torch.ones(texts, longest, dtype=torch.bool)
    return Flat(_inputs(row, row, starts, longest), row, places, mask)


@contextmanager
def under_way() -> Iterator[None]:
    """Say, while a model is called with a flat row, that its layers are given no mask."""
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


def attend_flat(config: Any) -> None:
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
    device, config = parameter.device, inner_of(model).config
    modes = [(module, module.training) for module in model.modules()]
    before, size = config._attn_implementation, config.vocab_size
    texts = [[(7 * n + 3 * i + 1) % size for i in range(n)] for n in (5, 2, 4)]
    rows = [torch.tensor(text, device=device) for text in texts]
    ids = pad_sequence(rows, batch_first=True)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    model.eval()
    try:
        alone = torch.cat([model(input_ids=row[None], use_cache=False).logits[0] for row in rows])
        attend_flat(config)
        with under_way():
            together = model(**flat(ids, mask, ids).inputs).logits[0]
    except Exception:  # a model's own code says in any way that it takes no such row
        return False
    finally:
        config._attn_implementation = before
        for module, training in modes:
            module.training = training
    near = 1e-4 if parameter.dtype == torch.float32 else 0.03
    return bool((alone - together).abs().max() <= near * alone.abs().max())


def layer(model: Any) -> Lay:
    """What `forward` is for a model that reads flat rows, whose attention is made to take them."""
    attend_flat(inner_of(model).config)
    return partial(forward, most(model, next(model.parameters()).is_cuda))


def most(model: Any, on_gpu: bool) -> int:
    """Labels up to which the model's own head is run, at their places alone; -1 where its code cannot."""
    inner = inner_of(model)
    takes_places = "logits_to_keep" in signature(type(inner).forward).parameters
    return (FEW if on_gpu else MANY) // inner.config.vocab_size if takes_places else -1


def forward(
    few: int, model: Any, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, **given: Any
) -> Any:
    """What a model with TRL's fused head gives of a padded batch, computed of a flat row.

    few: labels up to which the model's own head is run, at their places alone; above, TRL's runs in tiles.
    """
    return called(few, model, flat(input_ids, attention_mask, labels), **given)


def called(few: int, model: Any, laid: Flat, **given: Any) -> Any:
    """`forward` of a batch that is laid out."""
    from trl.trainer.utils import FusedCausalLMOutput

    inputs = {**given, **laid.inputs}
    with under_way():
        if len(laid.places) > few:
            output = model(**inputs, labels=laid.labels)
            fields = {name: output[name] for name in FIELDS if output.get(name) is not None}
        else:
            del inputs["fused_lm_head"]
            output = model(**inputs, logits_to_keep=laid.places)
            known = scored(output.logits[0], laid.labels[0, laid.places + 1])
            row = laid.labels[:, 1:] != -100
            fields = {n: x.new_zeros(row.shape).masked_scatter(row, x) for n, x in known.items()}
            fields["label_mask"] = row
    aux_loss = getattr(output, "aux_loss", None)
    return FusedCausalLMOutput(
        **{name: laid.spread(values) for name, values in fields.items()}, aux_loss=aux_loss
    )
