"""The factors of a delta by auto-gptq's own class, where that is installed: as released, and as they are stored."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch

from cl_graft.errors import CLGraftError
from cl_graft.skillpack.codecs import decode
from cl_graft.skillpack.compress import auto_gptq
from cl_graft.skillpack.compress.auto_gptq import encode, quantise, spec_of
from cl_graft.skillpack.compress.factorise import Factored, spectrum
from cl_graft.skillpack.compress.gptq import gptq_many
from cl_graft.skillpack.compress.policy import Adaptive, BadPolicy, Paper, solved_by

there = pytest.mark.skipif(
    importlib.util.find_spec("auto_gptq") is None, reason="auto-gptq 0.7.1 is not installed"
)
COUNTS = {8: 2, 3: 6, 2: 20}


def problem(rows, cols, seed=0):
    g = torch.Generator().manual_seed(seed)
    inputs = torch.randn(512, cols, generator=g) @ (
        torch.randn(cols, cols, generator=g) * 0.2 + torch.eye(cols)
    )
    sizes = torch.arange(1, min(rows, cols) + 1) ** -0.7
    left = torch.randn(rows, len(sizes), generator=g) * sizes
    delta = left @ torch.randn(len(sizes), cols, generator=g) * 1e-4
    return delta, inputs, inputs.T @ inputs / len(inputs)


def error(delta, kept, inputs):
    return float((inputs @ (delta - kept).T).norm() / (inputs @ delta.T).norm())


@there
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(("bits", "group_size"), [(2, 16), (3, 40), (8, 64)])
def test_what_is_stored_is_what_the_class_left_in_its_layer(
    bits, group_size, act_order, monkeypatch
):
    """Its dequantised weight, from codes, zeros and scales in 16 bit."""
    weight, _, hessian = problem(24, 64)
    left, solver = [], auto_gptq.solver()

    class Seen(solver):
        def fasterquant(self, **options):
            found = super().fasterquant(**options)
            left.append(self.layer.weight.data.clone())
            return found

    monkeypatch.setattr(auto_gptq, "solver", lambda: Seen)
    kept = quantise(weight, hessian, bits, group_size, damping=0.01, act_order=act_order)
    wanted = left[0] * 2.0**kept.exponent
    assert (kept.dequantize() - wanted).norm() < 1e-3 * wanted.norm()
    assert kept.codes.unique().numel() <= 2**bits


@there
def test_it_is_gptq_as_ours_is_on_the_same_grids():
    weight, inputs, hessian = problem(24, 64)
    theirs = quantise(weight, hessian, 3, 64, damping=0.01, act_order=True).dequantize()
    plain = {"search": False, "polish": 0, "act_order": True, "group_size": 64}
    ours = gptq_many([weight], hessian, 3, **plain)[0].dequantize()
    assert error(weight, theirs, inputs) == pytest.approx(error(weight, ours, inputs), rel=0.1)


@there
@pytest.mark.parametrize(("rows", "cols"), [(40, 56), (56, 40)])
def test_factors_are_those_of_the_released_pipeline(rows, cols):
    """V band by band on the inputs, then U on what the quantised V makes of them, written out here."""
    delta, inputs, hessian = problem(rows, cols)
    options = {"damping": 0.01, "act_order": True}
    u, s, vt = torch.linalg.svd(delta, full_matrices=False)
    wanted, first = torch.zeros_like(delta), 0
    for bits, count in COUNTS.items():
        ranks = slice(first, first + count)
        right = s[ranks, None] * vt[ranks]
        kept = quantise(right, hessian, bits, min(16, cols), **options).dequantize()
        reads = kept @ hessian @ kept.T
        wanted += quantise(u[:, ranks], reads, bits, min(16, count), **options).dequantize() @ kept
        first += count
    matrix = Factored(delta, spectrum(delta, None), COUNTS)
    (encoded,) = encode([matrix], hessian, group_size=16, **options)
    assert encoded.spec == spec_of(COUNTS, (rows, cols), 16)
    found = decode(encoded)
    assert error(delta, found, inputs) == pytest.approx(error(delta, wanted, inputs), rel=0.05)
    assert error(delta, found, inputs) < 0.6


@there
def test_nothing_of_the_package_stays_behind():
    auto_gptq.solver.cache_clear()
    before = torch.cuda.synchronize, torch.backends.cuda.matmul.allow_tf32
    quantise(torch.eye(8), torch.eye(8), 4, 8, damping=0.01, act_order=False)
    assert before == (torch.cuda.synchronize, torch.backends.cuda.matmul.allow_tf32)
    assert not [name for name in sys.modules if "auto_gptq" in name.split(".")[0]]


def test_where_it_is_not_installed_the_command_is_told(monkeypatch):
    monkeypatch.setattr(auto_gptq, "PACKAGE", "auto_gptq_that_nobody_has")
    with pytest.raises(CLGraftError, match=r"`pip install --no-deps auto-gptq==0\.7\.1`\.$"):
        auto_gptq.require()


def test_the_solver_is_the_papers_alone():
    assert solved_by(Paper(), "auto-gptq") == Paper(solver="auto-gptq")
    assert solved_by(Adaptive(), "cl-graft") == Adaptive()
    with pytest.raises(CLGraftError, match="add --method graftllm"):
        solved_by(Adaptive(), "auto-gptq")
    with pytest.raises(CLGraftError, match="no solver named 'autogptq'.*did you mean auto-gptq"):
        solved_by(Paper(), "autogptq")
    for wrong in ({"solver": "gptq"}, {"solver": "auto-gptq", "refit": True}):
        with pytest.raises(BadPolicy, match="solver is"):
            Paper(**wrong)


@there
def test_a_matrix_stored_the_other_way_is_refused_before_anything_is_computed():
    with pytest.raises(CLGraftError, match=r"h\.0\.weight is stored \(in, out\)"):
        auto_gptq.require(["h.0.weight"])


@there
def test_a_pack_is_made_by_it(tmp_path, call):
    """The command on two folders: its factors are products, and its header says who made them."""
    from cl_graft.skillpack.format.file import SkillPack
    from tests.test_cli_pack import save_llama

    folders = [save_llama(tmp_path / name, seed) for seed, name in enumerate(("base", "tuned"))]
    words = ["pack", "create", "--base", folders[0], "--tuned", folders[1], "--budget", "20%"]
    words += ["--out", tmp_path / "p", "--solver", "auto-gptq"]
    refused = call(*words)
    assert refused.code == 1 and refused.err.strip().endswith("add --method graftllm.")
    assert call(*words, "--method", "graftllm").code == 0
    pack = SkillPack.load(tmp_path / "p")
    codecs = {e.codec for n, e in pack.tensors.items() if "proj" in n}
    assert codecs == {"quantized_product"} and pack.options["solver"] == "auto-gptq"
