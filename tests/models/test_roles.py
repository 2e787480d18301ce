"""Every parameter's role, told from a model's structure, for the families that people use."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

from cl_graft.models.roles import UnclearRoles, decoder_layers, roles

TOKENS = {"vocab_size": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SHAPE = {
    **TOKENS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GROUPED = {**SHAPE, "num_key_value_heads": 2}
GPT = {**TOKENS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
OPT = {**SHAPE, "ffn_dim": 48, "word_embed_proj_dim": 32}

QKVO = {f"model.layers.*.self_attn.{p}_proj.weight" for p in "qkvo"}
GATED = {f"model.layers.*.mlp.{p}_proj.weight" for p in ("gate", "up", "down")}
MIXER = ["A_log", *(f"{p}.weight" for p in ("in_proj", "conv1d", "x_proj", "dt_proj", "out_proj"))]
ENDS = {"embedding": {"model.embed_tokens.weight"}, "head": {"lm_head.weight"}}
LLAMA = {**ENDS, "attention": QKVO, "mlp": GATED}
TIED = {k: v for k, v in LLAMA.items() if k != "head"}

FAMILIES: dict[str, tuple[Callable[[], Any], dict[str, set[str]]]] = {
    "llama": (lambda: hf.LlamaConfig(**GROUPED), LLAMA),
    "llama, tied": (lambda: hf.LlamaConfig(**GROUPED, tie_word_embeddings=True), TIED),
    "qwen2": (lambda: hf.Qwen2Config(**GROUPED), LLAMA),
    "qwen3": (lambda: hf.Qwen3Config(**GROUPED, head_dim=8), LLAMA),
    "mistral": (lambda: hf.MistralConfig(**GROUPED), LLAMA),
    "gemma2": (lambda: hf.Gemma2Config(**GROUPED, head_dim=8), TIED),
    "gemma3": (lambda: hf.Gemma3TextConfig(**GROUPED, head_dim=8), TIED),
    "gpt2": (
        lambda: hf.GPT2Config(**GPT),
        {
            "embedding": {"transformer.wte.weight", "transformer.wpe.weight"},
            "attention": {f"transformer.h.*.attn.{p}.weight" for p in ("c_attn", "c_proj")},
            "mlp": {f"transformer.h.*.mlp.{p}.weight" for p in ("c_fc", "c_proj")},
        },
    ),
    "gpt_neox": (
        lambda: hf.GPTNeoXConfig(**SHAPE),
        {
            "embedding": {"gpt_neox.embed_in.weight"},
            "head": {"lm_head.weight"},
            "attention": {
                f"gpt_neox.layers.*.attention.{p}.weight" for p in ("query_key_value", "dense")
            },
            "mlp": {
                f"gpt_neox.layers.*.mlp.{p}.weight" for p in ("dense_h_to_4h", "dense_4h_to_h")
            },
        },
    ),
    "opt": (
        lambda: hf.OPTConfig(**OPT),
        {
            "embedding": {f"model.decoder.embed_{p}.weight" for p in ("tokens", "positions")},
            "attention": {
                f"model.decoder.layers.*.self_attn.{p}_proj.weight" for p in ("q", "k", "v", "out")
            },
            "mlp": {f"model.decoder.layers.*.{p}.weight" for p in ("fc1", "fc2")},
        },
    ),
    "phi": (
        lambda: hf.PhiConfig(**SHAPE),
        {
            "embedding": {"model.embed_tokens.weight"},
            "head": {"lm_head.weight", "lm_head.bias"},
            "attention": {
                f"model.layers.*.self_attn.{p}.weight"
                for p in ("q_proj", "k_proj", "v_proj", "dense")
            },
            "mlp": {f"model.layers.*.mlp.{p}.weight" for p in ("fc1", "fc2")},
        },
    ),
    "mixtral": (
        lambda: hf.MixtralConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2),
        {
            **ENDS,
            "attention": QKVO,
            "mlp": {
                f"model.layers.*.mlp.{p}"
                for p in ("gate.weight", "experts.gate_up_proj", "experts.down_proj")
            },
        },
    ),
    "opt, projected": (
        lambda: hf.OPTConfig(**{**OPT, "word_embed_proj_dim": 16}),
        {
            "embedding": {f"model.decoder.embed_{p}.weight" for p in ("tokens", "positions")},
            "attention": {
                f"model.decoder.layers.*.self_attn.{p}_proj.weight" for p in ("q", "k", "v", "out")
            },
            "mlp": {f"model.decoder.layers.*.{p}.weight" for p in ("fc1", "fc2")},
            "other": {f"model.decoder.project_{p}.weight" for p in ("in", "out")},
        },
    ),
    "gpt-oss": (
        lambda: hf.GptOssConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2, head_dim=8),
        {
            **ENDS,
            "attention": QKVO,
            "mlp": {
                f"model.layers.*.mlp.{p}"
                for p in (
                    "router.weight",
                    "experts.gate_up_proj",
                    "experts.gate_up_proj_bias",
                    "experts.down_proj",
                    "experts.down_proj_bias",
                )
            },
        },
    ),
    "mamba": (
        lambda: hf.MambaConfig(**TOKENS, hidden_size=32, num_hidden_layers=2, state_size=4),
        {
            "embedding": {"backbone.embeddings.weight"},
            "other": {f"backbone.layers.*.mixer.{p}" for p in MIXER},
        },
    ),
    "mamba2": (
        lambda: hf.Mamba2Config(
            **TOKENS,
            hidden_size=32,
            num_hidden_layers=2,
            state_size=4,
            num_heads=8,
            head_dim=8,
            n_groups=2,
        ),
        {
            "embedding": {"backbone.embeddings.weight"},
            "head": {"lm_head.weight"},
            "other": {
                f"backbone.layers.*.mixer.{p}.weight" for p in ("in_proj", "conv1d", "out_proj")
            },
        },
    ),
    "jamba": (  # a layer of state spaces with an MLP, one of attention with experts
        lambda: hf.JambaConfig(
            **GROUPED, num_experts=2, mamba_d_state=4, attn_layer_period=2, attn_layer_offset=1
        ),
        {
            **ENDS,
            "attention": QKVO,
            "mlp": {
                f"model.layers.*.feed_forward.{p}"
                for p in (
                    "gate_proj.weight",
                    "up_proj.weight",
                    "down_proj.weight",
                    "router.weight",
                    "experts.gate_up_proj",
                    "experts.down_proj",
                )
            },
            "other": {f"model.layers.*.mamba.{p}" for p in MIXER},
        },
    ),
    "lfm2": (  # a layer of convolutions, one of attention
        lambda: hf.Lfm2Config(**GROUPED, layer_types=["conv", "full_attention"]),
        {
            "embedding": {"model.embed_tokens.weight"},
            "attention": {
                f"model.layers.*.self_attn.{p}_proj.weight" for p in ("q", "k", "v", "out")
            },
            "mlp": {f"model.layers.*.feed_forward.w{i}.weight" for i in (1, 2, 3)},
            "other": {f"model.layers.*.conv.{p}.weight" for p in ("in_proj", "conv", "out_proj")},
        },
    ),
    "falcon-h1": (  # both side by side
        lambda: hf.FalconH1Config(**GROUPED),
        {
            **ENDS,
            "attention": QKVO,
            "mlp": {f"model.layers.*.feed_forward.{p}_proj.weight" for p in ("gate", "up", "down")},
            "other": {
                f"model.layers.*.mamba.{p}.weight" for p in ("in_proj", "conv1d", "out_proj")
            },
        },
    ),
}


def built(config: Any) -> Any:
    with torch.device("meta"):  # the structure is enough
        return hf.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_matrices_of_a_family(family: str) -> None:
    make, wanted = FAMILIES[family]
    found: dict[str, set[str]] = {}
    for name, role in roles(built(make())).items():
        found.setdefault(role, set()).add(re.sub(r"\.\d+\.", ".*.", name))
    found.pop("norm")
    assert found == wanted


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_has_a_role_and_one_dimension_means_norm(family: str) -> None:
    model = built(FAMILIES[family][0]())
    found = roles(model)
    assert found.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        if found[name] == "norm":
            assert parameter.ndim == 1, name
        elif parameter.ndim == 1:
            assert name == "lm_head.bias", name


@pytest.mark.parametrize("family", FAMILIES)
def test_the_decoder_layers_are_found(family: str) -> None:
    model = built(FAMILIES[family][0]())
    name, layers = decoder_layers(model)
    assert len(layers) == 2 and model.get_submodule(name) is layers
    assert name.split(".")[-1] in ("layers", "h")


def test_a_gate_of_one_row_is_a_matrix_and_a_vector_of_three_dimensions_is_none() -> None:
    config = hf.Qwen2MoeConfig(
        **GROUPED, num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=16
    )
    found = roles(built(config))
    assert found["model.layers.1.mlp.shared_expert_gate.weight"] == "mlp"
    config = hf.RwkvConfig(
        **TOKENS, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32, context_length=64
    )
    model = built(config)
    assert model.rwkv.blocks[1].attention.time_mix_key.shape == (1, 1, 32)
    found = roles(model)
    assert found["rwkv.blocks.1.attention.time_mix_key"] == "norm"
    assert found["rwkv.blocks.1.attention.key.weight"] == "attention"
    assert found["rwkv.blocks.1.feed_forward.key.weight"] == "mlp"


def test_linear_attention_is_other_though_its_class_says_attention() -> None:
    """What mixes tokens by a convolution and a recurrence has no keys that later tokens attend to."""
    layer, gated = nn.Module(), type("DeltaAttention", (nn.Module,), {})()
    gated.conv, gated.q = nn.Conv1d(4, 4, 3, groups=4), nn.Linear(4, 4)
    layer.mixer, layer.up = gated, nn.Linear(4, 4)
    found = roles(Bare(nn.ModuleList([layer])))  # type: ignore[arg-type]
    assert found["layers.0.mixer.q.weight"] == found["layers.0.mixer.conv.weight"] == "other"
    assert found["layers.0.up.weight"] == "mlp"


def test_in_a_layer_without_attention_or_convolution_the_first_part_mixes_tokens() -> None:
    layer = nn.Module()
    layer.norm, layer.recurrence, layer.ffn = nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 4)
    found = roles(Bare(nn.ModuleList([layer])))  # type: ignore[arg-type]
    assert found["layers.0.recurrence.weight"] == "other" and found["layers.0.ffn.weight"] == "mlp"
    layer = nn.Module()
    layer.mlp = type("TinyMLP", (nn.Linear,), {})(4, 4)
    found = roles(Bare(nn.ModuleList([layer])))  # type: ignore[arg-type]
    assert found["layers.0.mlp.weight"] == "mlp"


def test_many_experts_do_not_pass_for_decoder_layers() -> None:
    config = hf.MixtralConfig(
        **{**GROUPED, "num_hidden_layers": 1, "intermediate_size": 256},
        num_local_experts=16,
        num_experts_per_tok=2,
    )
    assert decoder_layers(built(config))[0] == "model.layers"


@pytest.mark.parametrize("family", ["gpt-oss", "mixtral"])
def test_parameters_that_are_neither_matrix_nor_layer_keep_their_part(family: str) -> None:
    found = roles(built(FAMILIES[family][0]()))
    assert set(found.values()) == {"embedding", "head", "attention", "mlp", "norm"}


# --- models of other kinds ---


class Bare(nn.Module):
    """As little of a causal LM as `roles` looks at."""

    def __init__(self, layers: nn.Module):
        super().__init__()
        self.tokens, self.layers = nn.Embedding(8, 4), layers

    def get_input_embeddings(self) -> nn.Module:
        return self.tokens

    def get_output_embeddings(self) -> None:
        return None


def test_a_model_without_layers_is_refused_with_its_matrices() -> None:
    with pytest.raises(UnclearRoles) as refused:
        roles(Bare(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))))  # type: ignore[arg-type]
    message = str(refused.value)
    assert message.startswith("Bare has no list of decoder layers")
    assert "Embedding tokens, Linear layers.0;" in message and "LayerNorm" not in message
    assert "\n" not in message and message.endswith(".")


def test_a_matrix_of_the_layer_itself_is_other() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mixing = nn.Parameter(torch.ones(4, 4))
            self.attn = nn.MultiheadAttention(4, 1)

    found = roles(Bare(nn.ModuleList([Layer(), Layer()])))  # type: ignore[arg-type]
    assert found["layers.1.mixing"] == "other"
    assert found["layers.1.attn.in_proj_weight"] == "attention"
