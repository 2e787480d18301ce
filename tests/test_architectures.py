"""GraftLLM and LoRA on tiny random models of many architectures: compress, apply, restore."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from cl_graft import plugins
from cl_graft.budget import Budget
from cl_graft.skillpack.format.file import SkillPack, fingerprint
from cl_graft.stream import benchmark

COMMON = {"vocab_size": 224, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "head_dim": 8,
}
CONFIGS = {
    "llama": SHAPE,
    "qwen2": SHAPE,
    "qwen3": SHAPE,
    "mistral": SHAPE,
    "gemma2": SHAPE,
    "phi": {**SHAPE, "partial_rotary_factor": 0.5},
    "mixtral": {**SHAPE, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "gpt_neox": {**SHAPE, "rotary_pct": 0.5},
    "opt": {
        "hidden_size": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "word_embed_proj_dim": 32,
    },
    "opt, projected": {
        "hidden_size": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "word_embed_proj_dim": 16,
    },
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "jamba": {
        **SHAPE,
        "num_experts": 2,
        "mamba_d_state": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
    },
}


def tiny(kind):
    config = AutoConfig.for_model(kind.split(",")[0], **COMMON, **CONFIGS[kind])
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).float()


# PEFT itself refuses to adapt some of Mamba's layers.
PAIRS = [(k, n) for k in CONFIGS for n in ("graftllm", "lora") if (k, n) != ("mamba", "lora")]


@pytest.mark.parametrize(("kind", "name"), PAIRS)
def test_a_pack_of_any_architecture_fits_applies_and_comes_off(
    kind, name, nano, tiny_scenario, tmp_path
):
    model, (_, tokenizer) = tiny(kind), nano
    task = replace(
        tiny_scenario.tasks[0], training=replace(tiny_scenario.tasks[0].training, steps=3)
    )
    scenario = replace(tiny_scenario, tasks=(task,), general=None)
    found = plugins.load("strategy", name)
    options = {"calibration_batches": 1} if name == "graftllm" else {}
    strategy = found(
        model=model,
        tokenizer=tokenizer,
        scenario=scenario,
        budget=Budget("25%", sum(p.numel() for p in model.parameters())),
        seed=0,
        options={**plugins.options(found), **options},
    )
    before = fingerprint(model.named_parameters())
    strategy.train(benchmark(scenario).train_stream[0], eval_streams=[])
    assert fingerprint(model.named_parameters()) == before
    assert strategy.packs[0].save(tmp_path / "pack.safetensors") <= strategy.budget.bytes
    pack = SkillPack.load(tmp_path / "pack.safetensors", base=before)
    strategy.grafted.activate([pack])
    changed = [n for n, p in model.named_parameters() if not torch.equal(p, strategy.base[n])]
    assert changed, "the pack does nothing"
    assert torch.isfinite(model(input_ids=torch.tensor([[1, 5, 9]])).logits).all()
    strategy.grafted.unload()
    assert fingerprint(model.named_parameters()) == before
