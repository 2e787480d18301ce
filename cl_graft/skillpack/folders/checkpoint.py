"""Hugging Face checkpoint folders, one tensor at a time: what is in them, and writing new ones.

Tensors are read from their byte range in the file rather than mapped: pages of a mapped file count
as memory of the process until the system takes them back, and a shard may be larger than memory.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cl_graft.errors import UnknownName
from cl_graft.models.weights import INDEX, WEIGHTS, CheckpointError, Stored, read_json, weights
from cl_graft.skillpack.codecs.encoded import raw
from cl_graft.skillpack.format.fingerprint import fingerprint

MAX_SHARD_BYTES = 5_000_000_000
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
OTHER_WEIGHTS = (".safetensors", *PICKLED, ".index.json", ".h5", ".msgpack", ".gguf", ".onnx")
KEPT_FOLDERS = ("additional_chat_templates",)

Specs = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
Fetch = Callable[[str], Tensor]


class Info(NamedTuple):
    """Where a tensor is: its bytes begin at `start` of `file` and are in row-major order."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path
    start: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Checkpoint:
    """A folder with `model.safetensors`, or with its index and shards; nothing is kept in memory.

    tensors: {name: Info} in the order of the files, from their headers alone, by the model's own
    names: what training put before them is left off. notes: sentences about that. Raises
    CheckpointError for a folder that is not whole, or that holds two saves.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)
        found = weights(self.folder)
        self.tensors = {name: _info(name, stored) for name, stored in found.stored.items()}
        self.notes = [f"{self.folder}: {found.note}"] if found.note else []

    @cached_property
    def config(self) -> dict[str, Any]:
        """The content of config.json."""
        config = read_json(self.folder / "config.json")
        if not isinstance(config, dict):
            raise CheckpointError(
                f"{self.folder / 'config.json'} is not a model's; fetch it again."
            )
        return config

    @property
    def floating(self) -> list[str]:
        """Names of the tensors that are not integers or booleans."""
        return [name for name, info in self.tensors.items() if info.dtype.is_floating_point]

    @property
    def dtype(self) -> torch.dtype:
        """The floating dtype that takes the most bytes."""
        sizes: dict[torch.dtype, int] = {}
        for name in self.floating:
            info = self.tensors[name]
            sizes[info.dtype] = sizes.get(info.dtype, 0) + info.nbytes
        return max(sizes, key=lambda dtype: sizes[dtype], default=torch.float32)

    def read(self, name: str, part: int | None = None) -> Tensor:
        """A copy of one tensor on the CPU, in its own dtype; part: of its first index, that entry alone.

        Raises UnknownName, CheckpointError.
        """
        if name not in self.tensors:
            raise UnknownName(f"tensor in {self.folder}", name, self.tensors)
        info = self.tensors[name]
        if part is not None:
            shape = info.shape[1:]
            start = info.start + part * math.prod(shape) * info.dtype.itemsize
            info = info._replace(shape=shape, start=start)
        flat = torch.empty(math.prod(info.shape), dtype=info.dtype)
        room = flat.view(torch.uint8).numpy().data
        try:
            with info.file.open("rb", buffering=0) as file:
                file.seek(info.start)
                while room and (count := file.readinto(room)):
                    room = room[count:]
        except OSError as error:
            raise CheckpointError(f"{info.file} cannot be read ({error.strerror}).") from error
        if room:
            raise CheckpointError(f"{info.file} ends within {name!r}; fetch the file again.")
        return flat.reshape(info.shape)

    def own_delta(self, base: Checkpoint, name: str) -> Tensor | None:
        """What this adds to a tensor of `base`, float32, where it is known without subtracting; else None."""
        return None

    def fingerprint(self) -> str:
        """`file.fingerprint` of the floating tensors, by the names of the files."""
        return fingerprint((name, self.read(name)) for name in sorted(self.floating))


# reading


def _info(name: str, found: Stored) -> Info:
    if found.dtype not in DTYPES:
        what = f"{found.file} stores {name!r} as {found.dtype!r}, which is not read"
        raise CheckpointError(f"{what}; save the model in bfloat16 or float32.")
    return Info(found.shape, DTYPES[found.dtype], found.file, found.start)


# writing


def write_checkpoint(
    folder: str | os.PathLike[str],
    specs: Specs,
    fetch: Fetch,
    like: Checkpoint,
    *,
    config: dict[str, Any] | None = None,
    files: Mapping[str, bytes] | None = None,
    finish: Callable[[Path], None] = lambda folder: None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a model folder that transformers loads, asking `fetch` for one tensor after another.

    specs: {name: (dtype, shape)} in order; a shard takes as many as fit into `max_shard_bytes`, and
    at least one. like: its tokenizer and other files are copied, weights never. config: in place of
    like's config.json. files: {name: content} in place of like's; one without content is left out.
    finish: called with the folder when its weights are written. The folder appears whole or not at all.
    Raises CheckpointError where there is one with files in it already, where the system refuses it, or
    for a tensor unlike its spec.
    """
    with new_folder(Path(folder)) as building:
        _copy_other_files(like.folder, building)
        for name, content in (files or {}).items():
            (building / name).unlink(missing_ok=True)
            if content:
                (building / name).parent.mkdir(exist_ok=True)
                (building / name).write_bytes(content)
        if config is not None:
            (building / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        write_weights(building, specs, fetch, max_shard_bytes)
        finish(building)


def write_weights(
    folder: Path, specs: Specs, fetch: Fetch, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """The weights of a model folder: one file, or shards and their index; see `write_checkpoint`."""
    shards = _shards(specs, max_shard_bytes)
    total = len(shards)
    names = [f"model-{i:05}-of-{total:05}.safetensors" for i in range(1, total + 1)]
    names = names if total > 1 else [WEIGHTS]
    for name, shard in zip(names, shards, strict=True):
        write_tensors(folder / name, {key: specs[key] for key in shard}, fetch)
    if total > 1:
        where = {k: name for name, shard in zip(names, shards, strict=True) for k in shard}
        _write_index(folder / INDEX, specs, where)


def write_tensors(path: Path, specs: Specs, fetch: Fetch) -> None:
    """Write one safetensors file, with never more than one fetched tensor alive.

    Tensors of wide dtypes come first, so that all are aligned; equal ones keep the order of specs.
    """
    order = sorted(specs, key=lambda name: -specs[name][0].itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        start, end = end, end + _nbytes(specs[name])
        dtype, shape = specs[name]
        header[name] = {"dtype": NAMES[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            file.write(_bytes(name, fetch(name), specs[name]))
        file.flush()
        os.fsync(file.fileno())


def _bytes(name: str, tensor: Tensor, spec: tuple[torch.dtype, tuple[int, ...]]) -> memoryview:
    if (tensor.dtype, tuple(tensor.shape)) != spec:
        given = f"{tensor.dtype} {tuple(tensor.shape)}"
        raise CheckpointError(f"{name!r} is {given}, not {spec} as announced.")
    return raw(tensor)


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A sibling to write into, which becomes `folder` at the end, or nothing after an error."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} exists and is not empty; name a new folder.")
    building = folder.absolute().parent / f".{folder.name}-{secrets.token_hex(4)}.tmp"
    try:
        building.mkdir(parents=True)
        yield building
        os.replace(building, folder)
    except OSError as error:
        why = "the disk is full" if error.errno == errno.ENOSPC else error.strerror or str(error)
        raise CheckpointError(f"{folder} was not written ({why}); name another folder.") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _nbytes(spec: tuple[torch.dtype, tuple[int, ...]]) -> int:
    return math.prod(spec[1]) * spec[0].itemsize


def _shards(specs: Specs, max_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    room = max_bytes
    for name in specs:
        if shards[-1] and _nbytes(specs[name]) > room:
            shards.append([])
            room = max_bytes
        shards[-1].append(name)
        room -= _nbytes(specs[name])
    return shards


def _write_index(path: Path, specs: Specs, where: dict[str, str]) -> None:
    count = sum(math.prod(shape) for _, shape in specs.values())
    sizes = {"total_parameters": count, "total_size": sum(map(_nbytes, specs.values()))}
    index = {"metadata": sizes, "weight_map": where}
    path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _copy_other_files(source: Path, target: Path) -> None:
    files = [file for file in source.iterdir() if file.is_file()]
    for kept in KEPT_FOLDERS:
        files += (file for file in (source / kept).glob("*") if file.is_file())
    for file in files:
        inside = file.relative_to(source)
        if not file.name.endswith(OTHER_WEIGHTS) and not file.name.startswith("."):
            (target / inside).parent.mkdir(exist_ok=True)
            shutil.copyfile(file, target / inside)
