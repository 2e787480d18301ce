"""Group quantisation of a matrix: the grid shared by the solver (gptq.py) and the codecs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

BITS = (2, 3, 4, 5, 6, 8)

# Candidate ranges of one group, as shares of the full one, and moves of its zero: at few bits it pays
# to clip, at many a least-squares scale is all that can be gained (measured on low-rank factors).
SHRINKS = {2: (1.0, 0.85, 0.7, 0.6, 0.5), 3: (1.0, 0.85, 0.7), 4: (1.0, 0.9, 0.7, 0.45)}
SHIFTS = {2: (0.0, -1.0, 1.0), 3: (0.0, -1.0, 1.0)}
SCALE_MIN, SCALE_MAX = 2.0**-24, 65504.0  # smallest positive and largest finite float16
AMAX_LOG2 = 11  # `normalised` brings the largest magnitude into [2**10, 2**11)
CHUNK = 1 << 17  # elements of one search step: small enough to stay in a core's cache


@dataclass(frozen=True)
class Quantized:
    """A matrix on a k-bit grid, `g = j // group_size`:

    `x[i, j] ~ scale[i, g] * (codes[i, j] - zero[i, g]) * 2**exponent`.

    codes: uint8 (rows, cols), below `2**bits`, one code a byte (packing is the codec's work).
    scale: float16 (rows, ceil(cols / group_size)), finite.
    zero: uint8, the shape of `scale`, values below `2**bits`.
    exponent: one power of two for the whole matrix, in [-126, 117]; it keeps the scales of small
        weights (deltas) out of float16's subnormal range, where they would lose their precision.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    bits: int
    group_size: int
    exponent: int = 0

    def dequantize(self) -> Tensor:
        """The matrix that the codes stand for, float32 (rows, cols)."""
        group = torch.arange(self.codes.shape[1], device=self.codes.device) // self.group_size
        steps = self.codes.float() - self.zero.float()[:, group]
        return self.scale.float()[:, group] * steps * 2.0**self.exponent


def groups_in(cols: int, group_size: int) -> int:
    """Number of groups that cover `cols` columns; the last may be shorter."""
    return -(-cols // group_size)


def normalised(weight: Tensor) -> tuple[Tensor, int]:
    """`weight` as `(x, exponent)`, x * 2**exponent, x float32, largest magnitude in [2**10, 2**11).

    Nothing is rounded, and how small `weight` is as a whole does not matter: a group's scale is a
    normal float16 while the group's range is above 2e-5 (8 bits; 2e-7 at 2 bits) of the largest
    magnitude in the matrix. Below that its precision fades bit by bit, and some 10 binades lower
    the group becomes zeros. A matrix below 2**-130 altogether fades likewise; one of zeros has
    exponent 0. Raises ValueError where `weight` is not finite in float32.
    """
    x = weight.detach().float()
    amax = float(x.abs().amax())
    if not math.isfinite(amax):
        raise ValueError("the weight holds NaN or infinity; repair the checkpoint it came from.")
    exponent = max(math.frexp(amax)[1] - AMAX_LOG2, -126) if amax else 0
    return x * 2.0**-exponent, exponent


def nearest_codes(x: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Codes of the grid points nearest to `x`, as floats; `scale` (positive), `zero` broadcast."""
    return (x / scale + zero).round_().clamp_(0, 2**bits - 1)


def fit_grid(
    x: Tensor,
    bits: int,
    *,
    symmetric: bool = False,
    search: bool = True,
    importance: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The grid of each row of `x`, float32 (groups, n): `(scale, zero)`, float32 (groups,).

    Scales are positive float16 values, zeros whole numbers in [0, 2**bits), 2**(bits-1) when
    `symmetric`: what is returned can be stored as it is. Without `search` the grid spans the
    group's minimum, maximum and 0. With it, the range is shrunk step by step, the zero moved by
    one, and the winner's scale refitted by least squares; the grid of least squared error, each
    entry's weighted by `importance` (n,), is kept.
    """
    top = 2**bits - 1
    low, high = x.amin(1).clamp_(max=0), x.amax(1).clamp_(min=0)
    if symmetric:
        scale = torch.maximum(-low, high) * 2 / top
        zero = torch.full_like(scale, 2 ** (bits - 1))
    else:
        scale = (high - low) / top
        zero = (-low / scale.clamp(min=SCALE_MIN)).round_().clamp_(0, top)
    if not search:
        return _storable(scale), zero
    importance = x.new_ones(x.shape[1]) if importance is None else importance
    shrinks = x.new_tensor(SHRINKS.get(bits, (1.0,)))
    shifts = x.new_tensor((0.0,) if symmetric else SHIFTS.get(bits, (0.0,)))
    scales = _storable(shrinks[:, None] * scale).repeat(len(shifts), 1)
    zeros = (zero + shifts.repeat_interleave(len(shrinks))[:, None]).clamp_(0, top)
    room = CHUNK if x.device.type == "cpu" else 128 * CHUNK
    size = max(1, room // (len(scales) * x.shape[1]))
    best = []
    for start in range(0, len(x), size):
        part = slice(start, start + size)
        best.append(_best_grid(x[part], scales[:, part], zeros[:, part], bits, importance))
    return torch.cat([s for s, _ in best]), torch.cat([z for _, z in best])


def round_to_nearest(
    weight: Tensor,
    bits: int,
    group_size: int = 64,
    *,
    symmetric: bool = False,
    search: bool = True,
    importance: Tensor | None = None,
) -> Quantized:
    """`weight` (rows, cols), any float dtype, each entry on the nearest point of its group's grid.

    Groups run along the columns; for groups down the rows pass the transpose. `importance` (cols,),
    positive, weights the search of `fit_grid`. Raises ValueError for non-finite or empty weights.
    """
    check(weight, bits, group_size)
    x, exponent = normalised(weight)
    codes, scales, zeros = [], [], []
    for start in range(0, x.shape[1], group_size):
        group = slice(start, start + group_size)
        part = x[:, group].contiguous()
        weights = None if importance is None else importance[group].float()
        scale, zero = fit_grid(part, bits, symmetric=symmetric, search=search, importance=weights)
        codes.append(nearest_codes(part, scale[:, None], zero[:, None], bits).byte())
        scales.append(scale.half())
        zeros.append(zero.byte())
    scale, zero = torch.stack(scales, 1), torch.stack(zeros, 1)
    return Quantized(torch.cat(codes, 1), scale, zero, bits, group_size, exponent)


def check(weight: Tensor, bits: int, group_size: int) -> None:
    """Raise ValueError unless the arguments make sense together."""
    if weight.ndim != 2 or not weight.numel():
        shape = tuple(weight.shape)
        raise ValueError(f"the weight has shape {shape}; pass a matrix that is not empty.")
    if bits not in BITS:
        raise ValueError(f"bits is {bits}; choose one of {', '.join(map(str, BITS))}.")
    if group_size < 1:
        raise ValueError(f"group_size is {group_size}; pass 1 or more (the columns for one group).")


def _storable(scale: Tensor) -> Tensor:
    """`scale` rounded to a positive, finite float16, as float32."""
    return scale.half().float().clamp_(SCALE_MIN, SCALE_MAX)


def _best_grid(
    x: Tensor, scales: Tensor, zeros: Tensor, bits: int, importance: Tensor
) -> tuple[Tensor, Tensor]:
    """The best candidate (of `scales`, `zeros` (candidates, groups)), its scale then refitted."""

    def cost(scale: Tensor, zero: Tensor) -> Tensor:
        """Weighted squared error; x (groups, n), grids (..., groups)."""
        exact = x / scale[..., None]
        exact += zero[..., None]
        miss = exact.round().clamp_(0, 2**bits - 1).sub_(exact)
        return miss.square_() @ importance * scale.square()

    if len(scales) == 1:
        scale, zero = scales[0], zeros[0]
    else:
        costs = cost(scales, zeros)
        choice = costs.argmin(0, keepdim=True)
        scale, zero, least = (t.gather(0, choice)[0] for t in (scales, zeros, costs))
    steps = nearest_codes(x, scale[:, None], zero[:, None], bits) - zero[:, None]
    fitted = (x * steps) @ importance / (steps.square() @ importance)  # NaN where all steps are 0
    fitted = _storable(torch.where(fitted > 0, fitted, scale))
    if len(scales) == 1:  # at many bits: better but for the rounding of the scale
        return fitted, zero
    return torch.where(cost(fitted, zero) < least, fitted, scale), zero
