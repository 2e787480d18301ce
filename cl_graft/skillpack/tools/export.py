"""A pack as a LoRA adapter folder (PEFT), for engines that serve adapters: what fits, and its cost.

Of the layers that are linear in the model, low-rank codecs give their factors as they are; other
codecs are cut to a rank by their best approximation (Eckart and Young 1936). Everything else of a
pack has no place in an adapter and is told in the rows; the folder form (`folder.apply_pack`)
holds it all. LoRA: Hu et al. 2022; every module has its own rank, and scaling 1.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cl_graft.models.meta_model import MetaModel, meta_model
from cl_graft.skillpack.codecs import Encoded, is_factored, rank_of
from cl_graft.skillpack.folders.apply import check_base
from cl_graft.skillpack.folders.checkpoint import Checkpoint, new_folder, write_tensors
from cl_graft.skillpack.format.errors import SkillPackError
from cl_graft.skillpack.format.file import SkillPack
from cl_graft.skillpack.live.decode import factors
from cl_graft.skillpack.live.grafted import check_deltas

Factors = tuple[Tensor, Tensor]  # float32: left (out, r), right (r, in)
MOST_RANK = 512  # the largest rank that serving engines take
COLUMNS = 4096  # of a delta that are widened to float64 at a time


class NothingToExport(SkillPackError):
    """A pack without a linear layer, or a rank that leaves nothing."""


class Exported(NamedTuple):
    """One tensor of a pack: what became of it.

    rank: None where it was left out. error: ||delta - exported|| / ||delta||, None where the delta
    is zero or left out. note: why it was left out, or what to beware of; else empty.
    """

    name: str
    codec: str
    rank: int | None
    error: float | None
    note: str


class _Module(NamedTuple):
    """A linear layer of the model. transposed: its weight is (in, out), as GPT-2's Conv1D has it. head: it is the
    model's output head."""

    name: str
    tensor: str
    rank: int
    transposed: bool
    head: bool


def export_peft(
    pack: SkillPack,
    base_dir: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    rank: int | None = None,
    head: bool = True,
) -> list[Exported]:
    """Write `adapter_config.json` and `adapter_model.safetensors`, in float32; a row per tensor.

    rank: the most that any module gets; by default what a low-rank codec has, and MOST_RANK for
    other codecs. head: whether an output head that is not tied is in the adapter, which vLLM
    refuses for many architectures (its `check_unexpected_modules`). Raises WrongBase,
    ShapeMismatch, NoDelta, NothingToExport, CheckpointError.
    """
    if rank is not None and rank < 1:
        raise NothingToExport(f"an adapter of rank {rank} holds nothing; give a rank of 1 or more.")
    check_deltas([pack])
    base = Checkpoint(base_dir)
    check_base(base, pack)
    modules, left_out = _sort(pack, meta_model(base.folder), rank, head)
    if not modules:
        raise NothingToExport(
            f"the pack of task {pack.task!r} changes no linear layer that an adapter could hold; "
            "export it to a folder (--to hf)."
        )
    rows: dict[str, Exported] = {}
    with new_folder(Path(out_dir)) as folder:
        config = _config(modules, str(base.folder))
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
        _write(folder / "adapter_model.safetensors", pack, modules, rows)
    return [rows.get(name) or left_out[name] for name in pack.tensors]


# what fits


def _sort(
    pack: SkillPack, meta: MetaModel, most: int | None, head: bool
) -> tuple[list[_Module], dict[str, Exported]]:
    parameters = dict(meta.model.named_parameters(remove_duplicate=False))
    uses = Counter(id(parameter) for parameter in parameters.values())
    modules, left_out = [], {}
    for name, encoded in pack.tensors.items():
        inner = meta.parameter_of(name) or ""
        parameter = parameters.get(inner)
        owner = meta.model.get_submodule(inner.rpartition(".")[0])
        why = _why_not(name, encoded, pack, owner, parameter)
        if not why and uses[id(parameter)] > 1:
            why = "left out: tied to another tensor"
        is_head = meta.role_of(name) == "head"
        if not why and is_head and not head:
            why = "left out: vLLM refuses a head in an adapter for many models"
        if why:
            left_out[name] = Exported(name, encoded.codec, None, None, why)
            continue
        own = rank_of(encoded)
        rank = min(encoded.shape) if own is None else own
        limit = most if most is not None else MOST_RANK if own is None else rank
        path, transposed = inner.removesuffix(".weight"), meta.is_transposed(name)
        modules.append(_Module(path, name, max(1, min(rank, limit)), transposed, is_head))
    return modules, left_out


def _why_not(
    name: str, encoded: Encoded, pack: SkillPack, owner: nn.Module, parameter: Tensor | None
) -> str:
    """Why a tensor has no place in an adapter, or nothing where it has."""
    from transformers.pytorch_utils import Conv1D

    if name in pack.added:
        return "left out: the base has no such tensor"
    if name in pack.grown:
        return "left out: an adapter cannot change the number of rows"
    if len(encoded.shape) == 1:
        return "left out: a norm or bias is no matrix"
    if isinstance(owner, nn.Embedding):
        return "left out: an embedding"
    whole = parameter is not None and tuple(parameter.shape) == tuple(encoded.shape)
    if not whole or len(encoded.shape) != 2 or not isinstance(owner, (nn.Linear, Conv1D)):
        return "left out: not the weight of a linear layer"
    return ""


# what is written


def _config(modules: list[_Module], base: str) -> dict[str, Any]:
    """adapter_config.json. r is the largest rank and alpha = r, so that scaling is 1 throughout, also
    for readers that know no patterns."""
    largest = max(module.rank for module in modules)
    ranks = {module.name: module.rank for module in modules if module.rank != largest}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "bias": "none",
        "r": largest,
        "lora_alpha": largest,
        "lora_dropout": 0.0,
        "fan_in_fan_out": any(module.transposed for module in modules),
        "target_modules": [module.name for module in modules],
        "rank_pattern": ranks,
        "alpha_pattern": ranks,
        "init_lora_weights": True,
        "use_rslora": False,
    }


def _write(path: Path, pack: SkillPack, modules: list[_Module], rows: dict[str, Exported]) -> None:
    """The adapter's tensors, two a module, made when they are asked for."""
    specs: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    made: dict[str, tuple[_Module, str]] = {}
    for module in modules:
        out, inner = pack.tensors[module.tensor].shape
        out, inner = (inner, out) if module.transposed else (out, inner)
        for side, shape in (("A", (module.rank, inner)), ("B", (out, module.rank))):
            key = f"base_model.model.{module.name}.lora_{side}.weight"
            specs[key], made[key] = (torch.float32, shape), (module, side)
    last: dict[str, Factors] = {}

    def fetch(key: str) -> Tensor:
        module, side = made[key]
        if module.tensor not in last:
            last.clear()
            last[module.tensor], rows[module.tensor] = _factorised(pack, module)
        left, right = last[module.tensor]
        if module.transposed:
            left, right = right.T, left.T
        return (right if side == "A" else left).contiguous()

    write_tensors(path, specs, fetch)


def _factorised(pack: SkillPack, module: _Module) -> tuple[Factors, Exported]:
    encoded = pack.tensors[module.tensor]
    delta = pack.delta(module.tensor)
    if is_factored(encoded):
        pair: Factors = factors([encoded])
        pair = cut(*pair, module.rank) if pair[0].shape[1] > module.rank else pair
    else:
        pair = best_factors(delta, module.rank)
    left, right = _padded(*pair, module.rank)
    norm = float(delta.norm())
    error = float((delta - left @ right).norm()) / norm if norm else None
    notes = []
    if module.rank > MOST_RANK:
        notes.append(f"rank over {MOST_RANK}: refused by serving engines; give --rank")
    if module.head:
        notes.append("a head: vLLM refuses it for many models; --to vllm leaves it out")
    return (left, right), Exported(
        module.tensor, encoded.codec, module.rank, error, ", ".join(notes)
    )


def best_factors(delta: Tensor, rank: int) -> Factors:
    """The best approximation of a rank, as (left, right); delta: (out, in).

    The singular vectors of the shorter side are eigenvectors of its Gram matrix (float64); delta is
    projected on them, which keeps full precision in the product whatever theirs is.
    """
    if delta.shape[0] > delta.shape[1]:
        right, left = best_factors(delta.T, rank)
        return left.T, right.T
    parts = delta.split(COLUMNS, dim=1)
    gram = torch.zeros(delta.shape[0], delta.shape[0], dtype=torch.float64)
    for part in parts:
        gram += part.double() @ part.double().T
    vectors = torch.linalg.eigh(gram).eigenvectors[:, -rank:]
    right = torch.cat([(vectors.T @ part.double()).float() for part in parts], dim=1)
    return vectors.float(), right


def cut(left: Tensor, right: Tensor, rank: int) -> Factors:
    """The best approximation of a product by a lower rank, without forming the product."""
    q, r = torch.linalg.qr(left.double())
    p, s = torch.linalg.qr(right.double().T)
    u, values, v = torch.linalg.svd(r @ s.T, full_matrices=False)
    u, values, v = u[:, :rank], values[:rank], v[:rank]
    return (q @ (u * values)).float(), (v @ p.T).float()


def _padded(left: Tensor, right: Tensor, rank: int) -> Factors:
    """Pad factors with zero ranks up to `rank`: an adapter has at least one, a delta may have none."""
    lack = rank - left.shape[1]
    if lack <= 0:
        return left, right
    return nn.functional.pad(left, (0, lack)), nn.functional.pad(right, (0, 0, 0, lack))
