"""Rows without padding: what a model gives of them is what it gives of a padded batch."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Qwen2Config,
)
from trl.trainer.utils import add_fused_lm_head

from cl_graft.config import Launch
from cl_graft.store.files import read_jsonl
from cl_graft.task import Example, Pair, Preference, Task, Training
from cl_graft.training import flat
from cl_graft.training.config import dpo_job, sft_job
from cl_graft.training.fit import LOG, fit
from cl_graft.training.term import Term

WIDTHS = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}
OPT = {"word_embed_proj_dim": 32, "ffn_dim": 48, "max_position_embeddings": 64, "dropout": 0.0}
READ = {
    "llama": LlamaConfig(**WIDTHS),
    "qwen2": Qwen2Config(**WIDTHS),
    "mistral": MistralConfig(**WIDTHS, sliding_window=3),
    "gemma3": Gemma3TextConfig(
        **WIDTHS, sliding_window=3, layer_types=["sliding_attention", "full_attention"]
    ),
    "neox": GPTNeoXConfig(**WIDTHS),
    "opt": OPTConfig(**WIDTHS, **OPT),
    "mixtral": MixtralConfig(**WIDTHS, num_local_experts=4),
}
OTHERS = {
    "mamba": MambaConfig(vocab_size=61, hidden_size=32, num_hidden_layers=1, state_size=4),
    "gemma2": Gemma2Config(**WIDTHS),  # plain attention, as its scores are capped
}
LENGTHS = (9, 4, 7, 2)


def made(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(deepcopy(config), dtype=torch.float32)
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    return model.train()


def batch():
    """Texts of several lengths, padded on the right; of one the first token is a label, too."""
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 61, (len(LENGTHS), max(LENGTHS)), generator=g)
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    labels = ids.where((mask == 1) & (torch.rand(ids.shape, generator=g) < 0.5), -100)
    labels[1, 0] = ids[1, 0]
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


def gradients(model, output):
    """Of a loss that weighs every place otherwise."""
    weights = torch.linspace(0.5, 1.5, output.log_probs.numel()).view(output.log_probs.shape)
    (output.log_probs * weights).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("few", [99, -1], ids=["own-head", "tiles"])
@pytest.mark.parametrize("family", READ)
def test_a_flat_row_gives_what_the_padded_batch_gives(family, few):
    model = made(READ[family])
    asked = {"fused_lm_head": True} | (
        {"output_router_logits": True} if family == "mixtral" else {}
    )
    padded = model(**batch(), **asked)
    wanted = gradients(model, padded)
    assert flat.flattens(model)
    flat.layer(model)
    output = flat.forward(few, model, **batch(), **asked)
    for name in flat.FIELDS:
        torch.testing.assert_close(output[name], padded[name], rtol=1e-5, atol=1e-5)
    assert (output.aux_loss is None) == (family != "mixtral")
    if output.aux_loss is not None:
        torch.testing.assert_close(output.aux_loss, padded.aux_loss)
    found = gradients(model, output)
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=1e-6)


def test_other_passes_meanwhile_are_those_of_the_model():
    """A term may run the model on a padded batch of its own."""
    model, given = made(READ["mistral"]), batch()
    del given["labels"]
    before = model(**given).logits
    flat.layer(model)
    assert model.config._attn_implementation == flat.NAME
    assert torch.equal(model(**given).logits, before)


@pytest.mark.parametrize("family", OTHERS)
def test_a_model_that_reads_no_flat_row_is_told_by_its_code(family):
    assert not flat.flattens(made(OTHERS[family]))


class Deaf(LlamaForCausalLM):
    """Its code does not hand on where the texts of a row begin."""

    def forward(self, input_ids, position_ids=None, use_cache=None, **kwargs):
        return super().forward(input_ids, position_ids=position_ids, use_cache=use_cache)


def test_a_model_that_reads_a_flat_row_as_one_text_is_found_out_by_trying():
    torch.manual_seed(0)
    model = Deaf(deepcopy(READ["llama"]))
    assert not flat.flattens(model)
    assert model.config._attn_implementation == "sdpa" and model.training


EXAMPLES = [Example(f"Q: Copy {'ab' * n}{c}.\nA: ", f"ab{c}") for n, c in enumerate("cdefghij")]
RECIPE = Training(steps=4, batch=4, warmup=0.0, preference=Preference(steps=4, batch=4))
TASK = Task("t", EXAMPLES, (), "exact", training=RECIPE)


def both(nano, work, stage, **given):
    """(log, weights) of a stage with padding and without, from the same start."""
    model, _ = nano
    start, found = {n: p.detach().clone() for n, p in model.named_parameters()}, []
    for without in (False, True):
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(start[name])
        folder = work / str(without)
        fit(*nano, *stage, Launch(**given), folder, flat=without)
        weights = {n: p.detach().clone() for n, p in model.named_parameters()}
        found.append((list(read_jsonl(folder / LOG)), weights))
    return found


@pytest.mark.parametrize("given", [{}, {"micro_batch": 2}, {"checkpointing": True}], ids=str)
@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_training_without_padding_leads_to_the_same_weights(nano, tmp_path, kind, given):
    pairs = [Pair(e.prompt, e.completion, "z" * n) for n, e in enumerate(EXAMPLES, 1)]
    stage = sft_job(TASK, 0) if kind == "sft" else dpo_job(TASK, pairs, 0)
    (padded, wanted), (flat_, weights) = both(nano, tmp_path, stage, **given)
    for a, b in zip(padded, flat_, strict=True):
        for column in a.keys() - {"seconds", "tokens_per_second", "peak_memory_mb"}:
            assert b[column] == pytest.approx(a[column], rel=1e-4, abs=1e-5), column
    for name in wanted:
        torch.testing.assert_close(weights[name], wanted[name], rtol=0, atol=1e-6)


SEEN: list[torch.Size] = []


def shape(model, batch, output, state):
    SEEN.append(batch["input_ids"].shape)
    assert output.logits is None
    return 0.0 * next(model.parameters()).sum()


def test_a_penalty_is_given_the_padded_batch(nano, tmp_path):
    SEEN.clear()
    task = replace(TASK, training=replace(RECIPE, steps=1))
    fit(*nano, *sft_job(task, 0), Launch(), tmp_path, terms=[Term.penalty(shape)], flat=True)
    assert [len(size) for size in SEEN] == [2] and SEEN[0][0] == 4
