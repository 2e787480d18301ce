"""A model without weights, and what every tensor of a checkpoint is to it, on folders that transformers wrote."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import Tensor

from cl_graft.errors import CLGraftError
from cl_graft.models import meta_model as module
from cl_graft.models.meta_model import MetaModel, meta_model

TOKENS = {"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SHAPE = {
    **TOKENS,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
EXPERTS = {"num_local_experts": 11, "num_experts_per_tok": 2}  # 10 sorts behind 9
KINDS: dict[str, Callable[[], Any]] = {
    "llama": lambda: hf.LlamaConfig(**SHAPE),
    "gemma3": lambda: hf.Gemma3TextConfig(**SHAPE, head_dim=4),
    "gpt2": lambda: hf.GPT2Config(**TOKENS, n_embd=16, n_layer=2, n_head=4, n_positions=32),
    "gpt_neox": lambda: hf.GPTNeoXConfig(**SHAPE),
    "opt": lambda: hf.OPTConfig(**SHAPE, ffn_dim=24, word_embed_proj_dim=8),
    "mixtral": lambda: hf.MixtralConfig(**SHAPE, **EXPERTS),
    "gpt-oss": lambda: hf.GptOssConfig(**SHAPE, **EXPERTS, head_dim=4, initial_context_length=32),
    "mamba": lambda: hf.MambaConfig(**TOKENS, hidden_size=16, num_hidden_layers=2, state_size=4),
}


def made(kind: str) -> Any:
    torch.manual_seed(0)
    return hf.AutoModelForCausalLM.from_config(KINDS[kind]()).float()


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def saved(model: Any, folder: Path, **options: Any) -> dict[str, Tensor]:
    model.save_pretrained(folder, **options)
    return {k: t for file in folder.glob("*.safetensors") for k, t in load_file(file).items()}


def test_every_tensor_is_a_parameter_and_every_parameter_can_be_loaded(
    kind: str, tmp_path: Path
) -> None:
    model = made(kind)
    stored = saved(model, tmp_path)
    found = meta_model(tmp_path)
    assert found.keys == {k: tuple(t.shape) for k, t in stored.items()}
    assert found.plain and found.note is None
    names = dict(model.named_parameters())
    assert {found.parameter_of(key) for key in stored} == names.keys()
    for name, parameter in names.items():
        loaded = found.load(name, stored.__getitem__)
        assert loaded is not None and torch.equal(loaded, parameter), name


def test_parameters_hold_nothing_and_buffers_are_real(kind: str, tmp_path: Path) -> None:
    model = made(kind)
    model.save_pretrained(tmp_path)
    found = meta_model(tmp_path).model
    assert not found.training
    assert all(p.is_meta and not p.requires_grad for p in found.parameters())
    assert {n: p.shape for n, p in found.named_parameters()} == {
        n: p.shape for n, p in model.named_parameters()
    }
    buffers = dict(found.named_buffers())
    for name, buffer in model.named_buffers():
        assert torch.equal(buffers[name], buffer), name


@pytest.mark.parametrize(
    ("kind", "key", "role"),
    [
        ("llama", "model.layers.1.self_attn.v_proj.weight", "attention"),
        ("llama", "lm_head.weight", "head"),
        ("llama", "model.norm.weight", "norm"),
        ("gpt2", "transformer.wpe.weight", "embedding"),
        ("opt", "model.decoder.project_in.weight", "other"),
        ("mamba", "backbone.layers.0.mixer.conv1d.weight", "other"),
        ("mixtral", "model.layers.0.block_sparse_moe.experts.10.w2.weight", "mlp"),
        ("mixtral", "model.layers.0.block_sparse_moe.gate.weight", "mlp"),
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq", "other"),
    ],
)
def test_the_role_of_a_tensor(kind: str, key: str, role: str, tmp_path: Path) -> None:
    made(kind).save_pretrained(tmp_path)
    assert meta_model(tmp_path).role_of(key) == role


@pytest.mark.parametrize(
    ("kind", "transposed"),
    [
        ("llama", set()),
        (
            "gpt2",
            {"attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"},
        ),
        ("gpt-oss", {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}),
        ("mixtral", set()),
    ],
)
def test_which_tensors_are_stored_transposed(
    kind: str, transposed: set[str], tmp_path: Path
) -> None:
    stored = saved(made(kind), tmp_path)
    found = meta_model(tmp_path)
    assert {k.split(".1.", 1)[-1] for k in stored if ".1." in k and found.is_transposed(k)} == (
        transposed
    )
    assert not any(found.is_transposed(k) for k in stored if "embed" in k or "norm" in k)


# --- names in a checkpoint that are not the model's ---


def test_experts_one_by_one_are_the_stacked_parameter(tmp_path: Path) -> None:
    stored = saved(made("mixtral"), tmp_path)
    found, moe = meta_model(tmp_path), "model.layers.1.block_sparse_moe.experts.10"
    assert stored[f"{moe}.w1.weight"].shape == (24, 16)
    for part, name in (("w1", "gate_up_proj"), ("w3", "gate_up_proj"), ("w2", "down_proj")):
        assert found.parameter_of(f"{moe}.{part}.weight") == f"model.layers.1.mlp.experts.{name}"
    assert found.key_of("model.layers.1.mlp.experts.down_proj") is None
    assert found.key_of("model.layers.1.mlp.gate.weight") == (
        "model.layers.1.block_sparse_moe.gate.weight"
    )


def test_the_prefix_of_the_base_model_may_be_missing(tmp_path: Path) -> None:
    """As in GPT-2's own checkpoint on the hub."""
    model = made("gpt2")
    stored = {k.removeprefix("transformer."): t.clone() for k, t in model.state_dict().items()}
    del stored["lm_head.weight"]
    assert "h.0.attn.c_attn.weight" in stored
    model.config.save_pretrained(tmp_path)
    save_file(stored, tmp_path / "model.safetensors")
    found = meta_model(tmp_path)
    assert found.plain
    assert found.parameter_of("h.0.attn.c_attn.weight") == "transformer.h.0.attn.c_attn.weight"
    assert found.key_of("transformer.h.0.attn.c_attn.weight") == "h.0.attn.c_attn.weight"
    assert found.is_transposed("h.0.attn.c_attn.weight")


def test_tied_weights_are_one_parameter_however_often_they_are_stored(tmp_path: Path) -> None:
    model = made("gemma3")
    stored = saved(model, tmp_path)
    assert "lm_head.weight" not in stored
    once = meta_model(tmp_path)
    assert once.key_of("lm_head.weight") == "model.embed_tokens.weight"
    assert once.model.lm_head.weight is once.model.model.embed_tokens.weight
    save_file(
        {**stored, "lm_head.weight": stored["model.embed_tokens.weight"].clone()},
        tmp_path / "model.safetensors",
    )
    twice = meta_model(tmp_path)
    assert twice.parameter_of("lm_head.weight") == "model.embed_tokens.weight"
    assert twice.role_of("lm_head.weight") == "embedding"
    assert twice.key_of("lm_head.weight") == "model.embed_tokens.weight"


def test_a_checkpoint_of_many_files(tmp_path: Path) -> None:
    stored = saved(made("llama"), tmp_path, max_shard_size="4KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    found = meta_model(tmp_path)
    assert found.keys.keys() == stored.keys() and found.plain


def test_a_tensor_that_is_missing_is_named_in_a_note(tmp_path: Path) -> None:
    stored = saved(made("llama"), tmp_path)
    del stored["model.layers.1.mlp.up_proj.weight"]
    save_file(stored, tmp_path / "model.safetensors")
    found = meta_model(tmp_path)
    assert not found.plain
    assert found.note is not None and "'model.layers.1.mlp.up_proj.weight'" in found.note
    assert found.note.endswith("calibration loads the whole model.")


def test_without_the_conversions_of_transformers_names_are_taken_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are no promised interface: the plain architectures must not need them."""
    import transformers.core_model_loading as loading

    made("llama").save_pretrained(tmp_path / "llama")
    made("mixtral").save_pretrained(tmp_path / "mixtral")
    monkeypatch.delattr(loading, "rename_source_key")
    assert meta_model(tmp_path / "llama").plain
    mixtral = meta_model(tmp_path / "mixtral")
    assert not mixtral.plain
    assert mixtral.role_of("model.layers.0.self_attn.q_proj.weight") == "attention"


def test_weights_of_another_shape_than_the_configuration_says_are_refused(tmp_path: Path) -> None:
    stored = saved(made("llama"), tmp_path)
    stored["model.norm.weight"] = torch.ones(8)
    with pytest.raises(CLGraftError, match=r"model.norm.weight has the shape \[8\].*\[16\]"):
        meta_model(tmp_path).load("model.norm.weight", stored.__getitem__)


# --- from a configuration, and what is refused ---


def test_a_configuration_alone_gives_the_model_and_is_not_changed() -> None:
    config = KINDS["llama"]()
    before = config.to_dict()
    found = meta_model(config)
    assert isinstance(found, MetaModel) and found.keys == {} and found.folder is None
    assert not found.plain
    assert found.role_of("model.layers.0.mlp.up_proj.weight") == "mlp"
    assert config.to_dict() == before


def test_code_that_comes_with_a_model_is_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "was-run"
    classes = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    (tmp_path / "own.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": classes}))
    with pytest.raises(CLGraftError, match="code of its own .auto_map., which is never run"):
        meta_model(tmp_path)
    config = {**KINDS["llama"]().to_dict(), "auto_map": classes}  # transformers has its own: used
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert type(meta_model(tmp_path).model) is hf.LlamaForCausalLM
    assert not marker.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "is not readable as a model's configuration"),
        ("{", "is not readable as a model's configuration"),
        ("[]", "is not readable as a model's configuration"),
        ('{"model_type": "none-such"}', "does not describe a model that transformers knows"),
        ('{"model_type": "vit"}', "is no causal language model"),
    ],
)
def test_a_folder_without_a_causal_lm_is_refused_in_one_sentence(
    text: str | None, message: str, tmp_path: Path
) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(CLGraftError, match=message) as refused:
        meta_model(tmp_path)
    assert "\n" not in str(refused.value) and str(tmp_path) in str(refused.value)


def test_keys_are_sorted_by_their_numbers() -> None:
    keys = ["e.10.w", "e.9.w", "e.w", "10", "a"]
    assert sorted(keys, key=module._natural) == ["10", "a", "e.9.w", "e.10.w", "e.w"]
