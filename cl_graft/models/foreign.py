"""Folders that hold a model in another form than transformers' safetensors, and how each becomes one.

What the sentences name is run by tests/skillpack/test_foreign.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

FILES = "copy config.json and the tokenizer's files of the base there"
STEP = re.compile(r"checkpoint-(\d+)")


def told(folder: Path) -> str | None:
    """One sentence on what a folder without safetensors is, with the cure; None for a kind that is not known."""
    return next((told for kind in KINDS if (told := kind(folder))), None)


def pickled(folder: Path) -> str | None:
    """The name of pickled weights that transformers reads."""
    found = sorted(file.name for file in folder.glob("pytorch_model*.bin"))
    return next((name for name in found if name != "pytorch_model_fsdp.bin"), None)


def zero_folder(folder: Path) -> bool:
    """Whether a DeepSpeed engine saved its partitioned weights here."""
    return any(folder.glob("global_step*")) or (folder / "zero_to_fp32.py").is_file()


def zero_cure(folder: Path | str) -> str:
    """How the partitioned weights that a DeepSpeed engine saved in a folder become a model folder."""
    return (
        f"run `python -m deepspeed.utils.zero_to_fp32 {folder} NEW --safe_serialization`, {FILES}"
    )


def adapter_cure(folder: Path) -> str:
    """How a PEFT adapter becomes a model folder."""
    how = _saving("peft.AutoPeftModelForCausalLM", str(folder), ".merge_and_unload()")
    return f"merge it into its base: {how}"


def _hub_cache(folder: Path) -> str | None:
    if not folder.name.startswith("models--") and not (folder / "refs").is_dir():
        return None
    snapshots = [place for place in folder.glob("snapshots/*") if place.is_dir()]
    if not snapshots:
        return f"{folder} is the hub's cache of a model without a snapshot; download it again."
    main = folder / "refs" / "main"
    commit = main.read_text().strip() if main.is_file() else ""
    newest = max(snapshots, key=lambda place: (place.name == commit, place.stat().st_mtime))
    return f"{folder} is the hub's cache of a model, which lies deeper; give {newest}."


def _fsdp_shards(folder: Path) -> str | None:
    shards = [*folder.glob("*.distcp"), *folder.glob("pytorch_model_fsdp*/*.distcp")]
    if not shards:
        return None
    return (
        f"{folder} holds the shards of FSDP; run `accelerate merge-weights {shards[0].parent} NEW`, {FILES}, and "
        "give NEW."
    )


def _fsdp_whole(folder: Path) -> str | None:
    if not (folder / "pytorch_model_fsdp.bin").is_file():
        return None
    return (
        f"{folder} holds a state dict of FSDP; copy pytorch_model_fsdp.bin to a folder NEW as pytorch_model.bin, "
        f"{FILES}, and convert it: AutoModelForCausalLM.from_pretrained(NEW).save_pretrained(CONVERTED)."
    )


def _zero(folder: Path) -> str | None:
    if not zero_folder(folder):
        return None
    return (
        f"{folder} holds the partitioned weights of DeepSpeed; {zero_cure(folder)}, and give NEW."
    )


def _adapter(folder: Path) -> str | None:
    if not any(folder.glob("adapter_model.*")) and not (folder / "adapter_config.json").is_file():
        return None
    return f"{folder} holds a PEFT adapter and no model; {adapter_cure(folder)}."


def _gguf(folder: Path) -> str | None:
    found = next(iter(sorted(folder.glob("*.gguf"))), None)
    if not found:
        return None
    return (
        f"{found} is for llama.cpp; give the Hugging Face folder that it was made from, or make one: "
        f"`cl-graft models import {found} --out NEW`."
    )


def _bin(folder: Path) -> str | None:
    name = pickled(folder)
    if not name:
        return None
    how = _saving("AutoModelForCausalLM", str(folder))
    return f"{folder} holds pickled weights ({name}), which are not read; convert: {how}."


def _original(folder: Path) -> str | None:
    if not any(folder.glob("consolidated*")):
        return None
    return (
        f"{folder} holds a model as its authors' own code reads it; give the same model's folder in the form of "
        "transformers, which its page on the hub has, too."
    )


def _steps(folder: Path) -> str | None:
    found = [(int(m[1]), p) for p in folder.iterdir() if (m := STEP.fullmatch(p.name))]
    if not found:
        return None
    return (
        f"{folder} is the folder of a training run; give one of its checkpoints: {max(found)[1]}."
    )


def _other_library(folder: Path) -> str | None:
    for name in ("tf_model.h5", "flax_model.msgpack"):
        if (folder / name).is_file():
            return f"{folder} holds {name}, of another library; give the same model in safetensors."
    return None


def _saving(kind: str, folder: str, then: str = "") -> str:
    return f"{kind}.from_pretrained({folder!r}){then}.save_pretrained(NEW)"


KINDS: tuple[Callable[[Path], str | None], ...] = (
    *(_hub_cache, _fsdp_shards, _fsdp_whole, _zero, _adapter, _gguf, _bin, _original, _steps),
    _other_library,
)
