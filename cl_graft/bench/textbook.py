"""The paper's scheme as a textbook would write it: what the engine's figures are measured against.

Plain SVD of each delta, a fixed split of the ranks between 8, 4 and 2 bits, column-by-column GPTQ with
min-max groups, the right factor under the second moment of the layer's inputs, then the left factor under
that of what it reads; one calibration forward per sample and bit group (GraftLLM, arXiv 2505.18502, whose
released code is Delta-CoMe's: 20/180/800 of 1000 ranks at 8/4/2 bits, groups of 128, act-order, damping
0.01). Nothing here is used by the engine.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

SPLIT = {8: 0.02, 4: 0.18, 2: 0.80}  # bits -> share of the ranks
GROUP, DAMPING = 128, 0.01


def ranks_within(shape: tuple[int, int], budget: float, group: int = GROUP) -> dict[int, int]:
    """{bits: ranks} of the largest fixed split whose codes, scales and zeros take at most `budget` bytes."""
    best: dict[int, int] = {}
    for rank in range(1, min(shape) + 1):
        counts = {8: max(1, round(SPLIT[8] * rank)), 4: round(SPLIT[4] * rank)}
        counts[2] = rank - sum(counts.values())
        if (
            counts[2] < 0
            or sum(stored(shape, k, bits, group) for bits, k in counts.items()) > budget
        ):
            return best
        best = {bits: k for bits, k in counts.items() if k}
    return best


def stored(shape: tuple[int, int], rank: int, bits: int, group: int = GROUP) -> float:
    """Bytes of `rank` ranks of a delta (out, in): right factor grouped along in, left factor along ranks."""
    rows, cols = shape
    groups = rank * -(-cols // group) + rows * -(-rank // group)
    return (bits * rank * (rows + cols) + (16 + bits) * groups) / 8


def calibrate(
    layer: nn.Module, samples: Sequence[Tensor], names: list[str], passes: int
) -> dict[str, Tensor]:
    """H = X^T X / n of each named linear layer's inputs, one forward a sample, one sum a matrix.

    samples: (1, tokens, width) each. passes: as the released code does, everything anew for each bit group.
    Returns {name: float32 (in, in)}.
    """
    for _ in range(passes):
        sums = _calibrate(layer, samples, names)
    return sums


def _calibrate(layer: nn.Module, samples: Sequence[Tensor], names: list[str]) -> dict[str, Tensor]:
    sums: dict[str, Tensor] = {}
    counted = 0

    def hook_for(name: str):
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x = inputs[0].reshape(-1, inputs[0].shape[-1]).float()
            sums[name] = sums.get(name, 0) + x.T @ x

        return hook

    modules = dict(layer.named_modules())
    hooks = [modules[name].register_forward_hook(hook_for(name)) for name in names]
    with torch.no_grad():
        for sample in samples:
            layer(sample)
            counted += sample.shape[0] * sample.shape[1]
    for hook in hooks:
        hook.remove()
    return {name: total / counted for name, total in sums.items()}


def compress(delta: Tensor, hessian: Tensor, counts: dict[int, int]) -> Tensor:
    """The decoded approximation, float32 (out, in), of a delta (out, in) under H (in, in)."""
    left, values, right = torch.linalg.svd(delta.float(), full_matrices=False)
    result, first = torch.zeros_like(delta, dtype=torch.float32), 0
    for bits, count in counts.items():
        ranks = slice(first, first + count)
        stored_right = gptq(right[ranks], hessian, bits)
        scaled = values[ranks, None] * stored_right
        stored_left = gptq(left[:, ranks], scaled @ hessian @ scaled.T, bits)
        result += stored_left @ scaled
        first += count
    return result


def gptq(weight: Tensor, hessian: Tensor, bits: int) -> Tensor:
    """GPTQ (Frantar et al. 2023, algorithm 1, no lazy batches), act-order, asymmetric min-max groups.

    weight: (rows, cols); hessian: (cols, cols). Returns the dequantised weight.
    """
    order = hessian.diagonal().argsort(descending=True)
    weight, hessian = weight[:, order].clone(), hessian[order][:, order]
    size = len(hessian)
    damped = hessian + DAMPING * hessian.diagonal().mean() * torch.eye(size)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    upper = torch.linalg.cholesky(inverse, upper=True)
    result, top = torch.zeros_like(weight), 2**bits - 1
    for j in range(size):
        if j % GROUP == 0:
            group = weight[:, j : j + GROUP]
            low = group.amin(1, keepdim=True).clamp(max=0)
            high = group.amax(1, keepdim=True).clamp(min=0)
            scale = ((high - low) / top).clamp(min=1e-12)
            zero = (-low / scale).round()
        column = weight[:, j : j + 1]
        result[:, j : j + 1] = scale * (((column / scale).round() + zero).clamp(0, top) - zero)
        error = (column - result[:, j : j + 1]) / upper[j, j]
        weight[:, j:] -= error * upper[j : j + 1, j:]
    return result[:, order.argsort()]
