"""Directions and quantised factors: properties, a hand-worked case, and what a refit gains."""

from __future__ import annotations

import pytest
import torch

from cl_graft.skillpack.codecs import decode, payload_bytes
from cl_graft.skillpack.compress.factorise import (
    Factored,
    _falling,
    damped,
    encode,
    rank_for_energy,
    spec_of,
    spectrum,
)


def problem(rows=48, cols=64, seed=0, samples=512):
    """A delta with a falling spectrum and inputs that are strongly correlated."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(cols, cols, generator=g) * torch.logspace(0, -1.5, cols)
    inputs = torch.randn(samples, cols, generator=g) @ mix
    left = torch.randn(rows, rows, generator=g) * torch.logspace(0, -2, rows)
    delta = left @ torch.randn(rows, cols, generator=g) * 1e-3
    return delta, inputs


def output_error(delta, approximation, inputs):
    return ((inputs @ (delta - approximation).T).norm() / (inputs @ delta.T).norm()).item()


def moment(inputs):
    return inputs.T @ inputs / len(inputs)


def cut(found, delta, hessian, rank):
    return found.left(delta, hessian, rank) @ found.right(delta, rank)


@pytest.mark.parametrize(("rows", "cols"), [(48, 64), (64, 48)])  # each side's Gram matrix
@pytest.mark.parametrize("aware", [True, False])
def test_the_spectrum_is_the_svd(rows, cols, aware):
    """Energies, and every truncation, are those of the SVD of D L (or D) in float64."""
    delta, inputs = problem(rows, cols)
    hessian = damped(moment(inputs), 1e-2) if aware else None
    root = torch.linalg.cholesky(hessian.double()) if aware else torch.eye(cols).double()
    left, values, right = torch.linalg.svd(delta.double() @ root, full_matrices=False)
    found = spectrum(delta, hessian)
    assert torch.allclose(found.energy, values**2, rtol=1e-3, atol=1e-5 * values[0].item() ** 2)
    for rank in (1, 5, 20):
        exact = (left[:, :rank] * values[:rank]) @ right[:rank] @ torch.linalg.inv(root)
        difference = cut(found, delta, hessian, rank) - exact.float()
        assert (difference @ root.float()).norm() < 1e-3 * values.norm()


def test_energy_of_the_ranks_is_the_output_error_of_dropping_them():
    delta, inputs = problem()
    hessian = damped(moment(inputs), 1e-6)
    found = spectrum(delta, hessian)
    for rank in (1, 5, 20):
        left_out = delta - cut(found, delta, hessian, rank)
        lost = (inputs @ left_out.T).square().sum() / len(inputs)
        assert lost.item() == pytest.approx(found.energy[rank:].sum().item(), rel=1e-2)


def test_activation_aware_truncation_is_never_worse_on_the_output_than_the_plain_svd():
    delta, inputs = problem()
    hessian = damped(moment(inputs), 1e-6)
    for rank in (2, 8, 24):
        errors = [
            output_error(delta, cut(spectrum(delta, h), delta, h, rank), inputs)
            for h in (hessian, None)
        ]
        assert errors[0] <= errors[1]


@pytest.mark.parametrize(
    ("share", "rank"), [(0.5, 1), (0.8, 1), (0.81, 2), (0.95, 2), (0.96, 3), (1.0, 3)]
)
def test_energy_threshold_by_hand(share, rank):
    assert rank_for_energy(torch.tensor([80.0, 15.0, 5.0]), share) == rank


def test_energy_threshold_of_a_zero_delta_keeps_no_rank():
    assert rank_for_energy(torch.zeros(4), 0.9) == 0


def one(delta, hessian, counts, transposed=False, aware=True, **options):
    under = None if hessian is None or not aware else damped(hessian, 0.01)
    item = Factored(delta, spectrum(delta, under), counts, transposed)
    return encode([item], hessian, aware=aware, **options)[0]


def test_bytes_are_known_before_the_factors_are():
    delta, inputs = problem()
    counts = {8: 2, 4: 5, 3: 3, 2: 7}
    for transposed, shape in ((False, (48, 64)), (True, (64, 48))):
        stored = one(delta, moment(inputs), counts, transposed)
        assert stored.shape == shape
        assert payload_bytes(*spec_of(counts, (48, 64), 128)) == payload_bytes(*stored.spec)


def test_a_transposed_encoding_decodes_to_the_transpose():
    delta, inputs = problem()
    plain, turned = (one(delta, moment(inputs), {4: 8}, t) for t in (False, True))
    assert torch.equal(decode(plain).T, decode(turned))


def test_matrices_that_read_one_input_are_solved_together_as_alone():
    """Rows do not interact, so sharing the solve changes rounding of float32 sums at most."""
    inputs = problem()[1]
    deltas = [problem(rows, 64, seed)[0] for rows, seed in ((48, 1), (16, 2), (80, 3))]
    counts = [{8: 1, 3: 6}, {4: 4}, {6: 2, 2: 9}]
    under = damped(moment(inputs), 0.01)
    items = [Factored(d, spectrum(d, under), c) for d, c in zip(deltas, counts, strict=True)]
    together = encode(items, moment(inputs))
    for delta, found, each in zip(deltas, together, counts, strict=True):
        alone = one(delta, moment(inputs), each)
        assert found.spec == alone.spec
        assert output_error(delta, decode(found), inputs) == pytest.approx(
            output_error(delta, decode(alone), inputs), rel=1e-3
        )


def test_without_inputs_the_error_of_the_delta_itself_is_kept_small():
    delta, inputs = problem()
    blind = decode(one(delta, None, {8: 4, 4: 8}))
    aware = decode(one(delta, moment(inputs), {8: 4, 4: 8}))
    assert (blind - delta).norm() < (aware - delta).norm()
    assert output_error(delta, aware, inputs) < output_error(delta, blind, inputs)


def test_the_refit_absorbs_the_rounding_of_the_right_factor():
    delta, inputs = problem()
    errors = [
        output_error(delta, decode(one(delta, moment(inputs), {2: 24}, refit=refit)), inputs)
        for refit in (True, False)
    ]
    assert errors[0] < 0.95 * errors[1]


# --- a few leading directions ---


def steep(rows, cols, seed=0):
    """A delta whose singular values fall as i^-0.7, and a second moment with channels of very different size."""
    g = torch.Generator().manual_seed(seed)
    side = min(rows, cols)
    left = torch.randn(rows, side, generator=g) / rows**0.5
    right = torch.randn(side, cols, generator=g) / cols**0.5
    delta = 1e-2 * (left * torch.arange(1, side + 1) ** -0.7) @ right
    x = torch.randn(2 * cols, cols, generator=g) * torch.logspace(0, -1, cols)
    return delta, damped(moment(x), 0.01)


@pytest.mark.parametrize(("rows", "cols"), [(192, 256), (256, 192)])
@pytest.mark.parametrize("aware", [True, False])
def test_a_few_directions_leave_hardly_more_error_than_the_best_ones(rows, cols, aware):
    delta, hessian = steep(rows, cols)
    hessian = hessian if aware else None
    whole, few = spectrum(delta, hessian), spectrum(delta, hessian, 24)
    assert (whole.directions, few.directions) == (192, 24)
    root = torch.linalg.cholesky(hessian) if aware else torch.eye(cols)
    errors = [
        ((delta - cut(found, delta, hessian, 24)) @ root).square().sum().item()
        for found in (whole, few)
    ]
    assert errors[0] <= errors[1] <= 1.03 * errors[0]
    assert torch.allclose(few.energy[:12], whole.energy[:12], rtol=1e-2)
    assert torch.equal(few.basis, spectrum(delta, hessian, 24).basis)


@pytest.mark.parametrize(("rows", "cols"), [(192, 256), (256, 192)])
def test_energies_beyond_those_looked_for_fall_on_and_have_the_right_sum(rows, cols):
    delta, hessian = steep(rows, cols)
    whole, few = spectrum(delta, hessian).energy, spectrum(delta, hessian, 24).energy
    assert len(few) == len(whole) and (few.diff() <= 1e-12 * few[0]).all()
    assert few.sum().item() == pytest.approx(whole.sum().item(), rel=1e-3)


def test_where_most_are_wanted_all_are_found_exactly():
    delta, hessian = steep(64, 96)
    whole, most = spectrum(delta, hessian), spectrum(delta, hessian, 40)
    assert torch.equal(most.energy, whole.energy)
    assert torch.equal(most.basis, whole.basis[:, :40])


@pytest.mark.parametrize("rank", [0, 3])
def test_a_delta_of_few_ranks_or_none_has_no_energy_beyond_them(rank):
    g = torch.Generator().manual_seed(0)
    delta = torch.randn(128, rank, generator=g) @ torch.randn(rank, 160, generator=g)
    energy = spectrum(delta, None, 16).energy
    assert energy[rank:].sum() <= 1e-5 * delta.square().sum()
    assert energy.isfinite().all() and (energy >= 0).all()


def test_a_series_by_hand():
    """8 + 4 + 2 + 1 after 16; level where more is asked for than the last one repeated."""
    assert torch.allclose(_falling(16.0, 15.0, 4), torch.tensor([8.0, 4.0, 2.0, 1.0]).double())
    assert torch.allclose(_falling(2.0, 100.0, 3), torch.full((3,), 2.0).double())
    assert torch.equal(_falling(2.0, 0.0, 3), torch.zeros(3).double())
