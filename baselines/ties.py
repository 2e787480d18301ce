"""TIES-merging: trim, elect a sign, average what agrees (Yadav et al. 2023, arXiv 2306.01708)."""

import torch

from cl_graft.strategy import merger


@merger
def ties(deltas, *, density: float = 0.2, scale: float = 1.0):
    """density: share of each task's entries kept by magnitude, over all tensors. scale: factor on the result."""
    names, shapes = list(deltas[0]), [deltas[0][name].shape for name in deltas[0]]
    flat = torch.stack([torch.cat([delta[name].flatten() for name in names]) for delta in deltas])
    keep = max(1, int(density * flat.shape[1]))
    threshold = flat.abs().topk(keep, dim=1).values[:, -1:]
    trimmed = torch.where(flat.abs() >= threshold, flat, 0.0)
    agrees = (trimmed * trimmed.sum(0).sign()) > 0
    merged = (trimmed * agrees).sum(0) / agrees.sum(0).clamp_min(1)
    parts = (scale * merged).split([shape.numel() for shape in shapes])
    return {name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
