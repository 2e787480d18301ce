"""Model Tailor's compensation against the brute-force optimum, and the sign that OBS derives."""

from __future__ import annotations

import torch

from cl_graft import plugins


def module():
    plugins.load("strategy", "model_tailor")
    import sys

    return sys.modules["baselines.model_tailor"]


def problem(rows=64, cols=256):
    g = torch.Generator().manual_seed(0)
    inputs = torch.randn(1024, cols, generator=g) @ (
        torch.randn(cols, cols, generator=g) * 0.2 + torch.eye(cols)
    )
    return torch.randn(rows, cols, generator=g) * 0.01, inputs


def error(delta, patched, inputs):
    return ((inputs @ (delta - patched).T).norm() / (inputs @ delta.T).norm()).item()


def test_subtracting_helps_and_adding_as_released_hurts():
    """The finding of the reference notes: none .742, minus .733, plus 1.234 (another draw, same shape)."""
    tailor = module()
    delta, inputs = problem()
    hessian = inputs.T @ inputs / len(inputs)
    factor = tailor._inverse_factor(hessian, 0.01)
    scores = tailor._scores(delta, delta, factor, 128)
    mask = tailor._top_of_block(scores, 0.1, 128)
    none = error(delta, delta * mask, inputs)
    minus = error(delta, tailor._compensate(delta, mask, factor, -1.0, 128), inputs)
    plus = error(delta, tailor._compensate(delta, mask, factor, +1.0, 128), inputs)
    assert minus < none < plus


def test_with_one_column_removed_the_compensation_is_the_exact_optimum():
    """OBS: returning column 0 and solving the others by least squares is the closed form."""
    tailor = module()
    delta, inputs = problem(rows=5, cols=12)
    hessian = (inputs.T @ inputs / len(inputs)).double()
    mask = torch.ones(5, 12, dtype=torch.bool)
    mask[:, 0] = False
    factor = tailor._inverse_factor(hessian.float(), 1e-9)
    patched = tailor._compensate(delta, mask, factor, -1.0, 128)
    rest = hessian[1:, 1:]
    optimum = delta[:, 1:].double() + delta[:, :1].double() * torch.linalg.solve(
        rest, hessian[1:, 0]
    )
    assert torch.allclose(patched[:, 1:].double(), optimum, atol=1e-5)
    assert torch.equal(patched[:, 0], torch.zeros(5))


def test_blocked_compensation_equals_the_column_by_column_one():
    tailor = module()
    delta, inputs = problem(rows=6, cols=40)
    factor = tailor._inverse_factor(inputs.T @ inputs / len(inputs), 0.01)
    mask = torch.rand(6, 40, generator=torch.Generator().manual_seed(1)) < 0.3
    whole = tailor._compensate(delta, mask, factor, -1.0, 40)
    assert torch.allclose(tailor._compensate(delta, mask, factor, -1.0, 7), whole, atol=1e-6)


def test_the_mask_keeps_the_declared_share_of_every_block():
    tailor = module()
    scores = torch.randn(10, 300, generator=torch.Generator().manual_seed(0))
    mask = tailor._top_of_block(scores, 0.1, 128)
    assert [int(part.sum()) for part in mask.split(128, 1)] == [128, 128, 44]
    block, kept = scores[:, :128], mask[:, :128]
    assert block[kept].min() > block[~kept].max()


def test_scores_are_the_mean_of_two_z_scores():
    tailor = module()
    delta, tuned = torch.tensor([[1.0, -3.0]]), torch.tensor([[2.0, 2.0]])
    factor = torch.diag(torch.tensor([1.0, 0.5]))
    # |D| = 1, 3 and W^2 / U_jj^2 = 4, 16: both z-scores are -1 and +1.
    assert torch.allclose(tailor._scores(delta, tuned, factor, 128), torch.tensor([[-1.0, 1.0]]))
