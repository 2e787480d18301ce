"""The two SVD baselines: the best approximation of their rank, as many ranks as the budget holds."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch

from cl_graft import plugins
from cl_graft.skillpack.codecs import decode
from cl_graft.stream import benchmark
from cl_graft.training.delta import Delta


def delta_of(strategy: Any, scenario: Any) -> dict[str, torch.Tensor]:
    """Trains the first task and returns its delta beside the pack it left."""
    seen: dict[str, torch.Tensor] = {}
    teach = strategy.teach

    def spy(model: Any, task: Any) -> Any:
        folder = teach(model, task)
        seen.update(Delta(folder, strategy.base, "cpu"))
        return folder

    strategy.teach = spy
    strategy.train(benchmark(scenario).train_stream[0], eval_streams=[])
    return seen


def truncated(x: torch.Tensor, rank: int) -> torch.Tensor:
    u, s, v = torch.linalg.svd(x.double(), full_matrices=False)
    return ((u[:, :rank] * s[:rank]) @ v[:rank]).float()


def test_svd_is_the_best_approximation_of_its_rank(build: Any, tiny_scenario: Any) -> None:
    strategy = build("svd", budget="30%", rank=4)
    delta = delta_of(strategy, tiny_scenario)
    tensors = strategy.packs[0].tensors
    assert tensors.keys() == delta.keys()
    for name, x in delta.items():
        kept = decode(tensors[name])
        if x.ndim < 2:
            assert tensors[name].codec == "dense" and torch.equal(kept, x.bfloat16().float())
            continue
        assert tensors[name].spec == ("low_rank", tuple(x.shape), {"dtype": "BF16", "rank": 4})
        best = truncated(x, 4)
        assert (kept - best).norm() <= 0.01 * x.norm(), name  # bf16 of two factors


def test_the_rank_is_the_largest_that_the_budget_holds(build: Any, tiny_scenario: Any) -> None:
    strategy = build("svd", budget="20%")
    delta_of(strategy, tiny_scenario)
    tensors = strategy.packs[0].tensors
    (rank,) = {e.meta["rank"] for e in tensors.values() if e.codec == "low_rank"}
    more = sum(2 * sum(e.shape) for e in tensors.values() if e.codec == "low_rank")
    assert strategy.packs[0].nbytes <= strategy.budget.bytes < strategy.packs[0].nbytes + more
    assert rank > 1


def test_a_matrix_is_kept_whole_where_its_factors_would_be_no_smaller(
    build: Any, tiny_scenario: Any
) -> None:
    """24 x 48 (keys and values): 16 ranks of 72 numbers are 1,152, as many as it holds itself."""
    strategy = build("svd", budget="100%", rank=16)
    delta = delta_of(strategy, tiny_scenario)
    tensors = strategy.packs[0].tensors
    small = [n for n, x in delta.items() if tuple(x.shape) == (24, 48)]
    assert small and all(tensors[n].codec == "dense" for n in small)
    assert any(e.codec == "low_rank" and e.meta["rank"] == 16 for e in tensors.values())


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_factors_are_close_to_the_svd(bits: int, build: Any, tiny_scenario: Any) -> None:
    strategy = build("svd_quant", budget="50%", rank=6, bits=bits)
    delta = delta_of(strategy, tiny_scenario)
    for name, encoded in strategy.packs[0].tensors.items():
        if delta[name].ndim == 2:
            assert encoded.codec == "quantized_low_rank"
            assert [group[:2] for group in encoded.meta["groups"]] == [[6, bits]]
            best = truncated(delta[name], 6)
            allowed = {4: 0.25, 8: 0.02}[bits]
            assert (decode(encoded) - best).norm() <= allowed * best.norm(), name


def test_at_the_same_bytes_quantised_factors_hold_more_ranks_and_err_less(
    build: Any, tiny_scenario: Any
) -> None:
    errors = {}
    for name in ("svd", "svd_quant"):
        strategy = build(name, budget="20%")
        delta = delta_of(strategy, tiny_scenario)
        kept = strategy.packs[0].decode()
        errors[name] = sum(float((kept[n] - x).norm() ** 2) for n, x in delta.items())
        assert strategy.packs[0].nbytes <= strategy.budget.bytes
    assert errors["svd_quant"] < errors["svd"]


@pytest.mark.parametrize("name", ["svd", "svd_quant"])
def test_what_did_not_change_costs_nothing_or_little(name: str, build: Any) -> None:
    """A delta of zeros (a frozen embedding, say) is no trouble."""
    function = plugins.load("strategy", name).function

    class Context:
        budget = type("Budget", (), {"text": "1MB", "bytes": 10**6})
        shapes: ClassVar = {"zero": (8, 16), "some": (8, 16), "bias": (8,)}

        @staticmethod
        def cost_of(specs: Any) -> int:
            return len(specs)

    delta = {"zero": torch.zeros(8, 16), "some": torch.randn(8, 16), "bias": torch.ones(8)}
    encoded = function(delta, Context(), rank=2)
    for key, x in delta.items():
        kept = decode(encoded[key]) if key in encoded else torch.zeros_like(x)
        assert torch.isfinite(kept).all() and (key == "some" or torch.equal(kept, x))
