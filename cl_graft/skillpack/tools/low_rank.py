"""The best approximations of a matrix, or of a product, by one of lower rank (Eckart and Young 1936)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

Factors = tuple[Tensor, Tensor]  # float32: left (out, r), right (r, in)
COLUMNS = 4096  # of a delta that are widened to float64 at a time


def best_factors(delta: Tensor, rank: int) -> Factors:
    """The best approximation of a rank, as (left, right); delta: (out, in).

    The singular vectors of the shorter side are eigenvectors of its Gram matrix (float64); delta is
    projected on them, which keeps full precision in the product whatever theirs is.
    """
    if delta.shape[0] > delta.shape[1]:
        right, left = best_factors(delta.T, rank)
        return left.T, right.T
    parts = delta.split(COLUMNS, dim=1)
    gram = torch.zeros(delta.shape[0], delta.shape[0], dtype=torch.float64)
    for part in parts:
        gram += part.double() @ part.double().T
    vectors = torch.linalg.eigh(gram).eigenvectors[:, -rank:]
    right = torch.cat([(vectors.T @ part.double()).float() for part in parts], dim=1)
    return vectors.float(), right


def cut(left: Tensor, right: Tensor, rank: int) -> Factors:
    """The best approximation of a product by a lower rank, without forming the product."""
    q, r = torch.linalg.qr(left.double())
    p, s = torch.linalg.qr(right.double().T)
    u, values, v = torch.linalg.svd(r @ s.T, full_matrices=False)
    u, values, v = u[:, :rank], values[:rank], v[:rank]
    return (q @ (u * values)).float(), (v @ p.T).float()


def padded(left: Tensor, right: Tensor, rank: int) -> Factors:
    """Pad factors with zero ranks up to `rank`: an adapter has at least one, a delta may have none."""
    lack = rank - left.shape[1]
    if lack <= 0:
        return left, right
    return nn.functional.pad(left, (0, lack)), nn.functional.pad(right, (0, 0, 0, lack))
