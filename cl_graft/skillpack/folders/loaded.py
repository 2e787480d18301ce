"""The weights that a model was loaded with, read from its own files when they are asked for: memory holds them once."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cl_graft.models.spread import Read, copies, is_spread, itself
from cl_graft.models.weights import CheckpointError
from cl_graft.skillpack.folders.checkpoint import Checkpoint
from cl_graft.skillpack.memory import release


def as_loaded(model: Any) -> Mapping[str, Tensor]:
    """{parameter: its values now, whatever becomes of it}; not to be written to.

    Of a model on the CPU what its folder holds bit for bit is read from there each time it is asked for; the rest, and
    all of another model, is what `copies` gives. Reading raises CheckpointError where the files are not any more what
    they were.
    """
    if is_spread(model) or model.device.type != "cpu":
        return copies(model)
    files, readers, shapes = _Files(_folder(model)), {}, {}
    for name, parameter in model.named_parameters():
        if files.hold(name, parameter):
            readers[name] = partial(files.read, name, parameter.dtype)
        else:
            readers[name] = partial(itself, parameter.detach().clone())
        shapes[name] = tuple(parameter.shape)
    release()
    return Read(readers, shapes)


class _Files:
    """A folder's tensors, as long as nobody writes to its files; none where there is no folder that can be read."""

    def __init__(self, folder: Path | None):
        self._checkpoint: Checkpoint | None = None
        if folder is not None:
            try:
                self._checkpoint = Checkpoint(folder)
            except CheckpointError:
                return
            files = {info.file for info in self._checkpoint.tensors.values()}
            self._seen = {file: _state(file) for file in files}

    def hold(self, name: str, parameter: Tensor) -> bool:
        """Whether the parameter, which lies in host memory, can be read from here, bit for bit."""
        info = self._checkpoint and self._checkpoint.tensors.get(name)
        if not info or info.shape != tuple(parameter.shape):
            return False
        return torch.equal(_bits(self.read(name, parameter.dtype)), _bits(parameter.detach()))

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        assert self._checkpoint is not None
        file = self._checkpoint.tensors[name].file
        if _state(file) != self._seen[file]:
            raise CheckpointError(
                f"{file} was written to or removed while a cell had its base from it; leave a model's files alone, and "
                "run the cell again."
            )
        return self._checkpoint.read(name).to(dtype)


def _folder(model: Any) -> Path | None:
    """Where a model of transformers was loaded from; None where it was made in this process."""
    name = getattr(model, "name_or_path", "")
    if not name or Path(name).is_dir():
        return Path(name) if name else None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(
        name, "config.json", revision=getattr(model.config, "_commit_hash", None)
    )
    return Path(found).parent if isinstance(found, str) else None


def _state(file: Path) -> tuple[int, ...] | None:
    """What changes where a file is written to or another is put in its place; None of none."""
    try:
        told = os.stat(file)
    except OSError:
        return None
    return told.st_dev, told.st_ino, told.st_size, told.st_mtime_ns


def _bits(x: Tensor) -> Tensor:
    return x.reshape(-1).view(torch.uint8)
