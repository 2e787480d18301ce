"""Where a compression keeps what it has finished: a dictionary, or a folder that outlives a kill."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


class Item(NamedTuple):
    """Tensors by name, and what else there is to say of them, plain JSON."""

    tensors: dict[str, Tensor]
    about: dict[str, Any]


WorkStore = MutableMapping[str, Item]  # a dict will do where a kill may cost the work


class Folder(MutableMapping[str, Item]):
    """One safetensors file an item, written to a sibling and renamed, so that an item is there or is not.

    An item that cannot be read counts as absent: its work is done again.
    """

    def __init__(self, path: Path):
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        for litter in path.glob("*.tmp"):
            litter.unlink()

    def __getitem__(self, key: str) -> Item:
        try:
            with safetensors.safe_open(self._file(key), framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                return Item(tensors, json.loads(file.metadata()["about"]))
        except (FileNotFoundError, SafetensorError):
            raise KeyError(key) from None

    def __setitem__(self, key: str, item: Item) -> None:
        target = self._file(key)
        temporary = target.with_suffix(".tmp")
        tensors = {name: t.contiguous().cpu() for name, t in item.tensors.items()}
        save_file(tensors, temporary, metadata={"key": key, "about": json.dumps(item.about)})
        temporary.replace(target)

    def __delitem__(self, key: str) -> None:
        self._file(key).unlink()

    def __iter__(self) -> Iterator[str]:
        for file in sorted(self.path.glob("*.safetensors")):
            with safetensors.safe_open(file, framework="pt") as opened:
                yield opened.metadata()["key"]

    def __len__(self) -> int:
        return sum(1 for _ in self.path.glob("*.safetensors"))

    def __contains__(self, key: object) -> bool:
        try:
            with safetensors.safe_open(self._file(str(key)), framework="pt"):
                return True
        except (FileNotFoundError, SafetensorError):
            return False

    def clear(self) -> None:
        """Remove the folder and all in it."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _file(self, key: str) -> Path:
        name = hashlib.blake2b(key.encode(), digest_size=12).hexdigest()
        return self.path / f"{name}.safetensors"
