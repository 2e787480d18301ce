"""The singular vectors of a delta, for methods that treat them one by one."""

from __future__ import annotations

import torch
from torch import Tensor

from cl_graft.skillpack.compress.factorise import Spectrum


def singular(delta: Tensor, spectrum: Spectrum, first: int) -> tuple[Tensor, Tensor]:
    """U (out, first) and S V^T (first, in) of the leading singular values, float32.

    delta: float32 (out, in). spectrum: that of its plain SVD.
    """
    left, right = spectrum.left(delta, None, first), spectrum.right(delta, first)
    if spectrum.wide:
        return left, right
    sizes = left.norm(dim=0)
    return left / torch.where(sizes > 0, sizes, 1.0), sizes[:, None] * right
