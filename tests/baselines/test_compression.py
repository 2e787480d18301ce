"""Published ways to compress a delta, against their definitions on small cases worked out here."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import pytest
import torch

from cl_graft import plugins
from cl_graft.budget import Budget
from cl_graft.errors import CLGraftError, OverBudget
from cl_graft.skillpack.codecs import decode, payload_bytes
from cl_graft.skillpack.compress.calibrate import Moments
from cl_graft.skillpack.compress.policy import Profile
from cl_graft.strategy.context import Context
from tests.baselines.methods import module


@dataclass
class Held:
    """What a compressor may ask of a context, without a model: parts alone count."""

    shapes: dict[str, tuple[int, ...]]
    bytes: int = 10**9
    seed: int = 0
    model: Any = None
    start: dict[str, torch.Tensor] = field(default_factory=dict)
    progress: Any = staticmethod(lambda done: None)
    seed_of = Context.seed_of

    @property
    def budget(self):
        return Budget(f"{self.bytes}B", 1)

    @staticmethod
    def cost_of(specs):
        return sum(payload_bytes(*spec) for spec in specs.values())


def compressed(name, delta, bytes=10**9, seed=0, **options):
    """(encoded tensors, decoded ones) of a method's own function."""
    held = Held({n: tuple(x.shape) for n, x in delta.items()}, bytes, seed)
    kind = plugins.load("strategy", name)
    encoded = kind.function(delta, held, **options)
    assert held.cost_of({n: e.spec for n, e in encoded.items()}) <= bytes
    return encoded, {n: decode(e) for n, e in encoded.items()}


def normal(*shape, seed=0, scale=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


# BitDelta


def test_bitdelta_is_the_sign_times_the_mean_magnitude():
    delta = {"w": torch.tensor([[1.0, -3.0], [2.0, -2.0]]), "b": torch.tensor([0.5, 3.0])}
    _, found = compressed("bitdelta", delta, steps=0)
    assert found["w"].tolist() == [[2, -2], [2, -2]] and found["b"].tolist() == [0.5, 3.0]


class Linear(torch.nn.Module):
    """A model whose logits are linear in its weight: the best scales have a closed form."""

    def __init__(self, weight):
        super().__init__()
        self.weight = torch.nn.Parameter(weight)

    def forward(self, input_ids, attention_mask, use_cache):
        return type("Output", (), {"logits": input_ids @ self.weight.T})


@pytest.mark.parametrize("axis", [None, 0])
def test_distilled_scales_go_to_the_least_squares_of_the_logits(axis):
    bitdelta, x = module("bitdelta"), normal(1, 64, 6, seed=1) * torch.logspace(0, -1, 6)
    start, delta = normal(4, 6, seed=2), normal(4, 6, seed=3, scale=0.1)
    held = Held({}, model=Linear(start + delta), start={"weight": start})
    mask = torch.ones(1, 64)
    mask[:, 60:] = 0
    held.batches = lambda size, seed: ({"input_ids": x, "attention_mask": mask} for _ in count())
    first = bitdelta._magnitude(delta, axis)
    found = bitdelta.distilled(held, {"weight": delta}, {"weight": first}, 400, 1, 0.05)["weight"]
    seen, signs = x[0, :60], torch.where(delta > 0, 1.0, -1.0)
    along, wanted = seen @ signs.T, seen @ delta.T  # logits of the signs, and of the delta
    dims = (0, 1) if axis is None else (0,)
    best = (along * wanted).sum(dims) / along.square().sum(dims)
    torch.testing.assert_close(found.flatten(), best.flatten(), rtol=0.02, atol=0)
    assert not torch.allclose(found, first, rtol=0.02)
    assert torch.equal(held.model.weight, start + delta), "the model is left as it was"


def test_a_scale_is_a_rows_or_a_columns_by_what_the_layer_puts_out(monkeypatch):
    """Rows differ but for a column of small entries: on inputs that read it alone, a scale of its own is better."""
    bitdelta = module("bitdelta")
    rows = normal(8, 7, seed=1).sign() * torch.logspace(1, 0, 8)[:, None]
    both = torch.cat([rows, normal(8, 1, seed=2).sign() * 0.1], 1)
    reads = torch.where(torch.arange(8) < 7, 0.0, 1.0)
    delta = {"plain": both, "read": both, "turned": both.T.contiguous()}
    moments = Moments({"x": torch.diag(reads)}, {"read": "x"})
    monkeypatch.setattr(bitdelta, "moments", lambda *given, **options: moments)
    held = Held({}, model=torch.nn.Linear(1, 1))
    held.validation = lambda size: []
    assert bitdelta._axes(delta, held) == {"plain": 0, "read": 1, "turned": 1}


def test_where_not_all_signs_fit_those_that_tell_most_a_byte_do():
    delta = {"small": normal(16, 16), "large": normal(64, 64, scale=3.0), "b": torch.ones(4)}
    encoded, _ = compressed("bitdelta", delta, 64 * 64 // 8 + 4 + 8 + 20, steps=0)
    assert set(encoded) == {"large", "b"}
    with pytest.raises(OverBudget, match="one matrix's signs and the vectors; raise it"):
        compressed("bitdelta", delta, 20, steps=0)


# ComPEFT


def test_compeft_keeps_the_largest_of_all_as_one_size():
    delta = {"a": torch.tensor([3.0, -1.0, 0.5]), "b": torch.tensor([[-4.0, 2.0]])}
    _, found = compressed("compeft", delta, density=0.4, alpha=2.0)
    mean = sum((3, -1, 0.5, -4, 2)) / 5
    deviation = math.sqrt(sum((x - mean) ** 2 for x in (3, -1, 0.5, -4, 2)) / 4)
    torch.testing.assert_close(found["a"], torch.tensor([2 * deviation, 0, 0]))
    torch.testing.assert_close(found["b"], torch.tensor([[-2 * deviation, 0]]))


def test_compeft_takes_the_alpha_and_the_share_under_which_least_is_lost(monkeypatch):
    delta = {"w": normal(100, 100)}
    asked = []

    def lost(context, tensors):
        kept = decode(tensors["w"])
        asked.append((round(float((kept != 0).float().mean()), 3), float(kept.abs().max())))
        return abs(asked[-1][0] - 0.2) + abs(asked[-1][1] / float(delta["w"].std()) - 3.0)

    monkeypatch.setattr(module("compeft"), "kept_loss", lost)
    _, found = compressed("compeft", delta, 100 * 100 // 8 + 450 + 8)
    most = asked[0][0]
    assert 0.3 < most < 0.4 and [share for share, _ in asked] == [most] * 9 + [
        0.05,
        0.1,
        0.2,
        0.3,
        most,
    ]
    assert float((found["w"] != 0).float().mean()) == pytest.approx(0.2)
    assert float(found["w"].max()) == pytest.approx(3 * float(delta["w"].std()))
    with pytest.raises(OverBudget, match=r"compeft.density=0.5 takes .* the largest that fits is"):
        compressed("compeft", delta, 1708, density=0.5, alpha=1.0)


# DARE


def test_dare_keeps_as_many_as_the_budget_holds_scaled_by_what_it_dropped():
    delta = {"w": normal(200, 100), "b": normal(300, seed=1)}
    encoded, found = compressed("dare", delta, 4000)
    rates = {e.meta["rate"] / 2**48 for e in encoded.values()}
    (rate,) = rates
    assert 0.09 < rate < 0.105 and 3990 < 2 * sum(e.meta["kept"] for e in encoded.values()) <= 4000
    for name, x in delta.items():
        left = found[name] != 0
        assert torch.equal(found[name][left], (x / rate).bfloat16().float()[left])
    assert [e.meta["seed"] for e in encoded.values()] != [0, 0]
    with pytest.raises(OverBudget, match=r"dare.density=0.5 takes .* the largest that fits is 0.0"):
        compressed("dare", delta, 4000, density=0.5)


def test_the_mean_of_dares_deltas_is_the_delta():
    x = normal(40, 40)
    total = sum(compressed("dare", {"w": x}, seed=s, density=0.25)[1]["w"] for s in range(400))
    # each entry has variance x^2 (1 - q) / q, over 400 draws
    spread = x.abs() * math.sqrt(3 / 400)
    assert float(((total / 400 - x) / spread).square().mean()) == pytest.approx(1.0, abs=0.1)


# Delta-CoMe


def test_the_bands_of_delta_come_are_the_released_scripts():
    bands = module("delta_come").Bands()
    sizes = {"q": ("attention", (4096, 4096)), "up": ("mlp", (11008, 4096))}
    profiles = {n: Profile("matrix", role, s, torch.ones(4096)) for n, (role, s) in sizes.items()}
    plan = bands.plan(profiles, 0.75)
    assert plan.counts == {"q": {8: 2, 3: 32, 2: 968}, "up": {8: 2, 3: 32, 2: 1428}}
    assert [bands._divided(ranks) for ranks in (0, 1, 9)] == [{}, {8: 1}, {8: 2, 3: 7}]


# Delta-DCT


def test_delta_dct_gives_the_larger_patches_more_bits_and_fills_the_budget():
    x = normal(160, 160) * torch.logspace(0, -2, 100).repeat_interleave(256).view(160, 160)
    x = x.view(100, 16, 16).view(10, 10, 16, 16).transpose(1, 2).reshape(160, 160)
    encoded, found = compressed("delta_dct", {"w": x}, 1800)
    (w,) = encoded.values()
    assert [bits for bits, _ in w.meta["bits"]] == [4, 2, 1, 0]
    counts = [patches for _, patches in w.meta["bits"]]
    kept = sum(counts[:3])
    assert sum(counts) == 100 and counts[:3] == [
        round(0.1 * kept),
        round(0.5 * kept) - round(0.1 * kept),
        kept - round(0.5 * kept),
    ]
    assert 1800 - payload_bytes(*w.spec) < 32 + 64
    miss = (
        (found["w"] - x).view(10, 16, 10, 16).transpose(1, 2).flatten(0, 1).flatten(1).norm(dim=1)
    )
    size = x.view(10, 16, 10, 16).transpose(1, 2).flatten(0, 1).flatten(1).norm(dim=1)
    order = size.argsort(descending=True)
    relative = (miss / size)[order]
    assert relative[: counts[0]].max() < 0.15 < relative[counts[0] : counts[0] + counts[1]].min()
    assert relative[kept:].min() == 1.0
    whole, _ = compressed("delta_dct", {"w": x}, 10**6)
    assert whole["w"].meta["bits"] == [[4, 10], [2, 40], [1, 50], [0, 0]]


# ImPart


def test_the_drop_rates_of_impart_by_hand():
    """Eight ranks, half of them pruned, a quarter of all entries wanted: (0.75 - 0.5) / 0.5 = 0.5."""
    rates = module("impart").drop_rates
    values = torch.tensor([16.0, 4.0, 1.0, 0.25, 0.1, 0.1, 0.1, 0.1], dtype=torch.float64)
    # shares of the first, by C = 0.5: 1, 1/2, 1/4, 1/8; of 8/4 = 2 ranks' entries 1 + 0.75 are left
    assert rates(values, 0.25, 0.5, 0.5).tolist() == [0.0, 0.25]
    assert rates(values, 0.3, 0.5, 0.5).tolist() == pytest.approx([0.0, 0.2])
    assert rates(values, 0.5, 0.5, 0.5).tolist() == [0.0, 0.0, 0.0, 0.0]
    assert rates(values, 0.05, 0.5, 0.5).tolist() == pytest.approx([0.6])


def test_the_mean_of_imparts_deltas_is_the_delta_of_its_ranks():
    impart = module("impart")
    x = (normal(20, 10) * torch.logspace(0, -1, 10)) @ normal(10, 30, seed=1)
    options = {"density": 0.1, "pruned": 0.8, "exponent": 0.5}
    draws = [decode(impart.Factors(x, seed).encoded(**options)) for seed in range(300)]
    rates = impart.drop_rates(torch.linalg.svdvals(x.double()), *options.values())
    u, s, v = torch.linalg.svd(x)
    kept = (u[:, : len(rates)] * s[: len(rates)]) @ v[: len(rates)]
    assert len(rates) == 2 and rates[1] > 0.05
    assert (draws[0] - kept).norm() > 0.1 * kept.norm()
    assert (sum(draws) / 300 - kept).norm() < 0.03 * kept.norm()


def test_imparts_least_sparsity_is_what_the_budget_holds():
    x = normal(120, 150)
    kept = []
    for budget in (200, 3000, 8000):
        encoded, _ = compressed("impart", {"w": x, "b": torch.ones(4)}, budget)
        kept.append(sum(encoded["w"].meta[side][0] for side in ("left", "right")))
        assert payload_bytes(*encoded["w"].spec) > 0.8 * (budget - 8)
    assert kept == sorted(kept)
    with pytest.raises(OverBudget, match="one entry of every matrix's factors; raise it"):
        compressed("impart", {"w": x}, 2)


# LoRAQuant


def test_loraquant_rounds_the_first_ranks_and_keeps_signs_of_the_others():
    """Written out from the paper: B = U S^1/2 and A = S^1/2 V^T; one group a row here."""
    x = (normal(12, 12) * torch.logspace(0, -1, 12)) @ normal(12, 20, seed=1)
    encoded, found = compressed("loraquant", {"w": x, "b": torch.ones(3)}, rank=8, ratio=0.9)
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    high = 1 + int((s[:8].square().cumsum(0) / s[:8].square().sum() < 0.9).sum())
    assert 1 < high < 8
    assert encoded["w"].meta["grid"][:2] == [high, 2] and encoded["w"].meta["signs"][0] == 8 - high

    def kept(factor):
        """Rows (ranks) of a factor."""
        low, top = factor.amin(1).clamp(max=0), factor.amax(1).clamp(min=0)
        step = ((top - low) / 3)[:, None]
        zero = (-low[:, None] / step).round()
        grid = ((factor / step + zero).round().clamp(0, 3) - zero) * step
        signs = torch.where(factor > 0, 1.0, -1.0) * factor.abs().mean(1, keepdim=True)
        return torch.cat([grid[:high], signs[high:]])

    root = s[:8].sqrt()[:, None]
    wanted = kept(root * u.T[:8]).T @ kept(root * v[:8])
    # a singular pair may have both signs turned: then zeros of the grid move
    assert float((found["w"] - x).norm()) == pytest.approx(float((wanted - x).norm()), rel=0.1)
    more, _ = compressed("loraquant", {"w": x}, payload_bytes(*encoded["w"].spec) + 2)
    assert sum(more["w"].meta[kind][0] for kind in ("grid", "signs")) == 8


# UltraDelta


def test_the_sparsities_of_ultradelta_by_hand():
    """A third of the parameters each: a step more for those that vary least, a step less for those that vary most."""
    rates = module("ultradelta").sparsities
    found = rates({"a": (3.0, 100), "b": (1.0, 100), "c": (2.0, 100)}, 0.9, 0.05)
    assert found == pytest.approx({"b": 0.95, "c": 0.9, "a": 0.85})
    # 60 + 30 parameters above the last third: the 10 of the middle one are at the target
    found = rates({"a": (3.0, 60), "b": (1.0, 30), "c": (2.0, 10)}, 0.9, 0.05)
    assert found == pytest.approx({"b": 0.95, "c": 0.9, "a": (90 - 28.5 - 9) / 60})
    assert rates({"a": (1.0, 10), "b": (2.0, 20)}, 0.995, 0.0)["b"] == 0.99


def test_ultradelta_drops_the_same_share_of_every_value():
    x = torch.tensor([0.0, 1.0, 2.0, 3.0]).repeat_interleave(torch.tensor([40, 20, 10, 30]))
    x = x[torch.randperm(100, generator=torch.Generator().manual_seed(0))]
    grouped = module("ultradelta").Grouped(x - 1.25, 2, 0)
    assert torch.allclose(grouped.levels, torch.tensor([-1.25, -0.25, 0.75, 1.75]))
    kept = grouped.mask(0.7)
    assert torch.bincount(grouped.codes[kept].long()).tolist() == [12, 6, 3, 9]
    # a value that is zero is dropped already: of 0.7, 40 of 100 are, and of the others a half goes
    grouped = module("ultradelta").Grouped(x, 2, 0)
    kept = grouped.mask(0.7)
    assert torch.bincount(grouped.codes[kept].long()).tolist() == [0, 10, 5, 15]


def test_what_ultradelta_keeps_is_scaled_by_the_target():
    delta = {
        n: normal(60, 60, seed=i, scale=s)
        for i, (n, s) in enumerate((("a", 1), ("b", 9), ("c", 3)))
    }
    encoded, found = compressed("ultradelta", delta, 2200, step=0.05, factor=0.5)
    shares = {n: float((x != 0).float().mean()) for n, x in found.items()}
    target = 1 - sum(shares.values()) / 3
    assert shares["a"] == pytest.approx(1 - target - 0.05, abs=0.01)
    assert shares["b"] == pytest.approx(1 - target + 0.05, abs=0.01)
    for name, x in delta.items():
        left, step = found[name] != 0, (x.max() - x.min()) / 15
        back = found[name] * (1 - target) / 0.5
        assert (back - x)[left].abs().max() < 0.6 * step


# of all of them


@pytest.mark.parametrize(
    "name",
    ["compeft", "dare", "delta_dct", "impart", "loraquant", "ultradelta", "bitdelta"],
)
def test_more_bytes_never_miss_more(name, monkeypatch):
    """And what is kept of a matrix of zeros is nothing."""
    x = (normal(64, 32) * torch.logspace(0, -1, 32)) @ normal(32, 48, seed=1)
    options = {"bitdelta": {"steps": 0}, "compeft": {"alpha": 1.0}}.get(name, {})
    monkeypatch.setattr(
        module("compeft"),
        "kept_loss",
        lambda context, kept: float((decode(kept["w"]) - x).norm()) if "w" in kept else 1e9,
    )
    delta = {"w": x, "zero": torch.zeros(16, 32)}
    errors = []
    for bytes in (400, 800, 3000):
        _, found = compressed(name, delta, bytes, **options)
        errors.append(float((found.get("w", torch.zeros_like(x)) - x).norm()))
        assert not found.get("zero", torch.zeros(1)).any()
    assert (
        errors == sorted(errors, reverse=True)
        and errors[-1] < 0.999 * errors[0]
        or name == "bitdelta"
    )


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("dare", "density", 0.001),
        ("compeft", "alpha", 0.0),
        ("impart", "pruned", 1.0),
        ("ultradelta", "bits", 9),
        ("bitdelta", "steps", -1),
        ("delta_dct", "patch", 1),
        ("loraquant", "ratio", 1.5),
        ("delta_come", "solver", "gptq"),
    ],
)
def test_options_out_of_their_range_are_refused(name, option, value):
    kind = plugins.load("strategy", name)
    with pytest.raises(CLGraftError, match=option):
        plugins.check_options("strategy", name, kind, {option: value})
