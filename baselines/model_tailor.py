"""Model Tailor: keep the few weights that matter, compensate for the rest (Zhu et al. 2024, arXiv 2402.12048).

In every linear layer the entries with the best mean of salience and sensitivity keep their fine-tuned
value; all others return to where training started, and what that costs the layer's output is made good
in the entries still kept, by the optimal brain surgeon. Everything that is not a linear layer returns.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from cl_graft.budget import largest_within
from cl_graft.ranges import Count, Part, Positive
from cl_graft.skillpack.codecs import sparse
from cl_graft.skillpack.compress.calibrate import linear_layers, stored_transposed
from cl_graft.strategy import compressor


@compressor(keeps={"each": "per_task", "summed": "sum"}, touches=("attention", "mlp", "other"))
def model_tailor(
    delta,
    context,
    *,
    convention: Literal["each", "summed"] = "summed",
    density: Part = 0.1,
    damping: Positive = 0.01,
    block: Count = 128,
    calibration_batches: Count = 8,
    released_sign: bool = False,
):
    """convention: `summed` tunes every task from the model so far, and all patches together are one model; `each` tunes
    it from the base, and a task's own patch answers for it, as in the released script, which knows one task.
    density: share of entries kept (the paper's top 10 %), or fewer where the budget holds fewer.
    released_sign: add the correction as the released code does, where OBS subtracts it (SparseGPT; measured to
    double the output error).
    """
    moments = context.moments(calibration_batches, gradients=False)
    head = context.model.get_output_embeddings()
    names = [f"{n}.weight" for n, m in linear_layers(context.model).items() if m is not head]
    transposed = stored_transposed(context.model)

    def oriented(name: str, x: Tensor) -> Tensor:
        return x.T if name in transposed else x

    factors = {n: _inverse_factor(moments.hessian(n), damping) for n in names}
    scores = {
        n: _scores(
            oriented(n, delta[n]),
            oriented(n, context.start[n].float() + delta[n]),
            factors[n],
            block,
        )
        for n in names
    }

    def masks(per_block: int) -> dict[str, Tensor]:
        """Top `per_block` entries of 10,000 in every block of every row group."""
        return {n: _top_of_block(s, per_block / 10_000, block) for n, s in scores.items()}

    def cost(per_block: int) -> int:
        kept = {n: sparse(oriented(n, delta[n]), m) for n, m in masks(per_block).items() if m.any()}
        return context.cost(kept)

    most = round(density * 10_000)
    chosen = largest_within(context.budget, cost, most, "one entry in 10,000 of each layer")
    sign = 1.0 if released_sign else -1.0
    encoded = {}
    for name, mask in masks(chosen).items():
        patched = _compensate(oriented(name, delta[name]), mask, factors[name], sign, block)
        encoded[name] = sparse(
            oriented(name, patched).contiguous(), oriented(name, mask).contiguous()
        )
    return {n: e for n, e in encoded.items() if e.meta["kept"]}


def _inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """Upper Cholesky factor U of the damped inverse Hessian, H^-1 = U^T U; dead inputs count as damping alone."""
    size = len(hessian)
    mean = hessian.diagonal().mean().clamp_min(1e-12)
    damped = hessian.double() + damping * mean * torch.eye(size, device=hessian.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True).float()


def _scores(delta: Tensor, tuned: Tensor, factor: Tensor, block: int) -> Tensor:
    """Mean of the z-scores, per row inside each block of columns, of |D| and W^2 / U_jj^2 (paper, eqs. 3-5)."""
    salience, sensitivity = delta.abs(), (tuned / factor.diagonal()) ** 2
    parts = []
    for s, t in zip(salience.split(block, 1), sensitivity.split(block, 1), strict=True):
        parts.append(0.5 * _standardised(s) + 0.5 * _standardised(t))
    return torch.cat(parts, 1)


def _standardised(x: Tensor) -> Tensor:
    spread = x.std(1, keepdim=True, unbiased=False).clamp_min(1e-12)
    return (x - x.mean(1, keepdim=True)) / spread


def _top_of_block(scores: Tensor, density: float, block: int) -> Tensor:
    masks = []
    for part in scores.split(block, 1):
        count = int(density * part.numel())
        mask = torch.zeros(part.numel(), dtype=torch.bool, device=part.device)
        mask[part.flatten().argsort(descending=True, stable=True)[:count]] = True
        masks.append(mask.view_as(part))
    return torch.cat(masks, 1)


def _compensate(delta: Tensor, mask: Tensor, factor: Tensor, sign: float, block: int) -> Tensor:
    """The delta with unkept entries zero and their effect on the output moved onto later kept ones.

    Columns left to right: e_j = (w_j - q_j) / U_jj, w_k += sign * e_j * U_jk for k > j. In terms of the
    delta q is 0 where an entry returns, since the starting weight cancels.
    """
    work, result = delta.clone(), torch.zeros_like(delta)
    for first in range(0, delta.shape[1], block):
        last = min(first + block, delta.shape[1])
        errors = torch.zeros_like(work[:, first:last])
        for j in range(first, last):
            result[:, j] = torch.where(mask[:, j], work[:, j], 0.0)
            error = (work[:, j] - result[:, j]) / factor[j, j]
            work[:, j + 1 : last] += sign * error[:, None] * factor[j, j + 1 : last]
            errors[:, j - first] = error
        work[:, last:] += sign * errors @ factor[first:last, last:]
    return result
