"""Reads an offline `.wandb` file: what was logged, as W&B itself would upload it.

The file is a LevelDB log after a header of seven bytes (`:W&B`, two magic bytes, a version): blocks of
32 KiB, counted from the start of the file, in which a record is a checksum (4 bytes), a length (2), a
kind (1) and its data. A record that does not fit into its block goes on in the next one. Put together,
the data is one `Record` of W&B's protocol buffers, whose values are JSON.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BLOCK, HEADER = 32 * 1024, struct.Struct("<IHB")
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


@dataclass
class Logged:
    """config, summary: the last value of each key. history: one dictionary a call of `log`.

    artifacts: each with its type, name, metadata and files, {name in it: path on disk}. exit_code: None where the run
    was never closed.
    """

    name: str = ""
    id: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    artifacts: list[dict[str, Any]] = field(default_factory=list)
    exit_code: int | None = None

    def at(self, key: str) -> list[Any]:
        """Every value that `key` was logged with, in order."""
        return [row[key] for row in self.history if key in row]


def read(path: Path) -> Logged:
    """The whole file, which may lack its end. Raises ValueError for a file of another kind."""
    from wandb.proto import wandb_internal_pb2

    logged = Logged()
    for data in payloads(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            logged.name, logged.id = record.run.display_name, record.run.run_id
            logged.config |= _values(record.run.config.update)
        elif kind == "config":
            logged.config |= _values(record.config.update)
        elif kind == "history":
            logged.history.append(_values(record.history.item))
        elif kind == "summary":
            logged.summary |= _values(record.summary.update)
        elif kind == "artifact":
            logged.artifacts.append(_artifact(record.artifact))
        elif kind == "exit":
            logged.exit_code = record.exit.exit_code
    return logged


def payloads(data: bytes) -> Iterator[bytes]:
    """The data of every whole record, in order."""
    if not data.startswith(b":W&B"):
        raise ValueError("not a .wandb file: it does not begin with ':W&B'.")
    place, parts = 7, b""
    while place + HEADER.size <= len(data):
        room = BLOCK - place % BLOCK
        if room < HEADER.size:  # too little for another record: zeros up to the next block
            place += room
            continue
        _, length, kind = HEADER.unpack_from(data, place)
        if kind not in (FULL, FIRST, MIDDLE, LAST):
            return  # the part of the file that was never written
        place += HEADER.size
        parts += data[place : place + length]
        place += length
        if kind in (FULL, LAST):
            yield parts
            parts = b""


def _artifact(record: Any) -> dict[str, Any]:
    return {
        "type": record.type,
        "name": record.name,
        "metadata": json.loads(record.metadata or "{}"),
        "files": {entry.path: entry.local_path for entry in record.manifest.contents},
    }


def _values(items: Any) -> dict[str, Any]:
    """{key: value}, a nested key as dictionaries in each other."""
    values: dict[str, Any] = {}
    for item in items:
        *outer, last = item.nested_key or [item.key]
        place = values
        for key in outer:
            place = place.setdefault(key, {})
        place[last] = json.loads(item.value_json)
    return values
