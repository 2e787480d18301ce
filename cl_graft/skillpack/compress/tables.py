"""Tables and vectors as whole numbers, entry by entry, at the one step of rate.py."""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from cl_graft.skillpack.codecs import CodeLayout, Encoded, Meta, Spec, coded, dense, dense_spec
from cl_graft.skillpack.codecs.entropy import TOP
from cl_graft.skillpack.compress.rate import BIT, Rate, bits_coded, dead_zone, rate_of, rounded

ROW_BYTES = 3.5  # of a row, beside its codes
FINENESS = 24  # of norms and biases, whose share of the loss was below what could be measured


class Table(NamedTuple):
    """A tensor that is coded entry by entry. delta: float32 (rows, n); rows, columns: what a squared unit of an entry
    costs in squared loss is the product of both, float32 (rows,) and (n,)."""

    delta: Tensor
    rows: Tensor
    columns: Tensor


def table_rate(table: Table, layout: CodeLayout) -> Rate:
    """The rate of a table's rows."""
    n = table.delta.shape[1]
    weights = table.columns.sqrt()
    magnitude = torch.cat([(part.abs() * weights).mean(1) for part in table.delta.split(_strip(n))])
    magnitude = (magnitude * table.rows.sqrt()).double().cpu()
    return rate_of(magnitude[None], (n,), magnitude * (2.0 * n) ** 0.5, ROW_BYTES, layout)


def encode_table(table: Table, shape: tuple[int, ...], step: float, layout: CodeLayout) -> Encoded:
    """A table at one step; rows that are not worth their bytes are zeros. shape: of the tensor."""
    steps = (step / table.rows.clamp_min(1e-30).sqrt()).clamp_max(1e30).bfloat16().float()
    columns = table.columns.clamp_min(1e-30).rsqrt().clamp_max(1e15).bfloat16().float()
    codes, own = [], []
    for part, sizes in zip(
        table.delta.split(_strip(len(columns))), steps.split(_strip(len(columns))), strict=True
    ):
        # no finer than a row's codes can say
        least = (part.abs() / columns).amax(1) / TOP
        sizes = sizes.maximum(least).bfloat16().float()
        own.append(sizes)
        x = part / (sizes[:, None] * columns)
        code = rounded(x, dead_zone(x.abs().mean(1))[:, None])
        gain = (x.square() - (x - code).square()).sum(1)
        bits = x.shape[1] * bits_coded(x.abs().mean(1)) + 8 * ROW_BYTES
        code[gain < 2 * BIT * bits] = 0
        codes.append(code.to(torch.int16).cpu())
    whole = torch.cat(codes)
    sizes = columns.cpu() if whole.any() else None
    return coded(whole, torch.cat(own).cpu(), shape, layout, columns=sizes)


def vector_ways(delta: Tensor, layout: CodeLayout) -> tuple[Encoded, Encoded]:
    """A tensor, each row to 1 / FINENESS of its root mean square, and in bfloat16, which a header says less of."""
    rows = delta.float().cpu().reshape(len(delta) if delta.ndim > 1 else 1, -1)
    steps = (rows.square().mean(1).sqrt() / FINENESS).maximum(rows.abs().amax(1) / TOP)
    steps = steps.bfloat16().float().clamp_min(1e-38)
    codes = (rows / steps[:, None]).round_().clamp_(-TOP, TOP).to(torch.int16)
    return coded(codes, steps, tuple(delta.shape), layout), dense(delta)


def vector_specs(shape: tuple[int, ...], layout: CodeLayout) -> tuple[Spec, Spec]:
    """About what `vector_ways` says of a vector, before there is one: a code takes some six bits."""
    size = 4 * -(-prod(shape) * (8 if layout == "fast" else 6) // 32)
    lies: Meta = {"layout": layout, "bytes": size} | ({"top": 99} if layout == "small" else {})
    return ("coded", shape, {"kept": 1, "columns": 0, **lies}), dense_spec(shape)


def _strip(n: int) -> int:
    """Rows that are worked on at a time."""
    return max(1, (1 << 22) // max(1, n))
