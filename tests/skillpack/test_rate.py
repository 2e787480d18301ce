"""Whole numbers at one step: what they cost, what they lose, and that the price of a byte is the same everywhere."""

from __future__ import annotations

import pytest
import torch

from cl_graft.bench import textbook
from cl_graft.skillpack.codecs import coded_low_rank_stack, decode, payload_bytes
from cl_graft.skillpack.compress import solve
from cl_graft.skillpack.compress.factorise import spectrum
from cl_graft.skillpack.compress.gptq import factorised
from cl_graft.skillpack.compress.policy import Adaptive
from cl_graft.skillpack.compress.rate import (
    Weighted,
    column_shifts,
    encode_matrices,
    matrix_rate,
    trimmed,
)
from cl_graft.skillpack.compress.tables import (
    Shares,
    encode_table,
    table_directions,
    table_of,
    table_rate,
    vector_ways,
)
from cl_graft.skillpack.threads import in_threads
from tests.skillpack.test_factorise import moment, output_error, problem


def weighted(rows=96, cols=128, seed=0, slope=1.0):
    delta, inputs = problem(rows, cols, seed, samples=2048)
    under = Adaptive().regular(moment(inputs[:1024]))
    return Weighted(delta, spectrum(delta, under), slope), under, inputs[1024:]


def encoded(item, under, step, layout="small"):
    return encode_matrices([item], under, step, layout)[0]


def at(item, under, limit):
    """The finest step at which a matrix takes no more bytes, by trying."""
    for step in torch.logspace(-6, -1, 120).tolist():
        found = encoded(item, under, step)
        if found is None or payload_bytes(*found.spec) <= limit:
            return found
    raise AssertionError


@pytest.mark.parametrize("seed", range(3))
def test_at_equal_bytes_the_error_is_below_half_of_the_textbook_scheme(seed):
    """Plain SVD, 2 % of the ranks at 8 bit, 18 % at 4, 80 % at 2, GPTQ, no refit. Held-out inputs."""
    item, under, held_out = weighted(seed=seed)
    limit = 0.1 * 2 * item.delta.numel()
    ranks = textbook.ranks_within((96, 128), limit)
    fixed = textbook.compress(item.delta, under, ranks)
    ours = decode(at(item, under, limit))
    assert output_error(item.delta, ours, held_out) < 0.45 * output_error(
        item.delta, fixed, held_out
    )


def test_a_code_loses_a_twelfth_of_the_squared_step_where_codes_are_large():
    """The rule that the one step for all rests on: of both factors together, at high rates."""
    item, under, _ = weighted()
    step = 3e-3
    lost = item.delta - decode(encoded(item, under, step))
    error = float(((lost @ under) * lost).sum())
    rank = encoded(item, under, step).meta["rank"]
    codes = rank * (96 + 128 - rank)  # a product of factors has so many free numbers
    assert 0.7 < error / (codes * step**2 / 12) < 1.6


@pytest.mark.parametrize("layout", ["small", "fast"])
def test_bytes_are_about_what_was_foretold(layout):
    item, under, _ = weighted()
    unit = column_shifts(factorised(under, 0.0, scaled=False)[1])[1]
    rate = matrix_rate(item, under, unit, layout)
    for step in (3e-4, 1e-3, 3e-3):
        took = payload_bytes(*encoded(item, under, step, layout).spec)
        assert 0.6 < took / rate.at(step) < 1.6
    steps = [rate.step(bytes) for bytes in (500.0, 1000.0, 2000.0)]
    assert steps == sorted(steps, reverse=True)
    assert rate.at(steps[1]) == pytest.approx(1000, rel=0.02)


def test_a_slope_is_another_name_for_a_larger_delta():
    one, under, _ = weighted()
    other = one._replace(slope=4.0)
    same = [encoded(one, under, 1e-3), encoded(other, under, 2e-3)]
    assert torch.equal(decode(same[0]), decode(same[1]))


def test_a_transposed_matrix_is_the_transpose():
    item, under, _ = weighted()
    plain, turned = (encoded(item._replace(transposed=t), under, 1e-3) for t in (False, True))
    assert torch.allclose(decode(plain).T, decode(turned), atol=1e-9)


def test_matrices_that_read_one_input_are_coded_together_as_alone():
    items = [weighted(rows, 64, seed)[0] for rows, seed in ((48, 1), (16, 2), (80, 3))]
    under = weighted(48, 64, 1)[1]
    items = [i._replace(spectrum=spectrum(i.delta, under)) for i in items]
    for item, found in zip(items, encode_matrices(items, under, 1e-3, "small"), strict=True):
        alone = encoded(item, under, 1e-3)
        assert abs(payload_bytes(*found.spec) - payload_bytes(*alone.spec)) < 20
        error = [float((decode(e) - item.delta).norm()) for e in (found, alone)]
        assert error[0] == pytest.approx(error[1], rel=0.01)


def test_a_massive_activation_costs_its_own_column_only():
    """One input that is a thousand times the others has finer steps, and the others stay as coarse as they were."""
    item, under, _ = weighted()
    massive = under.clone()
    massive[7] *= 1000
    massive[:, 7] *= 1000
    shifts, unit = column_shifts(factorised(massive, 0.0, scaled=False)[1])
    assert shifts[7] > 6 and (shifts > 0).sum() < 8
    assert unit < 4 * column_shifts(factorised(under, 0.0, scaled=False)[1])[1]
    calm = payload_bytes(*encoded(item, under, 1e-3).spec)
    loud = item._replace(spectrum=spectrum(item.delta, massive))
    took = encoded(loud, massive, 1e-3)
    assert payload_bytes(*took.spec) < 2 * calm
    lost = item.delta - decode(took)
    assert ((lost @ massive) * lost).sum() < 2e-2 * ((item.delta @ massive) * item.delta).sum()


def test_without_inputs_the_delta_itself_is_kept():
    item, _, _ = weighted()
    found = encoded(item._replace(spectrum=spectrum(item.delta, None)), None, 2e-5)
    assert (decode(found) - item.delta).norm() < 0.05 * item.delta.norm()


def test_what_is_worth_less_than_a_step_is_not_there():
    item, under, _ = weighted()
    assert encoded(item, under, 1e3) is None


def test_trimming_drops_the_last_ranks():
    item, under, _ = weighted()
    whole = encoded(item, under, 1e-3)
    less, ranks = trimmed(whole), whole.meta["rank"] * 15 // 16
    assert less.meta["rank"] == ranks and payload_bytes(*less.spec) < payload_bytes(*whole.spec)
    first = spectrum(item.delta, under)
    cut = first.left(item.delta, under, ranks) @ first.right(item.delta, ranks)
    assert (decode(less) - cut).norm() < 0.1 * cut.norm()


def test_trimming_a_stack_trims_each_of_its_matrices():
    item, under, _ = weighted()
    whole = encoded(item, under, 1e-3)
    shape = (3, *whole.shape)
    less = trimmed(coded_low_rank_stack([whole, None, trimmed(whole)], shape))
    each = [trimmed(whole), None, trimmed(trimmed(whole))]
    assert less.meta["ranks"] == [one.meta["rank"] if one else 0 for one in each]
    for one, found in zip(each, decode(less), strict=True):
        assert torch.equal(found, decode(one) if one else torch.zeros(whole.shape))


def table(rows=200, n=32, seed=0):
    """A table, and what a squared unit of each entry costs."""
    g = torch.Generator().manual_seed(seed)
    delta = torch.randn(rows, n, generator=g) * 10 ** (2 * torch.rand(rows, 1, generator=g) - 3)
    weights = torch.rand(rows, generator=g) + 1e-3, 0.5 + torch.rand(n, generator=g)
    return table_of(delta, *weights), weights[0][:, None] * weights[1]


def table_at(found, step, most=0, layout="small"):
    shape = tuple(found.delta.shape)
    return encode_table(found, table_directions(found, most), shape, step, layout)


def test_units_of_a_table_are_octaves_within_a_factor_of_two_of_its_weights():
    found, weights = table()
    unit = found.unit * torch.exp2((found.rows[:, None] + found.columns).float())
    assert ((unit.square() / weights).log2().abs() <= 2.01).all()
    parts = list(found.strips())
    assert torch.equal(torch.cat([x for _, x in parts]), found.delta * unit)


@pytest.mark.parametrize("step", [1e-3, 1e-2, 3e-2])
def test_entries_of_a_table_are_as_near_as_their_weights_ask_for(step):
    found, weights = table()
    delta = decode(table_at(found, step))
    missing = (found.delta - delta).square() * weights
    kept = delta.any(1)
    assert missing[kept].sqrt().max() < 2 * step  # half a step, a dead zone, and units in octaves
    assert (missing[~kept].sum(1) < 32 * step**2).all()


@pytest.mark.parametrize("layout", ["small", "fast"])
def test_what_all_rows_of_a_table_share_is_kept_as_directions(layout):
    """AdamW moves rows that were never read along a few directions: no entry of them is worth a byte by itself."""
    g = torch.Generator().manual_seed(0)
    shared = torch.randn(3000, 2, generator=g) @ torch.randn(2, 64, generator=g)
    read = torch.zeros(3000, 1)
    read[::500] = 30.0
    delta = 0.1 * shared + read * torch.randn(3000, 64, generator=g)
    found = table_of(delta, torch.ones(3000), torch.ones(64))
    alone, both = table_at(found, 1.0, 0, layout), table_at(found, 1.0, 20, layout)
    assert alone.meta["rank"] == 0 and 6 <= alone.meta["kept"] < 20
    assert 2 <= both.meta["rank"] <= 8
    assert payload_bytes(*both.spec) < 12_000  # of 384,000 in bfloat16
    others = torch.ones(3000, dtype=torch.bool)
    others[::500] = False
    missed = (decode(both) - delta)[others]
    assert (decode(alone) - delta)[others].norm() > 0.9 * delta[others].norm()
    assert missed.norm() < 0.4 * delta[others].norm()
    assert (decode(both) - delta)[::500].abs().max() < 2


@pytest.mark.parametrize("layout", ["small", "fast"])
def test_few_rows_that_changed_need_no_directions(layout):
    """As of an optimiser that moves what was read alone: foretold as they are, and nothing is said of the others."""
    g = torch.Generator().manual_seed(3)
    delta = torch.zeros(4000, 64)
    delta[::100] = torch.randn(40, 64, generator=g)
    found = table_of(delta, torch.ones(4000), torch.ones(64))
    rate = table_rate(found, table_directions(found, 40), layout)
    for step in (0.03, 0.1, 0.3):
        encoded = table_at(found, step, 40, layout)
        assert encoded.meta["rank"] == 0 and encoded.meta["kept"] == 40
        about = payload_bytes(*encoded.spec) / rate.at(step)
        assert (0.5 if layout == "fast" else 0.8) < about < 1.3


def test_a_wide_table_has_the_directions_of_a_tall_one():
    g = torch.Generator().manual_seed(6)
    delta = torch.randn(20, 3, generator=g) @ torch.randn(3, 300, generator=g)
    wide = table_directions(table_of(delta, torch.ones(20), torch.ones(300)), 3)
    s = torch.linalg.svd(delta, full_matrices=False)[2][:3]
    assert torch.allclose((wide @ s.T).abs(), torch.eye(3), atol=1e-3)


@pytest.mark.parametrize("threads", [1, 4])
def test_compiled_solves_give_the_codes_of_torch(threads, monkeypatch):
    """But for a sum in another order, which may tip a value that lies between two codes."""
    g = torch.Generator().manual_seed(1)
    inputs = torch.randn(600, 150, generator=g) * torch.logspace(0, -1, 150)
    root = factorised(inputs.T @ inputs / 600, 0.01, scaled=False)[1]
    x, fine = 3 * torch.randn(2100, 150, generator=g), torch.exp2(torch.arange(150) % 3.0)
    left = torch.randn(90, 700, generator=g)
    m = torch.randn(90, 90, generator=g)
    moment, sizes = m @ m.T / 90 + torch.eye(90), 0.5 + torch.rand(90, generator=g)
    found, before = [], torch.get_num_threads()
    for least in (0, 1 << 60):
        monkeypatch.setattr(solve, "WORTH_COMPILING", least)
        torch.set_num_threads(threads if not least else 1)
        try:
            rights = solve.solve_right(x, root, fine)
            found.append((rights, *solve.solve_left(left, moment, 0.1, sizes)))
        finally:
            torch.set_num_threads(before)
    (right, codes, scales), (right_, codes_, scales_) = found
    assert right.abs().mean() > 1 and codes.abs().mean() > 1
    assert (right != right_).float().mean() < 0.01 and (right - right_).abs().max() <= 2
    assert (codes != codes_).float().mean() < 0.01 and (codes - codes_).abs().max() <= 1
    assert torch.allclose(scales, scales_, rtol=0.01)


def test_every_thread_has_its_part(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    parts = []
    in_threads(parts.append, 1001, multiple=4, least=100)
    parts.sort(key=lambda part: part.start)
    assert len(parts) == 4 and all(part.start % 4 == 0 for part in parts)
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(1001))
    few = []
    in_threads(few.append, 50, least=100)
    assert few == [slice(0, 50)]

    def fails(part):
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        in_threads(fails, 1000)


def test_codes_beyond_the_largest_coarsen_their_row_alone():
    delta = torch.tensor([[1e6, 0.0], [3.0, 1.0], [0.0, 2.0]])
    found = table_of(delta, torch.ones(3), torch.ones(2))
    assert (decode(table_at(found, 1.0, 2))[1:] - delta[1:]).abs().max() <= 0.5
    assert abs(float(decode(table_at(found, 1.0, 2))[0, 0]) - 1e6) < 1e6 / 4096


@pytest.mark.parametrize("most", [0, 32])
def test_a_table_s_bytes_are_about_what_was_foretold(most):
    found, _ = table()
    rate = table_rate(found, table_directions(found, most), "small")
    for step in (1e-3, 3e-3, 1e-2):
        took = payload_bytes(*table_at(found, step, most).spec)
        assert 0.6 < took / rate.at(step) < 1.6


def test_a_sample_of_rows_tells_what_all_would_take():
    found, _ = table(rows=4000)
    shares = Shares.of(found, table_directions(found, 8))
    few = shares.sample(300)
    assert len(few.energies) <= 600 and float(few.each.sum()) == pytest.approx(4000)
    for step in (1e-3, 1e-2, 1e-1):
        assert few.at(step, "small")[2] == pytest.approx(shares.at(step, "small")[2], rel=0.1)
    assert len(shares.sample(5000).energies) == 4000


def test_a_stack_is_a_table_of_rows_without_directions():
    found, _ = table()
    encoded = encode_table(found, table_directions(found, 8), (200, 4, 8), 1e-3, "small")
    same = table_at(found, 1e-3, 0)
    assert encoded.codec == "coded" and torch.equal(decode(encoded).view(200, 32), decode(same))


def test_a_vector_is_near_and_half_as_large_as_in_sixteen_bits():
    x = torch.randn(576, generator=torch.Generator().manual_seed(0)) * 1e-4
    found = vector_ways(x, "small")[0]
    assert (decode(found) - x).norm() < 0.015 * x.norm()
    assert payload_bytes(*found.spec) < 0.6 * 2 * 576
    rows = torch.stack([x, 1e-3 * x]).reshape(
        2, 24, 24
    )  # a whole tensor that the base lacks, each row by itself
    near = decode(vector_ways(rows, "small")[0])
    assert all((a - b).norm() < 0.015 * b.norm() for a, b in zip(near, rows, strict=True))
    assert not decode(vector_ways(torch.zeros(4), "small")[0]).any()
