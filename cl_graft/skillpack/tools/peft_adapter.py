"""A pack as an adapter folder: of PEFT, which vLLM, SGLang and llama.cpp's converter read, too, or of MLX.

Changed rows of tables are written as PEFT's trainable tokens: indices, strictly increasing, and the new rows whole;
which rows, adapter.py says.
vLLM takes them from its pull request 55796 on (https://github.com/vllm-project/vllm/pull/55796).
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cl_graft.skillpack.folders.checkpoint import new_folder, write_tensors
from cl_graft.skillpack.tools.adapter import Adapter, Exported, Module

Part = tuple[Module, str]  # and the side: A (r, in) or B (out, r)


def export_peft(adapter: Adapter, out_dir: str | os.PathLike[str]) -> list[Exported]:
    """Write `adapter_config.json` and `adapter_model.safetensors`, in float32; a row per tensor.

    Raises CheckpointError where the folder cannot be written.
    """
    rows: dict[str, Exported] = {}
    with new_folder(Path(out_dir)) as folder:
        tokens = {module.name: adapter.changed(module) for module in adapter.rows}
        _write_json(folder, _peft_config(adapter, tokens))
        parts: dict[str, Part] = {}
        for module in adapter.modules:
            end = "lora_embedding_{}" if module.kind == "embedding" else "lora_{}.weight"
            for side in "AB":
                parts[f"base_model.model.{module.name}.{end.format(side)}"] = (module, side)
        _write(folder / "adapter_model.safetensors", adapter, parts, rows, tokens)
    return adapter.told(rows)


def export_mlx(adapter: Adapter, out_dir: str | os.PathLike[str]) -> list[Exported]:
    """Write `adapter_config.json` and `adapters.safetensors` as mlx_lm.tuner.utils.load_adapters reads them; a row per
    tensor. lora_a is (in, r), lora_b (r, out).

    Raises CheckpointError where the folder cannot be written.
    """
    rows: dict[str, Exported] = {}
    with new_folder(Path(out_dir)) as folder:
        layers, keys = set(), set()
        for module in adapter.modules:
            before, dot, inner = module.name.partition(".layers.")
            number, _, inner = inner.partition(".")
            keys.add(inner if dot else before)
            layers |= {int(number)} if dot else set()
        about = {"rank": adapter.rank, "scale": 1.0, "dropout": 0.0, "keys": sorted(keys)}
        count = adapter.meta.model.config.get_text_config().num_hidden_layers
        _write_json(
            folder, {"fine_tune_type": "lora", "num_layers": count, "lora_parameters": about}
        )
        parts = {f"{m.name}.lora_{s.lower()}": (m, s) for m in adapter.modules for s in "AB"}
        _write(folder / "adapters.safetensors", adapter, parts, rows, {}, turned=True)
    return adapter.told(rows)


def _write_json(folder: Path, config: dict[str, Any]) -> None:
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _peft_config(adapter: Adapter, tokens: dict[str, Tensor]) -> dict[str, Any]:
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(adapter.base.folder),
        "inference_mode": True,
        "bias": "none",
        "r": adapter.rank,
        "lora_alpha": adapter.rank,
        "lora_dropout": 0.0,
        "fan_in_fan_out": any(module.kind == "transposed" for module in adapter.modules),
        "target_modules": [module.name for module in adapter.modules],
        "init_lora_weights": True,
        "use_rslora": False,
    }
    indices = {name: ids.tolist() for name, ids in tokens.items()}
    return config | ({"trainable_token_indices": indices} if indices else {})


def _write(
    path: Path,
    adapter: Adapter,
    parts: dict[str, Part],
    rows: dict[str, Exported],
    tokens: dict[str, Tensor],
    turned: bool = False,
) -> None:
    """The adapter's tensors, made when they are asked for; turned: each of them transposed."""
    specs: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    tables: dict[str, Module] = {}
    for key, (module, side) in parts.items():
        out, inner = adapter.pack.tensors[module.tensor].shape
        out, inner = (out, inner) if module.kind == "linear" else (inner, out)
        shape = (adapter.rank, inner) if side == "A" else (out, adapter.rank)
        specs[key] = torch.float32, shape[::-1] if turned else shape
    for module in adapter.rows:
        key = f"base_model.model.{module.name}.token_adapter.trainable_tokens_delta"
        width = adapter.pack.tensors[module.tensor].shape[1]
        specs[key], tables[key] = (torch.float32, (len(tokens[module.name]), width)), module
    last: dict[Module, tuple[Tensor, Tensor]] = {}

    def fetch(key: str) -> Tensor:
        if key in tables:
            return _rows(adapter, tables[key], tokens[tables[key].name], rows)
        module, side = parts[key]
        if module not in last:
            last.clear()
            last[module], rows[module.tensor] = adapter.factors(module)
        part = last[module]["BA".index(side)]
        return (part.T if turned else part).contiguous()

    write_tensors(path, specs, fetch)


def _rows(adapter: Adapter, module: Module, ids: Tensor, rows: dict[str, Exported]) -> Tensor:
    """The new rows of a table, float32 (n, width)."""
    delta = adapter.pack.delta(module.tensor)
    others = torch.ones(len(delta), dtype=torch.bool)
    others[ids] = False
    lost = float(delta[others].square().sum())
    note = f"{len(ids)} of {len(delta)} rows, whole"
    note += ": those that change most" if lost else ""
    rows[module.tensor] = adapter.row(module.tensor, delta, lost, note)
    return adapter.base.read(module.tensor)[ids].float() + delta[ids]
