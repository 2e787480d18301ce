"""How bytes are shared out: what a plan keeps, that it only shrinks, and options that make no sense."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cl_graft.errors import UnknownName
from cl_graft.skillpack.codecs import payload_bytes, sparse
from cl_graft.skillpack.compress.policy import (
    METHODS,
    Adaptive,
    BadPolicy,
    Paper,
    Profile,
    read_policy,
    sparse_bytes,
)


def matrix(role="mlp", shape=(64, 96), fall=0.8):
    worth = fall ** torch.arange(min(shape), dtype=torch.float64)
    return Profile("matrix", role, shape, worth)


@given(st.floats(0, 1))
@settings(max_examples=40, deadline=None)
def test_a_higher_knob_never_keeps_more(share):
    profiles = {"a": matrix(), "b": matrix("attention", (32, 64), 0.5)}
    plans = [Paper().plan(profiles, knob) for knob in (share * 0.9, share * 0.9 + 0.1)]
    for name in profiles:
        more, less = (sum(b * k for b, k in plan.counts[name].items()) for plan in plans)
        assert less <= more


def test_a_massive_activation_does_not_drown_what_the_others_say():
    """A share of the mean diagonal would add 10 to inputs whose own moment is 1."""
    hessian = torch.eye(64)
    hessian[5, 5] = 64_000
    added = (Adaptive(damping=0.01).regular(hessian) - hessian).diagonal()
    assert added[0] == pytest.approx(0.02)
    assert added[5] == pytest.approx(640.01, rel=1e-4)
    assert (Paper(damping=0.01).regular(hessian) - hessian).diagonal()[0] > 10


def test_the_papers_split_by_hand():
    """20/180/800 of 1,000 ranks at 8/4/2 bits, for attention; 1.4 times as many for the MLP."""
    profiles = {
        "attention": matrix("attention", (1000, 1000), 1.0),
        "mlp": matrix("mlp", (4000, 4000), 1.0),
        "few": Profile("matrix", "attention", (8, 8), torch.ones(8, dtype=torch.float64)),
    }
    plan = Paper().plan(profiles, 0.0)
    assert plan.counts["attention"] == {8: 20, 4: 180, 2: 800}
    assert sum(Paper().plan(profiles, 0.9).counts["mlp"].values()) == round(1.4 * 0.1 * 4000)
    assert Paper(rank=50).plan(profiles, 0.5).counts["attention"] == {8: 1, 4: 9, 2: 40}
    assert plan.counts["few"][8] == 1  # never none at the highest precision


def test_beta_is_the_share_of_the_energy_that_mlp_ranks_keep():
    worth = torch.tensor([80.0, 15.0, 5.0, 0.0], dtype=torch.float64)
    profiles = {"mlp": Profile("matrix", "mlp", (4, 4), worth)}
    assert sum(Paper(beta=0.95).plan(profiles, 0.5).counts["mlp"].values()) == 2


@pytest.mark.parametrize("share", [0.001, 0.01, 0.1, 0.4])
def test_the_estimate_of_a_sparse_tensor_is_close(share):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(200, 500, generator=g)
    mask = torch.rand(x.shape, generator=g) < share
    stored = payload_bytes(*sparse(x, mask).spec)
    assert math.isclose(sparse_bytes(int(mask.sum()), x.numel()), stored, rel_tol=0.06)


def test_options_come_from_a_file(tmp_path):
    (tmp_path / "p.json").write_text(json.dumps({"layout": "fast", "damping": 0.05}))
    (tmp_path / "p.toml").write_text("alpha = 0.02\n[split]\n8 = 0.5\n2 = 0.5\n")
    assert read_policy("graftllm_adaptive", tmp_path / "p.json") == Adaptive(
        layout="fast", damping=0.05
    )
    found = read_policy("graftllm", tmp_path / "p.toml")
    assert (found.alpha, dict(found.split)) == (0.02, {8: 0.5, 2: 0.5})
    assert read_policy("graftllm") == Paper()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"alpha": 1.5}, "alpha is 1.5; give 0 to 1"),
        ({"beta": 0}, "beta is 0"),
        ({"rank": 0}, "rank is 0; give 1 or more"),
        ({"group_size": 0}, "group_size is 0"),
        ({"damping": -1.0}, "damping is -1.0"),
        ({"split": {7: 1.0}}, "split"),
        ({"split": {8: 0.5, 2: 0.4}}, "add up to 1"),
    ],
)
def test_values_that_make_no_sense_are_named(options, words):
    with pytest.raises(BadPolicy, match=words):
        Paper(**options)


def test_a_layout_that_does_not_exist_is_named():
    with pytest.raises(BadPolicy, match="layout is 'tiny'; give small or fast"):
        Adaptive(layout="tiny")


def test_a_misspelt_option_or_method_is_answered_with_the_nearest(tmp_path):
    (tmp_path / "p.json").write_text('{"rnak": 4}')
    with pytest.raises(UnknownName, match="did you mean rank"):
        read_policy("graftllm", tmp_path / "p.json")
    with pytest.raises(UnknownName, match="graftllm_adaptive"):
        read_policy("graftllm-adaptiv")
    (tmp_path / "p.json").write_text('{"rank": "four"}')
    with pytest.raises(BadPolicy, match="wrong type"):
        read_policy("graftllm", tmp_path / "p.json")
    with pytest.raises(BadPolicy, match="cannot be read"):
        read_policy("graftllm", tmp_path / "none.json")
    assert set(METHODS) == {"graftllm", "graftllm_adaptive"}
