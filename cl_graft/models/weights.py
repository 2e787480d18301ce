"""The weights of a model folder before any is read: which files count, and what each tensor is called.

A folder that can be read in two ways, or in part, is refused with its cure: transformers takes one of two saves
without a word, and fills a model with random numbers where it finds no tensor of the right name.
Format: https://github.com/huggingface/safetensors (8 bytes of length, JSON header, payload).
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from cl_graft.errors import CLGraftError
from cl_graft.models import foreign

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_HEADER = 100_000_000  # bytes, the limit of safetensors
SAVED = re.compile(r"model(-\d+\S*)?\.safetensors")  # what a save of transformers writes
PICKLED = re.compile(r"pytorch_model(-\d+\S*)?\.bin(\.index\.json)?")
# steps of a name that wrappers put in: torch.compile, FSDP and activation checkpointing of PyTorch
WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
# what comes before every name: DistributedDataParallel and DeepSpeed, PEFT, a module that holds the model; the last is
# also a model's own, which is not doubled
PREFIXES = ("module.", "base_model.model.", "model.")


class CheckpointError(CLGraftError):
    """A checkpoint folder that cannot be read or written."""


class Stored(NamedTuple):
    """Where a tensor is: `nbytes` bytes from `start` of `file`, row-major; dtype as safetensors spells it."""

    shape: tuple[int, ...]
    dtype: str
    file: Path
    start: int
    nbytes: int


@dataclass(frozen=True)
class Weights:
    """stored: by the model's own names, in the order of the files. added: {what training has put into the names in the
    files: the pattern that finds it there}; the patterns are to be taken out in this order."""

    stored: dict[str, Stored]
    added: dict[str, str]

    @property
    def note(self) -> str:
        """A sentence about names that were changed, or nothing."""
        kinds = " and ".join(map(repr, self.added))
        return (
            f"Training has put {kinds} into the names of the tensors: taken out." if kinds else ""
        )


def is_bare(folder: Path) -> bool:
    """Whether a folder is a model's without any weights: its configuration says how large they will be."""
    weights = (*folder.glob("*.safetensors"), *folder.glob("*.bin"))
    return (folder / "config.json").is_file() and not weights and foreign.told(folder) is None


def check_folder(folder: Path) -> None:
    """Raise CheckpointError unless transformers can load the folder in one way only."""
    if not (folder / "config.json").is_file() and (why := foreign.told(folder)):
        raise CheckpointError(why)
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} holds no config.json; give a Hugging Face model folder.")
    if foreign.pickled(folder) and not _saved(folder):
        return  # transformers reads these
    weights(folder)


def weights(folder: Path) -> Weights:
    """Find a folder's tensors by the headers of its files. Raises CheckpointError for a folder that is not whole,
    or that holds two saves."""
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {folder}; give that of a Hugging Face model.")
    found = _saved(folder)
    if not found:
        raise CheckpointError(
            foreign.told(folder)
            or f"{folder} holds no {WEIGHTS}; give the folder of a Hugging Face model."
        )
    _check_one_save(folder, found)
    stored = _indexed(folder) if (folder / INDEX).is_file() else header(folder / WEIGHTS)
    stored, added = _named(folder, stored)
    _check_gathered(folder, stored)
    return Weights(stored, added)


# which files count


def _saved(folder: Path) -> list[str]:
    names = (file.name for file in folder.iterdir())
    return sorted(name for name in names if SAVED.fullmatch(name) or name == INDEX)


def _check_one_save(folder: Path, found: list[str]) -> None:
    names = {file.name for file in folder.iterdir()}
    listed = set(_weight_map(folder).values()) if INDEX in found else {WEIGHTS}
    if WEIGHTS not in found and INDEX not in found:
        raise CheckpointError(
            f"{folder} holds {found[0]} and no {INDEX}, which says what is where; fetch it too."
        )
    if over := [name for name in found if name not in listed | {INDEX}]:
        which = f"{INDEX}, which does not list it" if INDEX in found else WEIGHTS
        raise CheckpointError(
            f"{folder} holds {over[0]} beside {which}: two saves of which a reader takes one unasked; "
            f"move {_those(over)} out of the folder, or what belongs to the other save."
        )
    if other := sorted(name for name in names if PICKLED.fullmatch(name)):
        raise CheckpointError(
            f"{folder} holds {other[0]} beside {found[0]}: two saves of which a reader takes one unasked; "
            f"move {_those(other)} out of the folder, or what belongs to the other save."
        )
    if "adapter_config.json" in names:
        raise CheckpointError(
            f"{folder} holds a PEFT adapter beside a model, and transformers puts one on the other unasked; "
            "move adapter_config.json and the adapter's weights to a folder of their own."
        )


def _those(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more like it"


def _weight_map(folder: Path) -> dict[str, str]:
    index = read_json(folder / INDEX)
    where = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(where, dict) or not all(_is_name(file) for file in where.values()):
        raise CheckpointError(f"{folder / INDEX} maps no tensors to files; fetch it again.")
    return where


def _is_name(file: object) -> bool:
    """Whether it is a file of the folder itself; an index must not lead out of it."""
    return isinstance(file, str) and file.endswith(".safetensors") and Path(file).name == file


def _indexed(folder: Path) -> dict[str, Stored]:
    """The tensors of all shards, each in the file that the index assigns it to, and in no other."""
    where = _weight_map(folder)
    stored: dict[str, Stored] = {}
    for file in sorted(set(where.values())):
        if not (folder / file).is_file():
            raise CheckpointError(f"{folder} lacks {file}, which its index names; fetch it.")
        for name, info in header(folder / file).items():
            if name not in where:
                raise CheckpointError(
                    f"{folder / file} holds {name!r}, which the index does not assign to any file; "
                    "save the file again without it."
                )
            if where[name] != file:
                raise CheckpointError(
                    f"{folder / file} holds {name!r}, which the index assigns to {where[name]}; "
                    f"save {file} again without it."
                )
            stored[name] = info
    for name, file in where.items():
        if name not in stored:
            raise CheckpointError(
                f"{folder / file} lacks {name!r}, which the index says it holds; fetch the file again."
            )
    return stored


# what the tensors are called


def _named(folder: Path, stored: dict[str, Stored]) -> tuple[dict[str, Stored], dict[str, str]]:
    """The tensors by the model's own names, and what makes them of the names in the files."""
    if adapted := next((name for name in stored if ".lora_" in name), None):
        raise CheckpointError(
            f"{folder} holds {adapted!r}, of a LoRA adapter that is not merged; call the PEFT model's "
            "merge_and_unload() and save what it returns."
        )
    added = {}
    names = list(stored)
    for wrapper in WRAPPERS:
        pattern = rf"(?<![^.]){re.escape(wrapper)}"
        if any(re.search(pattern, name) for name in names):
            added[wrapper] = pattern
            names = [re.sub(pattern, "", name) for name in names]
    if prefix := _prefix(names):
        added[prefix] = f"^{re.escape(prefix)}"
        names = [name.removeprefix(prefix) for name in names]
    if len(set(names)) < len(names):
        raise CheckpointError(
            f"{folder} holds tensors of one name but for what training has put into it ({', '.join(added)}); save the "
            "model itself instead of what it is wrapped in."
        )
    return dict(zip(names, stored.values(), strict=True)), added


def _prefix(names: list[str], prefix: str = "") -> str:
    """What training has put before every name, one after another, or nothing."""
    for more in PREFIXES:
        inside = [name.removeprefix(prefix + more) for name in names]
        ours = more != "model." or any(name.startswith(("model.", "lm_head.")) for name in inside)
        if names and ours and all(name.startswith(prefix + more) for name in names):
            return _prefix(names, prefix + more)
    return prefix


def _check_gathered(folder: Path, stored: dict[str, Stored]) -> None:
    empty = [name for name, info in stored.items() if info.shape == (0,)]
    if empty:
        raise CheckpointError(
            f"{len(empty)} of {len(stored)} tensors of {folder} are empty ({empty[0]!r}, ...), as ZeRO-3 leaves them "
            "where it does not gather; save again under stage3_gather_16bit_weights_on_model_save, or "
            f"{foreign.zero_cure(folder if foreign.zero_folder(folder) else 'CHECKPOINT')}, and give NEW."
        )


# files


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises CheckpointError."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} holds no {path.name}; fetch it.") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}).") from error
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path} is no JSON; fetch it again.") from None


def header(path: Path) -> dict[str, Stored]:
    """The tensors of one safetensors file, in the order of the bytes, which have no gaps. Raises CheckpointError."""
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(8)
        length = int.from_bytes(first, "little")
        if first == b"version ":
            raise CheckpointError(f"{path} is git-lfs's pointer to a file; fetch the file itself.")
        if size < 8 or length > MAX_HEADER:
            raise CheckpointError(f"{path} is no safetensors file; fetch it again.")
        text = file.read(length)
    if len(text) < length:
        raise CheckpointError(f"{path} is cut short within its header; fetch it again.")
    try:
        entries = json.loads(text)
        entries.pop("__metadata__", None)
        rows = [(*e["data_offsets"], tuple(e["shape"]), e["dtype"], n) for n, e in entries.items()]
        bits = [8 if row[3] == "BOOL" else int(re.findall(r"\d+", row[3])[0]) for row in rows]
        rows = sorted((*row, width) for row, width in zip(rows, bits, strict=True))
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        raise CheckpointError(f"the header of {path} is damaged; fetch the file again.") from None
    tensors, end = {}, 0
    for start, last, shape, dtype, name, width in rows:
        nbytes = math.prod(shape) * width // 8
        tensors[name] = Stored(shape, dtype, path, 8 + length + start, nbytes)
        if start != end or last - start != nbytes or min(shape, default=0) < 0:
            raise CheckpointError(f"the header of {path} is damaged at {name!r}; fetch it again.")
        end = last
    if size != 8 + length + end:
        wanted = 8 + length + end
        raise CheckpointError(f"{path} has {size} bytes and not {wanted}; fetch it again.")
    return tensors
