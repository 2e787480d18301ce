"""The plan's memory: sums by hand where there are formulas, the allocator's count where a pass is traced."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import LlamaConfig, Qwen3MoeConfig

from cl_graft.bench.plan import MINI, TEXT, Case, compare, measured
from cl_graft.errors import CLGraftError
from cl_graft.models.embedded import toy_tokenizer
from cl_graft.planning.memory import Job, estimate
from cl_graft.planning.trace import Meter, trace
from cl_graft.task import Example, Pair, Preference, Task, Training
from cl_graft.training.config import dpo_job, sft_job
from cl_graft.training.tokens import lengths, tokens
from tests.models.test_roles import FAMILIES

SMALL = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    tie_word_embeddings=True,
)
# embedding 64x32, per layer four 32x32, three 32x64 and two norms of 32, the last norm
N = 64 * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 64 + 2 * 32) + 32
JOB = Job("sft", micro_batch=2, length=16)


@pytest.mark.parametrize(
    "case",
    [
        MINI,
        replace(MINI, kind="dpo", checkpointing=True),
        replace(TEXT, accumulation=2),
        replace(TEXT, lora=True, checkpointing=True),
    ],
    ids=lambda case: f"{case.name}-{case.kind}",
)
def test_the_estimate_is_what_the_allocator_sees(case):
    row = compare(case)
    assert row["ratio"] == pytest.approx(1, abs=0.25)
    assert row["measured_mb"] > row["parts_mb"]["parameters"] * 4


class Experts(Case):
    """A mixture of experts, whose grouped products torch 2.13 has shapes for in bfloat16 alone."""

    @property
    def config(self):
        dense = super().config.to_dict()
        experts = {"moe_intermediate_size": 128, "num_experts": 8, "num_experts_per_tok": 2}
        return Qwen3MoeConfig(**{**dense, **experts, "head_dim": 32, "model_type": "qwen3_moe"})


def test_the_estimate_of_a_mixture_of_experts_is_what_the_allocator_sees():
    row = compare(Experts("experts", 128, 384, 2, 4, 224, batch=16, length=64))
    assert row["ratio"] == pytest.approx(1, abs=0.1)


# before, OPT made its mask by a number that it read from the padding, which tensors without contents do not have
TRACES_OPT = Version(transformers.__version__) >= Version("5.23")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_of_every_family_is_traced(family):
    if "opt" in family and not TRACES_OPT:
        with pytest.raises(CLGraftError, match="memory of SFT on a model of type 'opt' cannot be"):
            estimate(FAMILIES[family][0](), replace(JOB, length=4))
        return
    found = estimate(FAMILIES[family][0](), replace(JOB, length=4))
    assert found.activations > 0 and found.optimizer == 2 * found.gradients > 0


def test_a_model_whose_step_cannot_be_traced_is_refused_in_a_sentence(monkeypatch):
    def data_dependent(self, hidden, *args, **kwargs):
        return hidden[: int(hidden.sum())]

    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaMLP.forward", data_dependent)
    with pytest.raises(CLGraftError, match="memory of SFT on a model of type 'llama' cannot be"):
        estimate(SMALL, JOB)


def test_the_measurement_counts_what_is_held_before_and_the_highest_moment():
    layer = torch.nn.Linear(250, 1000, bias=False)  # 1 MB
    with measured(layer) as peak:
        for _ in range(3):
            torch.empty(500_000)  # 2 MB, gone each time
    assert peak.bytes == pytest.approx(3e6, rel=0.01)


def test_the_meter_counts_a_storage_once_and_until_it_is_freed():
    meter = Meter()
    with meter:
        x = torch.ones(1000)  # 4000 bytes
        y = x.view(10, 100) * 2  # 4000 more; the view is none
        del x
        z = y[:5] + 1  # 2000 more, where 4000 have gone
    assert meter.peak == 8000 and meter.now == 6000
    del z


def test_without_zero_all_is_in_fp32_and_tied_weights_count_once():
    found = estimate(SMALL, JOB)
    assert found.parameters - 4 * N in range(0, 200)  # the rotary frequencies, too
    assert (found.gradients, found.optimizer, found.buffers, found.host) == (4 * N, 8 * N, 0, 0)
    assert found.device == 4 * N + found.parameters + 8 * N + found.activations


def test_zero_divides_what_it_says_by_the_number_of_processes():
    """Rajbhandari et al. 2020: stage 2 divides gradients and optimizer states, stage 3 the parameters, too."""
    share = N / 4
    two = estimate(SMALL, replace(JOB, stage=2, processes=4, bucket=1000))
    three = estimate(SMALL, replace(JOB, stage=3, processes=4, bucket=1000, persistent=100))
    for found in (two, three):
        assert found.gradients == 4 * share
        assert found.optimizer == 12 * share
    assert two.parameters == pytest.approx(4 * N, abs=200)
    norms = 5 * 32
    assert three.parameters == pytest.approx(4 * (norms + (N - norms) / 4), abs=200)
    assert two.buffers == 4000 and three.buffers == 4000 + 4 * (N - norms)


def test_stage_3_gathers_no_more_than_it_may_but_a_whole_tensor():
    def gathered(live):
        job = replace(JOB, stage=3, processes=4, bucket=1000, persistent=100, live=live)
        return estimate(SMALL, job).buffers - 4000

    assert gathered(5000) == 4 * 5000
    assert gathered(10) == 4 * 64 * 32  # the embedding


def test_offloading_moves_sixteen_bytes_for_each_element_of_the_share_to_the_host():
    job = replace(JOB, stage=2, processes=2, bucket=1000)
    here, there = estimate(SMALL, job), estimate(SMALL, replace(job, offload=True))
    assert there.host == 16 * N / 2 and (there.gradients, there.optimizer) == (0, 0)
    assert there.device < here.device


def test_bf16_under_zero_halves_what_is_computed_with():
    job = replace(JOB, stage=2, processes=2, bucket=1000)
    full, half = estimate(SMALL, job), estimate(SMALL, replace(job, precision="bf16"))
    assert half.optimizer == full.optimizer and half.gradients == full.gradients / 2
    assert half.parameters == pytest.approx(2 * N, abs=200) and half.buffers == 2000


def test_an_adapter_has_gradients_and_moments_for_itself_alone():
    from peft import LoraConfig

    lora = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    found = estimate(SMALL, replace(JOB, lora=lora))
    added = 2 * 4 * (32 + 32)
    assert (found.gradients, found.optimizer) == (4 * added, 8 * added)
    assert found.parameters == pytest.approx(4 * (N + added), abs=200)


def test_a_pair_is_two_rows(monkeypatch):
    """By the same head: SFT of so few logits has another, and needs less."""
    assert (
        estimate(SMALL, replace(JOB, micro_batch=4)).activations
        < estimate(SMALL, replace(JOB, kind="dpo")).activations
    )
    monkeypatch.setattr("cl_graft.planning.trace.FEW", 0)
    assert estimate(SMALL, replace(JOB, kind="dpo")).activations == pytest.approx(
        estimate(SMALL, replace(JOB, micro_batch=4)).activations, rel=0.02
    )


def test_checkpointing_keeps_a_layers_input_instead_of_its_inside():
    deep = LlamaConfig(**{**SMALL.to_dict(), "num_hidden_layers": 6})

    def growth(checkpointing):
        peaks = [
            trace(c, "sft", 64, 64, gradients="freed", checkpointing=checkpointing).peak
            for c in (SMALL, deep)
        ]
        return (peaks[1] - peaks[0]) / 4

    one_input = 64 * 64 * 32 * 4
    assert growth(True) == pytest.approx(one_input, rel=0.1)
    assert growth(False) > 10 * one_input


def test_a_large_model_is_planned_without_its_memory():
    """The four bytes of each parameter alone would be more than this machine has."""
    wide = LlamaConfig(
        vocab_size=128256,
        hidden_size=16384,
        intermediate_size=53248,
        num_hidden_layers=2,
        num_attention_heads=128,
        num_key_value_heads=8,
    )
    found = estimate(wide, Job("sft", 1, 4096, checkpointing=True, stage=3, processes=64))
    assert found.optimizer == pytest.approx(12 * 10.6e9 / 64, rel=0.02)


def test_a_row_is_as_long_as_the_stage_makes_it():
    tokenizer = toy_tokenizer()
    rows = [Example("abc", "d"), Example("a", "bcdefg")]
    task = Task("t", rows, (), "exact", training=Training(max_length=512, preference=Preference()))
    short = replace(task, training=Training(max_length=6))

    def longest(job):
        return max(lengths(tokens(tokenizer, *job)))

    assert longest(sft_job(task, 0)) == 1 + 1 + 6 + 1  # start and end, too
    assert longest(sft_job(short, 0)) == 6
    assert longest(dpo_job(task, [Pair("ab", "c", "cdef")], 0)) == 1 + 2 + 4 + 1


@pytest.mark.parametrize(
    "change", [{"kind": "rlhf"}, {"stage": 1}, {"length": 0}, {"offload": True}]
)
def test_a_job_that_there_is_not_is_refused(change):
    with pytest.raises(CLGraftError, match=r"choose|give"):
        replace(JOB, **change)
