"""A tuned model that is an adapter or a GGUF file: read exactly, or refused with a cure."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from cl_graft.models.weights import CheckpointError
from cl_graft.skillpack.compress.create import create
from cl_graft.skillpack.folders.apply import apply_pack
from cl_graft.skillpack.folders.checkpoint import Checkpoint
from cl_graft.skillpack.folders.pair import Pairing, pair
from cl_graft.skillpack.folders.tuned import tuned_checkpoint
from cl_graft.skillpack.format.file import SkillPack
from tests.command import Call, assert_refused
from tests.model_folders import grafts_to, llama, saved, tensors, tokenizer, tuned
from tests.refusals import one_sentence

Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return saved(llama(), tmp_path / "base")


def adapter(base: Path, folder: Path, **options: Any) -> PeftModel:
    """An adapter on the model of a folder, as PEFT saves it after training."""
    torch.manual_seed(3)
    options = {"r": 2, "init_lora_weights": False, "task_type": "CAUSAL_LM", **options}
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**options))
    model.save_pretrained(folder)
    return model.eval()


def paired(base: Path, folder: Path) -> Pairing:
    before = Checkpoint(base)
    return pair(before, tuned_checkpoint(folder, before))


def deltas(model: PeftModel) -> dict[str, Tensor]:
    """What PEFT itself would add, by the names of the base."""
    found = {}
    for name, module in model.base_model.model.named_modules():
        if hasattr(module, "get_delta_weight"):
            found[f"{name}.weight"] = module.get_delta_weight("default").detach()
    return found


OPTIONS: list[dict[str, Any]] = [
    {"target_modules": ["q_proj", "down_proj"], "lora_alpha": 6},
    {"target_modules": "all-linear", "use_rslora": True, "r": 3},
    {
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"q_proj": 4},
        "alpha_pattern": {"layers.1.self_attn.v_proj": 5, "q_proj": 3},
    },
    {"target_modules": ["embed_tokens", "lm_head", "k_proj"]},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_the_delta_of_an_adapter_is_the_one_that_peft_adds(
    options: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    wanted = deltas(adapter(base, tmp_path / "adapter", **options))
    found = paired(base, tmp_path / "adapter")
    assert {change.name for change in found.changes} == wanted.keys()
    for name, delta in wanted.items():
        assert torch.allclose(found.delta(name), delta, rtol=1e-6, atol=1e-9), name
        whole = found.tuned.read(name)
        assert torch.equal(whole, found.base.read(name) + found.delta(name))
    assert found.tuned.read("model.norm.weight").dtype == torch.float32


def test_scale_times_b_a_by_hand(base: Path, tmp_path: Path) -> None:
    adapter(base, tmp_path / "adapter", target_modules=["q_proj"], lora_alpha=6)
    parts = tensors(tmp_path / "adapter", "adapter_model.safetensors")
    key = f"base_model.model.{Q.removesuffix('.weight')}"
    wanted = 3 * parts[f"{key}.lora_B.weight"] @ parts[f"{key}.lora_A.weight"]
    assert torch.allclose(paired(base, tmp_path / "adapter").delta(Q), wanted, rtol=1e-5, atol=1e-6)


def test_no_weight_of_the_base_rounds_the_delta(tmp_path: Path) -> None:
    """Merged in bfloat16, or even in float32, a small delta loses its digits."""
    base = saved(llama().bfloat16(), tmp_path / "base")
    model = adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    parts = tensors(tmp_path / "adapter", "adapter_model.safetensors")
    small = {name: t * 1e-4 for name, t in parts.items()}
    save_file(small, tmp_path / "adapter" / "adapter_model.safetensors", {"format": "pt"})
    wanted = deltas(model)[Q].float() * 1e-8
    found = paired(base, tmp_path / "adapter")
    assert torch.allclose(found.delta(Q), wanted, rtol=1e-2, atol=1e-12)
    merged = found.tuned.read(Q) - found.base.read(Q).float()
    assert float((merged - wanted).norm()) > 0.1 * float(wanted.norm())


def test_transposed_layers_of_gpt2(tmp_path: Path) -> None:
    sizes = {"vocab_size": 48, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 16}
    GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(tmp_path / "base")
    options = {"target_modules": ["c_attn"], "fan_in_fan_out": True}
    wanted = deltas(adapter(tmp_path / "base", tmp_path / "adapter", **options))
    found = paired(tmp_path / "base", tmp_path / "adapter")
    assert [change.name for change in found.changes] == list(wanted)
    for name, delta in wanted.items():
        assert torch.allclose(found.delta(name), delta, atol=1e-7)


def test_a_pack_of_an_adapter(base: Path, tmp_path: Path, call: Call) -> None:
    """Its tokenizer goes along; what is grafted computes as the base with the adapter does."""
    folder = tmp_path / "adapter"
    model = adapter(base, folder, target_modules=["q_proj", "up_proj"])
    tokenizer("<|end|>", "{{ messages }}").save_pretrained(folder)
    pack = tmp_path / "pack"
    words = ["--base", base, "--tuned", folder]
    done = call("pack", "create", *words, "--out", pack, "--budget", "400%")
    assert done.code == 0 and "with 4 matrices; its delta is scale * B A, unmerged." in done.out
    assert "chat_template.jinja" in SkillPack.load(pack).files
    assert "config.json" not in SkillPack.load(pack).files
    shown = call("pack", "inspect", pack, *words)
    assert shown.code == 0 and Q in shown.out
    apply_pack(base, SkillPack.load(pack), tmp_path / "out")
    ids = torch.arange(8)[None]
    with torch.no_grad():
        wanted = model(ids).logits
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(ids).logits
        start = AutoModelForCausalLM.from_pretrained(base)(ids).logits
    assert float((found - wanted).norm()) < 0.02 * float((start - wanted).norm())


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"use_dora": True}, "its use_dora is true"),
        ({"bias": "lora_only"}, 'its bias is "lora_only"'),
        ({"modules_to_save": ["lm_head"]}, "it has modules_to_save"),
        ({"trainable_token_indices": [3]}, "it has trainable_token_indices"),
    ],
)
def test_more_than_scale_times_b_a_is_refused(
    options: dict[str, Any], word: str, base: Path, tmp_path: Path
) -> None:
    """And the cure is run: PEFT merges it into a model folder."""
    folder = tmp_path / "adapter"
    adapter(base, folder, target_modules=["q_proj"], **options)
    said = one_sentence(lambda: paired(base, folder), CheckpointError)
    assert f"({word})" in said
    cure = said.partition("merge it into its base: ")[2].removesuffix(".")
    eval(cure, {"peft": peft, "NEW": tmp_path / "new"})
    for file in base.glob("token*"):
        shutil.copy(file, tmp_path / "new")
    grafts_to(base, tmp_path / "new", tensors(tmp_path / "new"), tmp_path / "out")


def test_adapters_that_do_not_fit(base: Path, tmp_path: Path, call: Call) -> None:
    saved(llama(tie_word_embeddings=True), tmp_path / "tied")
    adapter(tmp_path / "tied", tmp_path / "head", target_modules=["lm_head"])
    said = one_sentence(lambda: paired(tmp_path / "tied", tmp_path / "head"), CheckpointError)
    assert "'lm_head' is tied" in said and "merge_and_unload" in said
    adapter(base, tmp_path / "rows", target_modules=["embed_tokens"])
    parts = tensors(tmp_path / "rows", "adapter_model.safetensors")
    next(t for n, t in parts.items() if "base_layer" in n)[3] += 1
    save_file(parts, tmp_path / "rows" / "adapter_model.safetensors")
    said = one_sentence(lambda: paired(base, tmp_path / "rows"), CheckpointError)
    assert "weights of its own for 'model.embed_tokens'" in said
    adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    for other, word in (
        (llama(hidden_size=64), "of shape"),
        (llama(num_hidden_layers=1), "layers.1"),
    ):
        shutil.rmtree(tmp_path / "other", ignore_errors=True)
        saved(other, tmp_path / "other")
        said = one_sentence(
            lambda: paired(tmp_path / "other", tmp_path / "adapter"), CheckpointError
        )
        assert word in said and "the base it was trained on" in said
    whole = (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(whole[:-9])
    assert "is damaged" in one_sentence(lambda: paired(base, tmp_path / "adapter"), CheckpointError)
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    said = one_sentence(lambda: paired(base, tmp_path / "adapter"), CheckpointError)
    assert "no adapter_model.safetensors" in said
    words = ["--base", tmp_path / "head", "--tuned", base, "--out", tmp_path / "x"]
    assert_refused(call("pack", "create", *words), "a PEFT adapter and no model")


# --- GGUF --------------------------------------------------------------------------------------


def write_gguf(model: Any, path: Path, kind: str) -> None:
    """A Llama as llama.cpp's converter writes it, in F32 or with its matrices in Q8_0."""
    gguf = pytest.importorskip("gguf")
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    quant = gguf.GGMLQuantizationType.Q8_0
    for name, tensor in model.state_dict().items():
        array = tensor.float().numpy()
        for end, heads in (("q_proj.weight", 2), ("k_proj.weight", 1)):
            if name.endswith(end):
                rows = array.reshape(heads, 2, -1, array.shape[1])
                array = rows.swapaxes(1, 2).reshape(array.shape)
        target = names.get_name(name, try_suffixes=(".weight",))
        if kind == "Q8_0" and array.ndim == 2 and array.shape[1] % 32 == 0:
            writer.add_tensor(target, gguf.quants.quantize(array, quant), raw_dtype=quant)
        else:
            writer.add_tensor(target, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_a_gguf_file_is_read_as_it_says(kind: str, base: Path, tmp_path: Path) -> None:
    """In F32 the weights are the tuned model's, bit for bit; in 8 bits they are within half a step."""
    model = tuned(llama())
    (tmp_path / "gguf").mkdir()
    file = tmp_path / "gguf" / "model.gguf"
    write_gguf(model, file, kind)
    found = paired(base, file)
    assert found.tuned.tensors.keys() == tensors(base).keys() and "dequantised" in found.notes[0]
    for name, tensor in model.state_dict().items():
        read = found.tuned.read(name)
        if kind == "F32":
            assert torch.equal(read, tensor), name
        else:
            assert float((read - tensor).abs().max()) <= 0.51 * float(tensor.abs().max()) / 127, (
                name
            )
    create(base, tmp_path / "gguf", tmp_path / "pack", budget="400%")
    apply_pack(base, SkillPack.load(tmp_path / "pack"), tmp_path / "out")
    assert not SkillPack.load(tmp_path / "pack").files
    error = float((Checkpoint(tmp_path / "out").read(Q) - found.tuned.read(Q)).norm())
    assert error < 0.02 * float(found.delta(Q).norm())


def test_a_gguf_file_that_is_none(base: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(60))
    said = one_sentence(lambda: paired(base, tmp_path / "x.gguf"), CheckpointError)
    assert "is not read by transformers" in said and "the Hugging Face folder" in said
