"""Bits by importance and refitted factors: properties, a hand-worked case, and the gain they are there for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cl_graft.skillpack.codecs import decode, payload_bytes
from cl_graft.skillpack.factorise import LOSS, allocate, encode, rank_for_energy, spec_of, spectrum
from cl_graft.skillpack.quant import groups_in


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


def test_energy_of_the_ranks_is_the_output_error_of_dropping_them():
    delta, inputs = problem()
    found = spectrum(delta, inputs.T @ inputs / len(inputs), damping=1e-6)
    for rank in (1, 5, 20):
        cut = found.left[:, :rank] @ found.right[:rank]
        lost = (inputs @ (delta - cut).T).square().sum() / len(inputs)
        assert lost.item() == pytest.approx(found.energy[rank:].sum().item(), rel=1e-2)
    assert torch.allclose(found.left @ found.right, delta, atol=1e-6)


def test_activation_aware_truncation_is_never_worse_on_the_output_than_the_plain_svd():
    delta, inputs = problem()
    aware, plain = spectrum(delta, inputs.T @ inputs / len(inputs)), spectrum(delta, None)
    for rank in (2, 8, 24):
        errors = [
            output_error(delta, s.left[:, :rank] @ s.right[:rank], inputs) for s in (aware, plain)
        ]
        assert errors[0] <= errors[1]


@pytest.mark.parametrize(
    ("share", "rank"), [(0.5, 1), (0.8, 1), (0.81, 2), (0.95, 2), (0.96, 3), (1.0, 3)]
)
def test_energy_threshold_by_hand(share, rank):
    assert rank_for_energy(torch.tensor([80.0, 15.0, 5.0]), share) == rank


def test_energy_threshold_of_a_zero_delta_keeps_no_rank():
    assert rank_for_energy(torch.zeros(4), 0.9) == 0


@given(
    st.lists(st.floats(1e-9, 1e3), min_size=1, max_size=40),
    st.floats(-8, 2),
    st.sampled_from([(16, 16), (7, 130), (128, 384)]),
)
@settings(max_examples=60, deadline=None)
def test_each_rank_gets_the_bits_with_the_least_error_plus_price(energies, log_price, shape):
    energies = sorted(energies, reverse=True)
    price = 10**log_price
    counts = allocate(torch.tensor(energies, dtype=torch.float64), shape, price, 128)
    scales = sum(groups_in(size, 128) for size in shape)
    best = []
    for energy in energies:
        cost = {
            b: energy * LOSS[b] + price * ((b * sum(shape) + (16 + b) * scales) / 8 if b else 0)
            for b in LOSS
        }
        best.append(min(cost, key=cost.__getitem__))
    assert counts == {b: best.count(b) for b in (8, 4, 3, 2) if b in best}
    assert best == sorted(best, reverse=True)  # precision never rises along the falling spectrum


def test_bytes_are_known_before_the_factors_are():
    delta, inputs = problem()
    counts = {8: 2, 4: 5, 3: 3, 2: 7}
    found = spectrum(delta, inputs.T @ inputs / len(inputs))
    for transposed, shape in ((False, (48, 64)), (True, (64, 48))):
        stored = encode(found, counts, transposed=transposed)
        assert stored.shape == shape
        assert payload_bytes(*spec_of(counts, shape, 128)) == payload_bytes(*stored.spec)


def test_a_transposed_encoding_decodes_to_the_transpose():
    delta, inputs = problem()
    found = spectrum(delta, inputs.T @ inputs / len(inputs))
    assert torch.equal(
        decode(encode(found, {4: 8})).T, decode(encode(found, {4: 8}, transposed=True))
    )


@pytest.mark.parametrize("seed", range(3))
def test_refit_and_bits_by_importance_beat_the_fixed_schedule_at_equal_bytes(seed):
    """The fixed schedule: plain SVD, 2 % of the ranks at 8 bit, 18 % at 4, 80 % at 2, no refit. Held-out inputs."""
    delta, inputs = problem(rows=96, cols=128, seed=seed, samples=2048)
    seen, held_out = inputs[:1024], inputs[1024:]
    hessian = seen.T @ seen / len(seen)
    fixed_counts = {8: 1, 4: 9, 2: 38}
    plain = spectrum(delta, None)
    plain = type(plain)(plain.delta, hessian, plain.energy, plain.left, plain.right)
    fixed = encode(plain, fixed_counts, refit=False)
    aware = spectrum(delta, hessian)
    price = next(
        p
        for p in torch.logspace(-14, 2, 2000, dtype=torch.float64).tolist()
        if payload_bytes(*spec_of(allocate(aware.energy, aware.shape, p, 128), aware.shape, 128))
        <= payload_bytes(*fixed.spec)
    )
    ours = encode(aware, allocate(aware.energy, aware.shape, price, 128))
    assert payload_bytes(*ours.spec) <= payload_bytes(*fixed.spec)
    assert output_error(delta, decode(ours), held_out) < 0.75 * output_error(
        delta, decode(fixed), held_out
    )
