"""Every parameter's role, told from a model's structure, for the families that people use and those that do not fit."""

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
            assert name == "lm_head.bias"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_decoder_layers_are_found(family: str) -> None:
    model = built(FAMILIES[family][0]())
    name, layers = decoder_layers(model)
    assert len(layers) == 2 and model.get_submodule(name) is layers
    assert name.split(".")[-1] in ("layers", "h")


def test_many_experts_do_not_pass_for_decoder_layers() -> None:
    config = hf.MixtralConfig(
        **{**GROUPED, "num_hidden_layers": 1, "intermediate_size": 256},
        num_local_experts=16,
        num_experts_per_tok=2,
    )
    assert decoder_layers(built(config))[0] == "model.layers"


@pytest.mark.parametrize("make", [hf.GptOssConfig, hf.Olmo2Config], ids=["gpt-oss", "olmo2"])
def test_a_name_that_only_looks_like_a_state_space_model_is_accepted(make: Any) -> None:
    """`GptOssMLP` holds the letters of `ssm`."""
    extra = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
    config = make(**GROUPED, **(extra if make is hf.GptOssConfig else {}))
    assert set(roles(built(config)).values()) == {"embedding", "head", "attention", "mlp", "norm"}


# --- models that do not fit ---


def refusal(model: nn.Module) -> str:
    with pytest.raises(UnclearRoles) as refused:
        roles(model)  # type: ignore[arg-type]
    message = str(refused.value)
    assert type(model).__name__ in message
    assert "\n" not in message and message.endswith(".")
    return message


def test_mamba_is_refused_with_the_modules_in_doubt() -> None:
    config = hf.MambaConfig(**TOKENS, hidden_size=32, num_hidden_layers=2, state_size=4)
    message = refusal(built(config))
    assert "role is in doubt" in message
    for part in ("in_proj", "x_proj", "dt_proj", "out_proj", "conv1d"):
        assert message.count(f"backbone.layers.*.mixer.{part}") == 1


@pytest.mark.parametrize(
    ("make", "doubtful"),
    [
        (lambda: hf.Lfm2Config(**GROUPED, layer_types=["conv", "full_attention"]), "conv.in_proj"),
        (lambda: hf.JambaConfig(**GROUPED, num_experts=2, mamba_d_state=4), "mamba.in_proj"),
        (lambda: hf.FalconH1Config(**GROUPED), "mamba.in_proj"),
    ],
    ids=["lfm2", "jamba", "falcon-h1"],
)
def test_hybrids_are_refused(make: Callable[[], Any], doubtful: str) -> None:
    """A layer that mixes tokens otherwise has no part that could pass for an MLP by default."""
    assert f"model.layers.*.{doubtful}" in refusal(built(make()))


def test_matrices_outside_the_layers_are_refused() -> None:
    """OPT's smallest member projects its embeddings; nothing says how such a matrix is to be treated."""
    config = hf.OPTConfig(**{**OPT, "word_embed_proj_dim": 16})
    message = refusal(built(config))
    assert "model.decoder.project_in" in message and "model.decoder.project_out" in message


class Bare(nn.Module):
    """As little of a causal LM as `roles` looks at."""

    def __init__(self, layers: nn.Module):
        super().__init__()
        self.tokens, self.layers = nn.Embedding(8, 4), layers

    def get_input_embeddings(self) -> nn.Module:
        return self.tokens

    def get_output_embeddings(self) -> None:
        return None


def test_a_model_without_layers_is_refused() -> None:
    assert "has no list of decoder layers" in refusal(Bare(nn.Linear(4, 4)))


def test_a_matrix_of_the_layer_itself_is_in_doubt() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mixing = nn.Parameter(torch.ones(4, 4))
            self.attn = nn.MultiheadAttention(4, 1)

    message = refusal(Bare(nn.ModuleList([Layer(), Layer()])))
    assert "in doubt: Layer layers.*;" in message
