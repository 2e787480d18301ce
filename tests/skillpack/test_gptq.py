"""What the solver promises: brute-force answers, the published algorithm, the guards."""

from __future__ import annotations

import importlib.util
import itertools
import math
import pathlib
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cl_graft.skillpack.codecs.quant import (
    BITS,
    Quantized,
    fit_grid,
    groups_in,
    nearest_codes,
    normalised,
    round_to_nearest,
)
from cl_graft.skillpack.compress.gptq import Axis, factorised, gptq_many


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(cols: int, n: int = 512, seed: int = 0) -> Tensor:
    """Correlated activations (n, cols) whose columns differ in size, as those of a model do."""
    mix = torch.eye(cols) + 0.5 * random(cols, cols, seed=seed + 1) / cols**0.5
    return random(n, cols, seed=seed + 2) @ mix * (0.7 * random(cols, seed=seed + 3)).exp()


def gptq(weight: Tensor, hessian: Tensor, bits: int, **options: Any) -> Quantized:
    return gptq_many([weight], hessian, bits, **options)[0]


def moment(x: Tensor) -> Tensor:
    return x.T @ x / len(x)


def of_weight(q: Quantized, axis: Axis) -> Tensor:
    return q.dequantize() if axis == "cols" else q.dequantize().T


def error(weight: Tensor, approximation: Tensor, hessian: Tensor) -> float:
    """||X (W - What)^T||^2 / ||X W^T||^2 by way of H = X^T X / n, in float64."""
    d, w, h = (t.double() for t in (weight - approximation, weight, hessian))
    return float(((d @ h) * d).sum() / ((w @ h) * w).sum())


def output_error(weight: Tensor, approximation: Tensor, x: Tensor) -> float:
    w, miss = weight.double(), weight.double() - approximation.double()
    return float((x.double() @ miss.T).norm() / (x.double() @ w.T).norm())


# The answer, by hand and by brute force


@pytest.mark.parametrize("polish", [0, 2])
def test_three_columns_by_hand(polish: int) -> None:
    """Grid -2, -1, 0, 1. Column 0 rounds 0.4 to 0; its error, times -(H^-1)_01 / (H^-1)_00 = 0.5,
    moves column 1 from 0.4 to 0.6, which rounds to 1. Column 2 is alone, and clipped."""
    weight = torch.tensor([[0.4, 0.4, 1.5]])
    hessian = torch.tensor([[1.0, 0.5, 0.0], [0.5, 1.0, 0.0], [0.0, 0.0, 1.0]])
    plain = {"symmetric": True, "search": False}
    q = gptq(weight, hessian, 2, group_size=3, damping=0.0, polish=polish, **plain)
    assert q.dequantize().tolist() == [[0.0, 1.0, 1.0]]
    assert round_to_nearest(weight, 2, 3, **plain).dequantize().tolist() == [[0.0, 0.0, 1.0]]


def test_close_to_the_best_of_all_codes() -> None:
    """4 columns at 2 bits have 256 code words on a given grid. Over 1000 rows, rounding to nearest
    leaves 1.49 times the error of the best of them, GPTQ 1.23, and with the polish 1.05."""
    all_codes = torch.tensor(list(itertools.product(range(4), repeat=4))).float()
    sums = dict.fromkeys(("best", "nearest", "plain", "polished"), 0.0)
    for seed in range(20):
        weight, hessian = random(50, 4, seed=seed), moment(inputs(4, 8, seed=100 + seed))
        fixed: dict[str, Any] = {"group_size": 4, "search": False}
        nearest = round_to_nearest(weight, 2, 4, search=False)
        answers = {"nearest": nearest}
        for name, polish in (("plain", 0), ("polished", 2)):
            answers[name] = gptq(weight, hessian, 2, damping=1e-4, polish=polish, **fixed)
            assert torch.equal(answers[name].scale, nearest.scale)  # the same grid
        every = nearest.scale.float()[..., None] * (all_codes - nearest.zero.float()[..., None])
        d = weight[:, None] - every.view(50, 256, 4) * 2.0**nearest.exponent
        sums["best"] += float(((d @ hessian) * d).sum(-1).amin(1).sum())
        for name, q in answers.items():
            d = weight - q.dequantize()
            sums[name] += float(((d @ hessian) * d).sum())
    assert sums["best"] <= sums["polished"] * (1 + 1e-5)
    assert sums["polished"] < sums["plain"] < sums["nearest"]
    assert sums["plain"] < 1.3 * sums["best"]
    assert sums["polished"] < 1.08 * sums["best"]


@pytest.mark.parametrize("axis", ["cols", "rows"])
@pytest.mark.parametrize("act_order", [False, True])
def test_a_diagonal_hessian_is_rounding_to_nearest(axis: Axis, act_order: bool) -> None:
    weight, diagonal = random(24, 100), random(100, seed=1).square()
    options: dict[str, Any] = {"search": False, "symmetric": True}
    plain = round_to_nearest(weight if axis == "cols" else weight.T, 3, 32, **options)
    q = gptq(
        weight,
        diagonal.diag(),
        3,
        group_size=32,
        group_axis=axis,
        act_order=act_order,
        **options,
    )
    assert_same(q, plain)


def assert_same(a: Quantized, b: Quantized) -> None:
    for x, y in zip((a.codes, a.scale, a.zero), (b.codes, b.scale, b.zero), strict=True):
        assert x.dtype == y.dtype and torch.equal(x, y)
    assert (a.bits, a.group_size, a.exponent) == (b.bits, b.group_size, b.exponent)


def test_importance_makes_it_so_with_the_search_too() -> None:
    weight, diagonal = random(8, 96), random(96, seed=1).square()
    q = gptq(weight, diagonal.diag(), 2, damping=0.0)
    assert_same(q, round_to_nearest(weight, 2, importance=diagonal / diagonal.mean()))


@pytest.mark.parametrize("axis", ["cols", "rows"])
def test_equals_obs_step_by_step(axis: Axis) -> None:
    """OBS as it is derived, in float64: round a column, subtract error * (H^-1)_j: / (H^-1)_jj from
    the rest, then eliminate row and column j from H^-1. No Cholesky, no blocks."""
    weight, x, bits, size = random(20, 24), inputs(24), 3, 8
    q = gptq(weight, moment(x), bits, group_size=size, group_axis=axis, block=5, polish=0)
    exact, exponent = normalised(weight)
    left, out = exact.double(), torch.zeros(20, 24)
    h = moment(x).double()
    inverse = torch.linalg.inv(h + 0.01 * h.diagonal().mean() * torch.eye(24))
    share = 1 / torch.linalg.cholesky(inverse, upper=True).diagonal().float() ** 2
    scale = zero = torch.empty(0)
    for j in range(24):
        if axis == "cols" and j % size == 0:
            tile = slice(j, j + size)
            scale, zero = fit_grid(left[:, tile].float(), bits, importance=share[tile])
        if axis == "rows":
            grids = [fit_grid(part[None].float(), bits) for part in left[:, j].split(size)]
            scale, zero = (
                torch.cat([g[i] for g in grids]).repeat_interleave(size)[:20] for i in (0, 1)
            )
        w = left[:, j].clone()
        out[:, j] = scale * (nearest_codes(w.float(), scale, zero, bits) - zero)
        left -= ((w - out[:, j]) / inverse[j, j])[:, None] * inverse[j]
        inverse -= inverse[:, j : j + 1] * inverse[j] / inverse[j, j]
        inverse[j, j] = 1.0  # eliminated: no longer read but as a divisor of zeros
    assert torch.allclose(of_weight(q, axis), out * 2.0**exponent, atol=1e-6)


@pytest.mark.parametrize("axis", ["cols", "rows"])
@pytest.mark.parametrize("bits", [2, 4])
def test_polish_only_lowers_the_error(axis: Axis, bits: int) -> None:
    weight, hessian = random(40, 70), moment(inputs(70, 50))
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(70)
    errors = []
    for polish in range(4):
        q = gptq(weight, hessian, bits, group_size=16, group_axis=axis, polish=polish)
        errors.append(error(weight, of_weight(q, axis), damped))
    assert all(b <= a * (1 + 1e-5) for a, b in itertools.pairwise(errors))
    assert errors[2] < 0.97 * errors[0]


# Against auto-gptq


@pytest.fixture(scope="module")
def rival() -> Iterator[Any]:
    """auto-gptq's GPTQ class, loaded past its package, which asks for an older transformers."""
    found = importlib.util.find_spec("auto_gptq")
    if found is None or found.origin is None:
        pytest.skip("auto_gptq is not installed")
    root = pathlib.Path(found.origin).parent
    with pytest.MonkeyPatch.context() as patch:
        for name, path in (("auto_gptq", root), ("auto_gptq.quantization", root / "quantization")):
            module = types.ModuleType(name)
            module.__path__ = [str(path)]
            patch.setitem(sys.modules, name, module)
        if not torch.cuda.is_available():
            patch.setattr(torch.cuda, "synchronize", lambda *a: None)
        yield importlib.import_module("auto_gptq.quantization.gptq").GPTQ
        for name in [n for n in sys.modules if n.startswith("auto_gptq.")]:
            patch.delitem(sys.modules, name)


def auto_gptq(
    gptq_class: Any, weight: Tensor, x: Tensor, bits: int, size: int, act: bool, symmetric: bool
) -> Tensor:
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False).requires_grad_(False)
    layer.weight.copy_(weight)
    solver = gptq_class(layer)
    solver.quantizer.configure(bits, perchannel=True, sym=symmetric, mse=False)
    solver.add_batch(x[None], None)
    whole = size == weight.shape[1]
    solver.fasterquant(
        group_size=-1 if whole else size, actorder=act, static_groups=act and not whole
    )
    return layer.weight


def rival_case(rows: int, cols: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    mix = 0.2 * torch.randn(cols, cols, generator=generator) + torch.eye(cols)
    x = torch.randn(1024, cols, generator=generator) @ mix
    return (2 * torch.rand(rows, cols, generator=generator) - 1) / cols**0.5, x


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_below_auto_gptq_in_every_setting(
    rival: Any, bits: int, symmetric: bool, act_order: bool
) -> None:
    """No tolerance: the output error is lower, at 8 bits too. Without the search and the polish it
    is the same algorithm and has the same error, but for the rounding of scales to float16; only
    where its block of 128 holds several groups does it fit the later ones before the feedback."""
    weight, x = rival_case(48, 192)
    for size in (192, 64, 128):
        options: dict[str, Any] = {
            "group_size": size,
            "act_order": act_order,
            "symmetric": symmetric,
        }
        theirs = output_error(
            weight, auto_gptq(rival, weight, x, bits, size, act_order, symmetric), x
        )
        ours = gptq(weight, moment(x), bits, **options)
        assert output_error(weight, ours.dequantize(), x) < 0.98 * theirs
        if act_order or size >= 128:
            same = gptq(weight, moment(x), bits, **options, search=False, polish=0)
            assert output_error(weight, same.dequantize(), x) == pytest.approx(theirs, rel=0.02)


def test_far_below_auto_gptq_at_two_bits(rival: Any) -> None:
    """Groups of 64: 0.6 of its squared error, where the best of others was seen at 0.8."""
    weight, x = rival_case(192, 256)
    theirs = output_error(weight, auto_gptq(rival, weight, x, 2, 64, False, True), x)
    ours = gptq(weight, moment(x), 2, symmetric=True).dequantize()
    assert output_error(weight, ours, x) ** 2 < 0.7 * theirs**2


# Groups


@pytest.mark.parametrize("axis", ["cols", "rows"])
def test_groups_lie_along_the_axis(axis: Axis) -> None:
    """Each group of 16 holds at most 4 levels at 2 bits; across groups there are more."""
    weight = random(40, 24)
    q = gptq(weight, moment(inputs(24)), 2, group_size=16, group_axis=axis)
    assert q.codes.shape == ((40, 24) if axis == "cols" else (24, 40))
    assert q.scale.shape == q.zero.shape == (len(q.codes), groups_in(q.codes.shape[1], 16))
    for row in q.dequantize():
        assert all(len(part.unique()) <= 4 for part in row.split(16))
        assert len(row.unique()) > 4


def test_rows_suit_columns_of_different_size() -> None:
    """Columns that fall from 1 to 1e-4, each as important: only scales of their own keep them."""
    sizes = torch.logspace(0, -4, 64)
    weight, x = random(64, 64) * sizes, inputs(64) / sizes
    rows = gptq(weight, moment(x), 4, group_axis="rows", group_size=32)
    cols = gptq(weight, moment(x), 4, group_axis="cols", group_size=32)
    assert output_error(weight, rows.dequantize().T, x) < 0.12
    assert output_error(weight, cols.dequantize(), x) > 0.3


def test_act_order_helps_where_inputs_differ() -> None:
    weight, x = random(32, 128), inputs(128)
    first = gptq(weight, moment(x), 2, act_order=True, polish=0)
    in_turn = gptq(weight, moment(x), 2, act_order=False, polish=0)
    assert output_error(weight, first.dequantize(), x) < output_error(
        weight, in_turn.dequantize(), x
    )


@pytest.mark.parametrize("axis", ["cols", "rows"])
def test_many_are_each(axis: Axis) -> None:
    """Matrices of different height and size, one solve: what separate calls give."""
    weights = [random(30, 48), 1e-5 * random(1, 48, seed=1), 7 * random(65, 48, seed=2)]
    hessian = moment(inputs(48))
    together = gptq_many(weights, hessian, 4, group_size=16, group_axis=axis)
    for weight, q in zip(weights, together, strict=True):
        alone = gptq(weight, hessian, 4, group_size=16, group_axis=axis)
        assert q.codes.shape == alone.codes.shape and q.scale.shape == alone.scale.shape
        assert q.exponent == alone.exponent
        assert (q.codes == alone.codes).float().mean() > 0.99  # float32 sums may differ in order
        assert torch.allclose(q.scale.float(), alone.scale.float(), rtol=0.05)


# The grid


def test_fit_grid_by_hand() -> None:
    scale, zero = fit_grid(torch.tensor([[-1.0, 0.0, 2.0]]), 2, search=False)
    assert (scale.item(), zero.item()) == (1.0, 1.0)
    scale, zero = fit_grid(torch.tensor([[-1.0, 0.5, 3.0]]), 2, symmetric=True, search=False)
    assert (scale.item(), zero.item()) == (2.0, 2.0)


@given(seed=st.integers(0, 99), bits=st.sampled_from(BITS), symmetric=st.booleans())
@settings(max_examples=30, deadline=None)
def test_the_search_never_loses_to_min_and_max(seed: int, bits: int, symmetric: bool) -> None:
    x, importance = random(5, 33, seed=seed) ** 3, random(33, seed=seed + 1).square()
    costs = []
    for search in (True, False):
        scale, zero = fit_grid(x, bits, symmetric=symmetric, search=search, importance=importance)
        assert torch.equal(scale.half().float(), scale) and (scale > 0).all()
        assert torch.equal(zero.byte().float(), zero) and (zero < 2**bits).all()
        codes = nearest_codes(x, scale[:, None], zero[:, None], bits)
        costs.append((scale[:, None] * (codes - zero[:, None]) - x).square() @ importance)
    assert (costs[0] <= costs[1] * (1 + 1e-5)).all()


def test_the_search_is_close_to_the_best_grid() -> None:
    """At 2 bits, of all zeros and 400 scales: the mean square is within 0.5 % of that of the best,
    where the grid from minimum to maximum leaves 54 % more."""
    x = random(200, 32)
    fine = torch.linspace(0.02, 1, 400)[:, None] * (x.amax(1) - x.amin(1))
    scales = torch.cat([fine] * 4)
    zeros = torch.arange(4.0).repeat_interleave(400)[:, None].expand_as(scales)

    def cost(scale: Tensor, zero: Tensor) -> Tensor:
        codes = nearest_codes(x, scale[..., None], zero[..., None], 2)
        return (scale[..., None] * (codes - zero[..., None]) - x).square().mean(-1)

    best = torch.stack([cost(s, z) for s, z in zip(scales, zeros, strict=True)]).amin(0).mean()
    assert cost(*fit_grid(x, 2)).mean() < 1.005 * best
    assert cost(*fit_grid(x, 2, search=False)).mean() > 1.5 * best


def test_an_outlier_is_clipped_when_it_does_not_matter() -> None:
    x, importance = random(1, 64), torch.ones(64)
    x[0, 7], importance[7] = 50.0, 1e-6
    scale, _ = fit_grid(x, 4, importance=importance)
    assert scale < 0.5 * fit_grid(x, 4)[0]


# Guards


def test_dead_inputs_are_rounded_to_nearest() -> None:
    """Their column stays within half a step of the grid, or at its end, and is not zeroed."""
    weight, x = random(16, 64), inputs(64)
    x[:, 10:20] = 0.0
    q = gptq(weight, moment(x), 4)
    scale, zero = q.scale.float() * 2.0**q.exponent, q.zero.float()
    nearest = nearest_codes(weight, scale, zero, 4)
    assert torch.equal(q.codes[:, 10:20].float(), nearest[:, 10:20])
    assert not torch.equal(q.codes.float(), nearest)


@pytest.mark.parametrize("damping", [0.0, 0.01])
@pytest.mark.parametrize("axis", ["cols", "rows"])
def test_a_zero_hessian_is_rounding_to_nearest(axis: Axis, damping: float) -> None:
    weight = random(20, 50)
    q = gptq(weight, torch.zeros(50, 50), 2, group_axis=axis, damping=damping)
    assert_same(q, round_to_nearest(weight if axis == "cols" else weight.T, 2))


@pytest.mark.parametrize("samples", [1, 8])
@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_a_singular_hessian_moves_no_weight_far(samples: int, damping: float) -> None:
    weight, x = random(16, 96), random(samples, 96, seed=1)
    approximation = gptq(weight, moment(x), 4, damping=damping).dequantize()
    nearest = round_to_nearest(weight, 4).dequantize()
    assert (weight - approximation).norm() < 0.3 * weight.norm()
    assert output_error(weight, approximation, x) < 0.3 * output_error(weight, nearest, x)


@pytest.mark.parametrize("cols", [1, 12])
def test_the_factor_is_upper_triangular(cols: int) -> None:
    """R R^T = H + damping, also for a Hilbert matrix too ill-conditioned for float32."""
    places = torch.arange(cols, dtype=torch.float64)
    hilbert = 1 / (places[:, None] + places + 1)
    hilbert /= hilbert.diagonal().mean()
    damped, root = factorised(hilbert, 1e-8)
    exact = (hilbert + 1e-8 * torch.eye(cols)).float()
    assert torch.equal(root, root.triu())
    assert torch.allclose(damped, exact)
    assert (root @ root.T - exact).norm() < 1e-6 * exact.norm()


def test_an_indefinite_hessian_is_damped_or_refused() -> None:
    hessian = moment(inputs(16)) - 0.5 * torch.eye(16)
    assert error(random(4, 16), gptq(random(4, 16), hessian, 8).dequantize(), torch.eye(16)) < 1e-3
    with pytest.raises(ValueError, match="positive semi-definite"):
        gptq(random(4, 2), torch.tensor([[0.0, 1e20], [1e20, 0.0]]), 4)


@pytest.mark.parametrize("power", [-140, -30, 20, 100])
def test_powers_of_two_only_move_the_exponent(power: int) -> None:
    """The same codes and scales whatever the unit of the weights or of the inputs."""
    weight, hessian = random(8, 64), moment(inputs(64))
    one, other = (
        gptq(weight, hessian, 3),
        gptq(
            torch.ldexp(weight, torch.tensor(max(power, -100))),
            torch.ldexp(hessian, torch.tensor(power // 2)),
            3,
        ),
    )
    assert torch.equal(one.codes, other.codes) and torch.equal(one.scale, other.scale)
    assert other.exponent == one.exponent + max(power, -100)


@pytest.mark.parametrize("magnitude", [1e-2, 1e-5, 1e-6, 1e-9, 1e-30])
@pytest.mark.parametrize("bits", BITS)
def test_small_deltas_keep_their_precision(magnitude: float, bits: int) -> None:
    weight, x = magnitude * random(16, 128), inputs(128)
    bound = {2: 0.4, 3: 0.15, 4: 0.07, 5: 0.04, 6: 0.02, 8: 0.005}[bits]
    assert output_error(weight, gptq(weight, moment(x), bits).dequantize(), x) < bound


def test_small_rows_beside_large_ones() -> None:
    """At 8 bits a row 1e-4 of the largest keeps its precision; one 1e-12 of it becomes zeros."""
    weight = random(3, 128) * torch.tensor([[1.0], [1e-4], [1e-12]])
    approximation = gptq(weight, torch.eye(128), 8).dequantize()
    miss = (weight - approximation).norm(dim=1) / weight.norm(dim=1)
    assert (miss[:2] < 0.01).all() and approximation[2].eq(0).all()


@pytest.mark.parametrize("act_order", [False, True])
def test_zeros_stay_zeros(act_order: bool) -> None:
    zeros = gptq(torch.zeros(4, 70), moment(inputs(70)), 4, act_order=act_order)
    assert zeros.dequantize().eq(0).all() and zeros.exponent == 0
    weight = random(4, 70)
    weight[:, :32] = 0.0  # a whole group, which comes first and so gets no feedback
    q = gptq(weight, torch.eye(70), 4, group_size=32, act_order=act_order)
    assert q.dequantize()[:, :32].eq(0).all() and q.scale.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_float_type(dtype: torch.dtype) -> None:
    weight, hessian = random(6, 40).to(dtype), moment(inputs(40)).to(dtype)
    assert_same(gptq(weight, hessian, 4), gptq(weight.float(), hessian.float(), 4))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"weight": torch.full((2, 8), math.nan)}, "NaN or infinity"),
        ({"weight": torch.full((2, 8), 1e300, dtype=torch.float64)}, "NaN or infinity"),
        ({"weight": torch.zeros(0, 8)}, "not empty"),
        ({"weight": torch.zeros(8)}, "pass a matrix"),
        ({"hessian": torch.full((8, 8), math.inf)}, "Hessian holds NaN or infinity"),
        ({"hessian": torch.eye(7)}, r"\(7, 7\).*\(2, 8\)"),
        ({"bits": 7}, "bits is 7; choose one of 2, 3, 4, 5, 6, 8"),
        ({"group_size": -1}, "group_size is -1"),
        ({"group_axis": "columns"}, "'cols' or 'rows'"),
        ({"damping": -0.1}, "damping is -0.1"),
        ({"block": 0}, "block is 0"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], words: str) -> None:
    arguments: dict[str, Any] = {"weight": random(2, 8), "hessian": torch.eye(8), "bits": 4}
    with pytest.raises(ValueError, match=words):
        gptq(**(arguments | change))
    with pytest.raises(ValueError, match="empty"):
        gptq_many([], torch.eye(8), 4)


@given(
    rows=st.integers(1, 20),
    cols=st.integers(1, 40),
    size=st.integers(1, 50),
    block=st.integers(1, 50),
    bits=st.sampled_from(BITS),
    axis=st.sampled_from(["cols", "rows"]),
    options=st.fixed_dictionaries(
        {name: st.booleans() for name in ("act_order", "symmetric", "search")}
    ),
    samples=st.integers(1, 60),
)
@settings(max_examples=60, deadline=None)
def test_any_shape(
    rows: int,
    cols: int,
    size: int,
    block: int,
    bits: int,
    axis: Axis,
    options: dict[str, Any],
    samples: int,
) -> None:
    """Types, shapes and ranges hold, the same call gives the same bits, no input is touched, and
    the error is at most a little above that of rounding to nearest."""
    weight, hessian = random(rows, cols, seed=rows), moment(inputs(cols, samples, seed=cols))
    before = weight.clone(), hessian.clone()
    options |= {"group_size": size, "group_axis": axis, "block": block}
    q = gptq(weight, hessian, bits, **options)
    shape = (rows, cols) if axis == "cols" else (cols, rows)
    assert q.codes.shape == shape and q.codes.dtype == torch.uint8 and int(q.codes.max()) < 2**bits
    assert q.scale.shape == q.zero.shape == (shape[0], groups_in(shape[1], size))
    assert q.scale.dtype == torch.float16 and q.scale.isfinite().all()
    assert q.zero.dtype == torch.uint8 and int(q.zero.max()) < 2**bits
    assert (q.bits, q.group_size) == (bits, size)
    assert_same(q, gptq(weight, hessian, bits, **options))
    assert torch.equal(weight, before[0]) and torch.equal(hessian, before[1])
    plain = {name: options[name] for name in ("symmetric", "search")}
    nearest = round_to_nearest(weight if axis == "cols" else weight.T, bits, size, **plain)
    ours, theirs = (error(weight, of_weight(r, axis), hessian) for r in (q, nearest))
    assert ours <= 1.5 * theirs + 1e-3
