"""A pack as a LoRA adapter file of llama.cpp (GGUF).

Names and layout are those of llama.cpp's convert_lora_to_gguf.py, and what its loader (src/llama-adapter.cpp) asks for:
`<tensor>.lora_a` (r, in), `<tensor>.lora_b` (out, r) and one alpha; lora_a of token_embd is (ids, r). The loader passes
over norms without a word, so they are never written. There is no place for a tied embedding, which would be adapted on
the side of the input alone.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from cl_graft.errors import CLGraftError
from cl_graft.skillpack.folders.checkpoint import CheckpointError
from cl_graft.skillpack.tools.adapter import Adapter, Exported, Module, NothingToExport

# {model type of transformers: (architecture of llama.cpp, whether its converter reorders the rows of q and k)}
ARCHITECTURES = {
    "llama": ("LLAMA", True),
    "mistral": ("LLAMA", True),
    "granite": ("GRANITE", True),
    "qwen2": ("QWEN2", False),
    "qwen3": ("QWEN3", False),
    "gemma": ("GEMMA", False),
    "gemma2": ("GEMMA2", False),
    "gemma3_text": ("GEMMA3", False),
    "phi3": ("PHI3", False),
    "olmo2": ("OLMO2", False),
}


class GGUFMissing(CLGraftError, ImportError):
    """The package that writes GGUF is not installed."""


def export_gguf(adapter: Adapter, out: str | os.PathLike[str]) -> list[Exported]:
    """Write one GGUF file, in float32; a row per tensor. The file appears whole or not at all.

    Raises GGUFMissing, NothingToExport for an architecture that is not known here, CheckpointError where the file
    cannot be written.
    """
    try:
        import gguf
    except ImportError as error:
        raise GGUFMissing("GGUF needs a package; run `pip install cl-graft[gguf]`.") from error
    config = adapter.meta.model.config.get_text_config()
    if config.model_type not in ARCHITECTURES:
        raise NothingToExport(
            f"how llama.cpp names the tensors of {config.model_type!r} is not known here (known: "
            f"{', '.join(ARCHITECTURES)}); export --to peft, and run llama.cpp's convert_lora_to_gguf.py on that."
        )
    kind, permutes = ARCHITECTURES[config.model_type]
    arch = getattr(gguf.MODEL_ARCH, kind)
    known = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    names: dict[Module, str] = {}
    for module in adapter.modules:
        name = known.get_name(module.name)
        tied = sum(other.tensor == module.tensor for other in adapter.modules) > 1
        if name is None or tied:
            why = (
                "llama.cpp adapts a tied embedding at the input alone"
                if tied
                else "unknown to llama.cpp"
            )
            adapter.left_out[module.tensor] = why
        else:
            names[module] = f"{name}.weight"
    if not names:
        raise NothingToExport(
            f"the pack of task {adapter.pack.task!r} changes nothing that llama.cpp could adapt; export it to a folder "
            "(--to hf)."
        )
    path = Path(out)
    if path.exists():
        raise CheckpointError(f"{path} exists; name a new file.")
    part = path.with_name(f".{path.name}-{secrets.token_hex(4)}.tmp")
    rows: dict[str, Exported] = {}
    try:
        writer = gguf.GGUFWriter(part, gguf.MODEL_ARCH_NAMES[arch])
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(adapter.rank))
        writer.add_name(adapter.pack.task)
        _write(writer, adapter, names, config if permutes else None, rows)
        writer.close()
        os.replace(part, path)
    except OSError as error:
        raise CheckpointError(
            f"{path} was not written ({error.strerror}); name another."
        ) from error
    finally:
        part.unlink(missing_ok=True)
    return adapter.told(rows)


def _write(
    writer: Any,
    adapter: Adapter,
    names: dict[Module, str],
    heads: Any | None,
    rows: dict[str, Exported],
) -> None:
    """Where all tensors lie, then one module's after another's. heads: the configuration, where q and k are turned."""
    for module, name in names.items():
        out, inner = adapter.pack.tensors[module.tensor].shape
        a, b = (adapter.rank, inner), (out, adapter.rank)
        if module.kind != "linear":
            a, b = (adapter.rank, out), (inner, adapter.rank)
        a = a[::-1] if module.kind == "embedding" else a
        for side, shape in (("a", a), ("b", b)):
            size = 4 * shape[0] * shape[1]
            writer.add_tensor_info(f"{name}.lora_{side}", shape, np.dtype(np.float32), size)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for module in names:
        (left, right), rows[module.tensor] = adapter.factors(module)
        left = _reordered(left, module.name, heads) if heads is not None else left
        right = right.T if module.kind == "embedding" else right
        for part in (right, left):
            writer.write_tensor_data(part.contiguous().numpy())


def _reordered(left: Tensor, name: str, config: Any) -> Tensor:
    """The rows of q and k as llama.cpp's rotation wants them: the halves of each head interleaved."""
    kind = name.rpartition(".")[2]
    if kind not in ("q_proj", "k_proj"):
        return left
    heads = config.num_attention_heads if kind == "q_proj" else config.num_key_value_heads
    return left.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
