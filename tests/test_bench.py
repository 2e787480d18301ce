"""The benchmark's parts at a small size: what they report, and that the textbook is a fair one."""

from __future__ import annotations

import json

import pytest
import torch

from cl_graft.bench import layer, textbook
from cl_graft.bench.compose import TASKS, bench_compose
from cl_graft.bench.error import bench_error
from cl_graft.bench.layer import bench_layer, relative
from cl_graft.bench.lossless import bench_lossless
from cl_graft.bench.merge import bench_merge
from cl_graft.bench.methods import bench_methods, methods
from cl_graft.bench.size import bytes_over_entropy, bytes_over_theory
from cl_graft.bench.table import markdown, write
from cl_graft.skillpack.codecs import coded_low_rank, dense, quantized_low_rank, sparse
from cl_graft.skillpack.codecs.quant import round_to_nearest
from cl_graft.skillpack.compress.gptq import gptq_many
from cl_graft.skillpack.format.file import SkillPack
from tests.model_folders import llama, saved, tuned


def moment(cols, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(512, cols, generator=g) @ torch.randn(cols, cols, generator=g)
    return x, x.T @ x / len(x)


def test_the_textbooks_gptq_is_gptq():
    """Far below rounding to nearest, and as good as our solver with the same grids and no extras."""
    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(1))
    x, hessian = moment(64)
    plain = {"search": False, "polish": 0, "act_order": True, "group_size": 128}
    ours = relative(x, weight, gptq_many([weight], hessian, 3, **plain)[0].dequantize())
    theirs = relative(x, weight, textbook.gptq(weight, hessian, 3))
    nearest = relative(x, weight, round_to_nearest(weight, 3, 128, search=False).dequantize())
    assert theirs == pytest.approx(ours, rel=0.05)
    assert theirs < 0.7 * nearest


def test_the_textbook_is_held_to_the_same_bytes():
    shape, budget = (96, 128), 0.1 * 2 * 96 * 128
    counts = textbook.ranks_within(shape, budget)
    used = sum(textbook.stored(shape, k, bits) for bits, k in counts.items())
    more = {**counts, 2: counts[2] + 2}
    assert used <= budget < sum(textbook.stored(shape, k, bits) for bits, k in more.items())
    assert counts[8] == 1 and list(counts) == [8, 4, 2]


def test_more_ranks_bring_the_textbook_to_the_delta():
    delta = torch.randn(32, 48, generator=torch.Generator().manual_seed(0))
    x, hessian = moment(48)
    errors = [
        relative(x, delta, textbook.compress(delta, hessian, counts))
        for counts in ({8: 4}, {8: 16}, {8: 32})
    ]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.02


def test_a_layer_is_compressed_by_both_at_the_same_bytes():
    found = bench_layer(hidden=128, inner=256, samples=16, length=32)
    assert found["mean_error"]["ours"] < found["mean_error"]["textbook"] < 1
    assert found["time_ratio"] > 0 and found["conditions"]["matrices"].startswith("4 of 128x128")


def test_the_error_on_a_trained_delta(tiny_scenario, tmp_path):
    row = bench_error("nano-llama", tiny_scenario.tasks[0], 0, tmp_path)
    assert 0 < row["error"] < row["textbook_error"] < 1 and row["matrices"] == 14


def test_methods_are_measured_within_the_same_budget_on_the_same_delta(tiny_scenario, tmp_path):
    """An SVD that keeps all but nothing has no error left; less budget, more error; what does not fit says so."""
    chosen = [("svd", {}), ("svd", {"rank": 24}), ("dare", {})]
    found = bench_methods(
        "nano-llama", tiny_scenario.tasks[0], 0, tmp_path, None, chosen, ["200%", "10%", "300B"]
    )
    whole, _, dare, small, refused, _, *none = found["rows"]
    assert whole["error"] < 0.01 < small["error"] < 1 and small["bytes"] <= 12643
    assert whole["loss"] == pytest.approx(found["tuned_loss"], rel=1e-3)
    # 255 of 256 parts of a delta in 16 bit are all but the whole; the rest is scaled up
    assert dare["error"] < 0.1 and dare["of_budget"] <= 1
    assert "largest that fits" in refused["refused"]
    assert all("raise it" in row["refused"] for row in none)
    text = markdown({"methods": found})
    assert "| error, svd, 10% | " in text and "| error, svd(rank=24), 10% | - | " in text


def test_all_methods_of_a_delta_are_measured():
    names = {name for name, _ in methods()}
    assert {"bitdelta", "compeft", "dare", "delta_come", "delta_dct", "impart"} < names
    assert {"loraquant", "ultradelta", "graftllm", "graftllm_adaptive", "magnitude"} < names
    assert not names & {"individual", "sequential", "lora", "model_tailor", "ties"}


def test_bytes_over_theory_by_hand(tmp_path):
    """8 values of 16 bits; 1 of 64 positions, log2(64) bits; two 4-bit factors of 1 x 64 with one group each."""
    x = torch.zeros(8, 8)
    x[3, 3] = 1.0
    q = round_to_nearest(torch.randn(1, 64), 4, 64)
    tensors = {
        "norm": dense(torch.ones(8)),
        "table": sparse(x, x > 0),
        "matrix": quantized_low_rank([(q, q)], (64, 64)),
    }
    pack = SkillPack(tensors, task="t", method="m", options={}, base="0" * 32)
    size = pack.save(tmp_path / "p.safetensors")
    theory = (8 * 16 + (16 + 6) + 2 * (64 * 4 + 20)) / 8
    found = bytes_over_theory(tmp_path / "p.safetensors")
    assert found["theory_bytes"] == round(theory)
    assert found["bytes_over_theory"] == pytest.approx(size / theory)


def test_the_time_of_a_layer_is_over_that_of_the_earlier_engine(monkeypatch, tmp_path):
    runs = {
        tmp_path: {"calibration": 6.0, "rest": 4.0, "error": 0.2},
        layer.Path(layer.__file__).parents[2]: {"calibration": 2.0, "rest": 3.0, "error": 0.1},
    }
    monkeypatch.setattr(layer, "_engine", lambda folder, *sizes: runs[folder])
    found = layer.over_previous(tmp_path, 1)
    assert (found["layer_time_over_previous"], found["error_over_previous"]) == (0.5, 0.5)


def test_bytes_over_entropy_by_hand(tmp_path):
    """16 numbers of a row, a half of them 1 and a half -1: 2 bytes; 8 that are all 3: none; a scale of 2 bytes each."""
    left = torch.tensor([[1, -1] * 8]).short()
    encoded = coded_low_rank(left, torch.full((1, 8), 3).short(), torch.ones(1), (16, 8))
    kinds = encoded.parts["kinds"].tolist()
    assert kinds[:2] == [0, 0] and kinds[2] != kinds[3]  # no shifts; rows of two classes
    pack = SkillPack({"w": encoded}, task="t", method="m", options={}, base="0" * 32)
    size = pack.save(tmp_path / "p.safetensors")
    found = bytes_over_entropy(tmp_path / "p.safetensors")
    assert found["entropy_bytes"] == 2 + 2
    assert found["bytes_over_entropy"] == pytest.approx(size / 4)


def test_the_table_has_a_row_for_every_figure(tmp_path):
    found = {
        "time": bench_layer(hidden=64, inner=128, samples=8, length=16),
        "merge": {"runs": [bench_merge(0.05, "float32", ((64, 64), (64, 128)), repeats=1)]},
    }
    text = markdown(found)
    assert text.count("\n") == 5 and "time_ratio" in text
    assert "merge_over_product" in text and "switch_over_merge" in text
    write(found, tmp_path / "out", ["cl-graft bench pack"])
    made = json.loads((tmp_path / "out" / "pack.json").read_text())
    assert made["made_by"]["torch"] == torch.__version__
    assert text in (tmp_path / "out" / "pack.md").read_text()


def test_a_lossless_pack_beside_general_compressors(tmp_path):
    base, after = saved(llama(), tmp_path / "base"), saved(tuned(llama()), tmp_path / "tuned")
    found = bench_lossless([(base, after)])
    assert [(row["delta"], row["dtype"]) for row in found["rows"]] == [
        ("tuned", "float32"),
        ("tuned", "bfloat16"),
    ]
    for row in found["rows"]:
        size = 17056 * (4 if row["dtype"] == "float32" else 2)
        assert row["share"] == row["bytes"] / size and 0.9 < row["changed"] <= 1
        assert 0.5 < row["others"]["zip -9 of the tuned"] < 1.1
    text = markdown({"lossless": found})
    assert "lossless, tuned, bfloat16" in text and "published" in text


@pytest.mark.slow
def test_peak_memory_of_strategies_is_told_with_what_they_keep():
    small = {"vocab_size": 512, "hidden_size": 72, "intermediate_size": 96, "num_hidden_layers": 1}
    found = bench_compose(("individual", "ties"), small)
    peaks, runs = found["peaks_mb"], found["runs"]
    assert found["ties_over_individual"] == peaks["ties"] / peaks["individual"]
    for name in peaks:
        whole = 2 * TASKS * runs[name]["parameters"] / 1e6
        assert whole < runs[name]["kept_mb"] < 1.2 * whole and peaks[name] > runs[name]["kept_mb"]


def test_a_misspelt_part_is_answered_with_the_nearest(call):
    done = call("bench", "pack", "--only", "tyme")
    assert done.code == 1 and "did you mean time" in done.err
    done = call("bench", "pack", "--only", "lossless", "--tuned", "somewhere")
    assert done.code == 1 and "name the base and the tuned model" in done.err


@pytest.mark.slow
def test_training_is_compared_over_the_same_batches():
    """The loop's weights are the stage's, so both did the same work; ratios and parts of a tiny run are all there."""
    from dataclasses import replace

    from cl_graft.bench import train

    tiny = train.Subject(replace(train.MINI.case, hidden=32, inner=64, heads=2, batch=4), 4, 1)
    ends = []
    for run in (train.loop, train.sft):
        model, tokenizer, stage = train.made(tiny)
        clock = train.Clock()
        run(model, tokenizer, *stage, clock)
        assert len(clock.times) == 5
        ends.append(dict(model.named_parameters()))
    for name, one in ends[0].items():
        torch.testing.assert_close(one, ends[1][name], rtol=0, atol=1e-5)
    found = train.bench_loop((tiny,))["mini-llama"]
    for key in ("sft_over_loop", "sft_over_loop_with_setup", "peak_over_loop"):
        assert found[key] > 0
    assert all(ms > 0 for ms in found["sft_parts_ms"].values())
    assert "| sft_over_loop | " in train.markdown({"mini-llama": found})


@pytest.mark.slow
def test_evaluation_is_compared_by_equal_answers(monkeypatch):
    """On a model of our own, whose answers of a few tokens take longer in other ways; what is told is all there."""
    from cl_graft.bench import evaluate

    monkeypatch.setattr(evaluate, "MOST", 6)
    found = evaluate.bench_evaluate("nano-llama", turns=2)
    assert found["equal_answers"] == found["equal_choices"] == 1
    assert found["likelihoods_apart"] < 1e-4
    assert all(found[name] > 0 for name in evaluate.RATIOS)
    assert found["conditions"]["new_tokens"]["most"] <= 6
    assert all(peak > 1 for peak in found["peaks_over_weights"].values())
    assert "| evaluate_speedup | " in evaluate.markdown(found)
