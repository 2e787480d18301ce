"""The tuned side of a pair where it is no model folder: an adapter of PEFT on the base, or a GGUF file of the model.

An adapter is never merged: its delta is scale * B A in float32, and no weight of the base rounds it. A GGUF file is
what it holds, dequantised by transformers, whole in memory. Both are refused where they say more than that.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cl_graft.errors import first_line
from cl_graft.models import foreign
from cl_graft.models.meta_model import MetaModel, meta_model
from cl_graft.models.weights import CheckpointError, read_json
from cl_graft.skillpack.folders.checkpoint import Checkpoint, Info

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
UNCHANGED = ".base_layer.weight"  # tables, which PEFT saves beside their factors
PREFIX = "base_model.model."
SIDES = {"lora_A.weight": 0, "lora_B.weight": 1, "lora_embedding_A": 0, "lora_embedding_B": 1}
# values of adapter_config.json that leave scale * B A as the whole of an adapter
PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "use_dora": (False,),
    "use_qalora": (False,),
    "lora_bias": (False,),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
}
ALPHA = 8  # of PEFT's LoraConfig where it is not said
EMPTY = (
    *("modules_to_save", "layer_replication", "target_parameters", "trainable_token_indices"),
    *("alora_invocation_tokens", "arrow_config", "megatron_config"),
)


def tuned_checkpoint(place: str | os.PathLike[str], base: Checkpoint) -> Checkpoint:
    """Open a tuned model: its folder, the folder of a PEFT adapter on `base`, or a GGUF file, itself or in a folder.

    Raises CheckpointError with the cure for what cannot be read exactly.
    """
    path = Path(place)
    whole = any(path.glob("model*.safetensors")) or any(path.glob("pytorch_model*.bin"))
    if not whole and (path / CONFIG).is_file():
        return _Adapted(path, base)
    files = [path] if path.suffix == ".gguf" and path.is_file() else sorted(path.glob("*.gguf"))
    if not whole and len(files) == 1:
        return _Dequantised(files[0], base)
    return Checkpoint(path)


class _Adapted(Checkpoint):
    """A base under an adapter."""

    def __init__(self, folder: Path, base: Checkpoint):
        self.folder, self._base = base.folder, base
        said = read_json(folder / CONFIG)
        why = _unlike(said) if isinstance(said, dict) else f"{CONFIG} is no object"
        if why or not (folder / WEIGHTS).is_file():
            raise CheckpointError(_refused(folder, why or f"it has no {WEIGHTS}"))
        meta = meta_model(base.folder)
        self._parts = _parts(folder, said, meta, base)
        self.tensors = dict(base.tensors)
        for name, part in self._parts.items():
            self.tensors[name] = Info(base.tensors[name].shape, torch.float32, part.file, 0)
        source = said.get("base_model_name_or_path")
        self.notes = [
            f"{folder} is an adapter of {source!r} with {len(self._parts)} matrices; its delta is scale * B A, "
            "unmerged."
        ]

    def read(self, name: str, part: int | None = None) -> Tensor:
        """The base's tensor, and where the adapter has it their sum in float32."""
        if name not in self._parts:
            return self._base.read(name, part)
        whole = self._base.read(name).float() + self._parts[name].delta()
        return whole if part is None else whole[part]

    def own_delta(self, base: Checkpoint, name: str) -> Tensor | None:
        """scale * B A, float32; None on another base."""
        return self._parts[name].delta() if base is self._base and name in self._parts else None


@dataclass
class _Part:
    """Where a module's factors are, and what is made of them. turned: the weight is (in, out)."""

    file: Path
    keys: list[str]
    scale: float
    turned: bool

    def delta(self) -> Tensor:
        """scale * B A, float32, in the weight's shape."""
        from safetensors import safe_open

        with safe_open(self.file, "pt") as file:
            a, b = (file.get_tensor(key).float() for key in self.keys)
        product = b @ a * self.scale
        return product.T.contiguous() if self.turned else product


def _parts(
    folder: Path, said: dict[str, Any], meta: MetaModel, base: Checkpoint
) -> dict[str, _Part]:
    """{tensor of the base: its part of the adapter}."""
    from peft.utils.other import get_pattern_key
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / WEIGHTS, "pt") as file:
            shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        why = first_line(error)
        raise CheckpointError(f"{folder / WEIGHTS} is damaged ({why}); fetch it again.") from error
    found: dict[str, list[str]] = {}
    for key in shapes:
        end = next((end for end in SIDES if key.endswith("." + end)), None)
        if key.startswith(PREFIX) and key.endswith(UNCHANGED):
            _check_unchanged(folder, key, meta, base)
            continue
        if end is None or not key.startswith(PREFIX):
            raise CheckpointError(_refused(folder, f"it holds {key!r}"))
        module = key.removeprefix(PREFIX).removesuffix("." + end)
        found.setdefault(module, ["", ""])[SIDES[end]] = key
    parts = {}
    every = dict(meta.model.named_parameters(remove_duplicate=False))
    for module, keys in found.items():
        parameter = every.get(f"{module}.weight")
        name = meta.key_of(f"{module}.weight")
        if parameter is None or name is None or name not in base.tensors:
            raise CheckpointError(
                f"{folder} adapts {module!r}, which {base.folder} does not have; give the base it was trained on."
            )
        if sum(other is parameter for other in every.values()) > 1:
            raise CheckpointError(_refused(folder, f"{module!r} is tied to another module"))
        if not all(keys) or any(len(shapes[key]) != 2 for key in keys):
            raise CheckpointError(_refused(folder, f"{module!r} has not two matrices"))
        (rank, inner), (out, other) = (shapes[key] for key in keys)
        turned = meta.is_transposed(name) or "embedding" in keys[0]
        shape = (inner, out) if turned else (out, inner)
        if rank != other or shape != base.tensors[name].shape:
            raise CheckpointError(
                f"{folder} adapts {module!r} of shape {shape}, which is {base.tensors[name].shape} in {base.folder}; "
                "give the base it was trained on."
            )
        pattern = said.get("alpha_pattern") or {}
        alpha = pattern.get(get_pattern_key(pattern, module), said.get("lora_alpha", ALPHA))
        scale = alpha / (math.sqrt(rank) if said.get("use_rslora") else rank)
        parts[name] = _Part(folder / WEIGHTS, keys, scale, turned)
    return parts


def _check_unchanged(folder: Path, key: str, meta: MetaModel, base: Checkpoint) -> None:
    """Raise CheckpointError for a weight that an adapter brings along and the base has otherwise."""
    from safetensors import safe_open

    module = key.removeprefix(PREFIX).removesuffix(UNCHANGED)
    name = meta.key_of(f"{module}.weight")
    with safe_open(folder / WEIGHTS, "pt") as file:
        brought = file.get_tensor(key)
    ours = base.read(name) if name in base.tensors else None
    if ours is None or ours.shape != brought.shape or not torch.equal(ours, brought.to(ours.dtype)):
        raise CheckpointError(_refused(folder, f"it has weights of its own for {module!r}"))


def _unlike(said: dict[str, Any]) -> str:
    """Why an adapter is more than scale * B A, or nothing."""
    for key, values in PLAIN.items():
        if key in said and said[key] not in values:
            return f"its {key} is {json.dumps(said[key])}"
    more = next((key for key in EMPTY if said.get(key)), "")
    return f"it has {more}" if more else ""


def _refused(folder: Path, why: str) -> str:
    return f"{folder} is more than scale * B A ({why}); {foreign.adapter_cure(folder)}."


class _Dequantised(Checkpoint):
    """The tensors of a GGUF file under the names of the base's folder, float32."""

    def __init__(self, file: Path, base: Checkpoint):
        try:
            import gguf  # noqa: F401
            from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint
        except ImportError as error:
            raise CheckpointError(
                f"{file} needs a package to be read; run `pip install cl-graft[gguf]`."
            ) from error
        meta = meta_model(base.folder)
        try:
            loaded = load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=meta.model)
        except Exception as error:  # another for each thing that a file or an architecture lacks
            why = first_line(error)
            raise CheckpointError(
                f"{file} is not read by transformers ({why}); give the Hugging Face folder that it was made from."
            ) from error
        self.folder = base.folder
        self._held = {key: t for n, t in loaded["tensors"].items() if (key := meta.key_of(n))}
        self.tensors = {
            name: Info(tuple(tensor.shape), tensor.dtype, file, 0)
            for name, tensor in self._held.items()
        }
        self.notes = [
            f"{file}: the weights alone, dequantised; its tokenizer and settings are taken to be the base's."
        ]

    def read(self, name: str, part: int | None = None) -> Tensor:
        """A copy of a tensor, or of an entry of its first index."""
        held = self._held[name]
        return (held if part is None else held[part]).clone()
