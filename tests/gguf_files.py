"""Small GGUF files, as llama.cpp's converter writes them of a Llama."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import LlamaForCausalLM

NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.layers.": "blk.",
}
TEMPLATE = "{% for m in messages %}{{ m['content'] }}|{% endfor %}"


def gguf() -> Any:
    """The package, or a skipped test."""
    return pytest.importorskip("gguf", reason="the package gguf is not installed here")


def written(
    model: LlamaForCausalLM,
    path: Path,
    blocks: str | None = None,
    tensors: dict[str, np.ndarray] | None = None,
    fields: dict[str, int] | None = None,
    architecture: str = "llama",
    leave_out: str | None = None,
) -> Path:
    """The GGUF file of a model whose vocabulary is 48 entries.

    blocks: the type, such as Q8_0, that its matrices are stored in; None: float32. tensors, fields: more of them.
    """
    library, config = gguf(), model.config
    writer = library.GGUFWriter(path, architecture)
    writer.add_name("A small model")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    for key, value in (fields or {}).items():
        writer.add_uint16(key, value)
    letters = [chr(ord("a") + i) for i in range(26)] + [str(i) for i in range(10)] + ["Ġ"]
    words = ["ab", "abc", "Ġa", "de", "<s>", "</s>"]
    tokens = letters + words + [f"<extra{i}>" for i in range(config.vocab_size - 43)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<") else 1 for token in tokens])
    writer.add_token_merges(["a b", "ab c", "Ġ a", "d e"])
    writer.add_bos_token_id(tokens.index("<s>"))
    writer.add_eos_token_id(tokens.index("</s>"))
    writer.add_chat_template(TEMPLATE)
    for name, weight in model.state_dict().items():
        if name == leave_out or (name == "lm_head.weight" and config.tie_word_embeddings):
            continue
        x = weight.numpy()
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        if "attn_q." in name or "attn_k." in name:
            heads = config.num_attention_heads if "attn_q." in name else config.num_key_value_heads
            x = x.reshape(heads, 2, len(x) // heads // 2, -1).swapaxes(1, 2).reshape(x.shape)
        if blocks and x.ndim == 2:
            kind = library.GGMLQuantizationType[blocks]
            writer.add_tensor(name, library.quants.quantize(x, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, x)
    for name, x in (tensors or {}).items():
        writer.add_tensor(name, x)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
