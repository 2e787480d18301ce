"""Operations, seconds and bytes, by hand."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest

from cl_graft.config import Launch
from cl_graft.errors import CLGraftError
from cl_graft.planning import cost
from cl_graft.task import Example, Task, Training
from cl_graft.training.config import sft_job
from cl_graft.training.fit import fit


def test_six_operations_for_each_parameter_and_token_and_two_more_with_checkpointing():
    assert cost.train_flops(1000, 10) == 60_000
    assert cost.train_flops(1000, 10, checkpointing=True) == 80_000
    assert cost.train_flops(1000, 10, trained=50) == (4 * 1000 + 2 * 50) * 10
    assert cost.train_flops(1000, 10, reference_tokens=5) == 60_000 + 2 * 1000 * 5


def test_seconds_follow_from_the_share_of_the_peak_that_is_reached():
    assert cost.train_seconds(8 * 10**12, peak=1e12, devices=2, utilisation=0.5) == 8
    for wrong in (0, 1.5):
        with pytest.raises(CLGraftError, match="utilisation"):
            cost.train_seconds(1, 1e12, utilisation=wrong)


def test_a_probe_leaves_out_setting_up_and_the_first_step(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(cost, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def train(progress):
        for pause in (30.0, 2.0, 4.0):
            now[0] += pause
            progress(0.5, "")

    assert cost.probe(train) == pytest.approx(3.0)
    with pytest.raises(CLGraftError, match="two steps"):
        cost.probe(lambda progress: progress(1.0, ""))


def test_a_probe_of_a_real_stage(nano, tmp_path):
    rows = [Example(f"Q: {i}", "a") for i in range(4)]
    job = sft_job(Task("t", rows, (), "exact", training=Training(steps=3, batch=2)), 0)
    begun = time.perf_counter()
    found = cost.probe(lambda progress: fit(*nano, *job, Launch(), tmp_path, progress=progress))
    assert 0 < found < (time.perf_counter() - begun) / 2


def test_a_step_checkpoint_is_weights_and_optimizer():
    assert cost.stage_bytes(100) == 400
    assert cost.step_bytes(100) == 1200  # 4 + 8
    assert cost.step_bytes(100, stage=2) == 2000  # 4 + 4 + 12
    assert cost.step_bytes(100, stage=3) == 1600  # 4 + 12
    assert cost.step_bytes(100, stage=3, precision="bf16") == 1400  # 2 + 12
    assert cost.step_bytes(100, trained=10, adapter=True) == 120
    assert cost.step_bytes(100, trained=10) == 480  # all weights, the moments of ten


def test_a_step_checkpoint_is_as_large_as_said(tmp_path, nano):
    """The Trainer's own checkpoint of nano-llama, less the tokenizer and what does not grow with the model."""
    from transformers import Trainer, TrainingArguments

    model, _ = nano
    rows = [{"input_ids": [3, 4, 5], "labels": [3, 4, 5]}] * 2
    arguments = TrainingArguments(
        str(tmp_path), max_steps=1, save_steps=1, report_to=[], use_cpu=True, disable_tqdm=True
    )
    Trainer(model, arguments, train_dataset=rows).train()
    folder = tmp_path / "checkpoint-1"
    files = [folder / "model.safetensors", folder / "optimizer.pt"]
    total = sum(p.numel() for p in model.parameters())
    assert sum(f.stat().st_size for f in files) == pytest.approx(cost.step_bytes(total), rel=0.05)


@pytest.mark.parametrize("peak", [0.0, -1.0, float("inf"), float("nan")])
def test_a_peak_that_is_none_is_refused(peak):
    with pytest.raises(CLGraftError, match="give one as 989e12"):
        cost.train_seconds(1, peak)
