"""Small files in a pack: what tuning changed besides weights, by names of a list, bounded and never run.

A file is stored as zlib (RFC 1950) has it, or as it is where that takes no fewer bytes. One of no bytes stands for a
file that the tuned model has not: the base's of that name is left out. JSON that names code to be fetched and run is
refused when it is stored and when it is read.
"""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from reprlib import repr as short
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cl_graft.skillpack.codecs.encoded import whole
from cl_graft.skillpack.format.errors import CorruptPack

FILES = "files"  # of the header; and what stands before the colon in the key of such a part
CHECKSUM_BYTES = 8
SETTINGS = ("config.json", "generation_config.json")
TALK = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.json")
TEMPLATE = "chat_template.jinja"
TEMPLATES = re.compile(r"additional_chat_templates/[A-Za-z0-9_-]{1,64}\.jinja")
VOCABULARY = (
    *("tokenizer.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt"),
    *("tokenizer.model", "spiece.model"),
)
# bytes of one file: of those that are parsed when they are read, of the others; bytes and number of all
MOST_PARSED, MOST, MOST_IN_ALL, MOST_FILES = 8 << 20, 64 << 20, 128 << 20, 64
MOST_VALUES = 1 << 20  # in the JSON of a file that is parsed
CODE = ("auto_map", "custom_pipelines", "custom_generate", "trust_remote_code")


class FileSpec(NamedTuple):
    """What the header says of a file: its bytes, those that are stored, and the checksum of these."""

    size: int
    stored: int
    checksum: str


@dataclass(frozen=True)
class PackedFile:
    """A file as a pack stores it. size: its bytes; stored: those in the pack."""

    size: int
    stored: bytes

    @classmethod
    def of(cls, content: bytes) -> PackedFile:
        """Pack the content of a file."""
        packed = zlib.compress(content, 9)
        return cls(len(content), packed if len(packed) < len(content) else content)

    @cached_property
    def spec(self) -> FileSpec:
        """What the header says of it."""
        return FileSpec(self.size, len(self.stored), _checksum(self.stored))

    @property
    def part(self) -> Tensor:
        """The bytes that are stored, U8, (stored,)."""
        return torch.frombuffer(bytearray(self.stored), dtype=torch.uint8) if self.stored else EMPTY

    def content(self) -> bytes:
        """The file. Raises ValueError where the bytes that are stored do not stand for one of `size` bytes."""
        if len(self.stored) == self.size:
            return self.stored
        try:
            unpacked = zlib.decompressobj()
            content = unpacked.decompress(self.stored, self.size + 1)
        except zlib.error as error:
            raise ValueError(f"its bytes are not those of zlib ({error}).") from None
        if len(content) != self.size or not unpacked.eof or unpacked.unused_data:
            raise ValueError(f"its bytes do not stand for a file of {self.size} bytes.")
        return content


EMPTY = torch.zeros(0, dtype=torch.uint8)
Files = Mapping[str, PackedFile]


def is_known(name: str) -> bool:
    """Whether a pack may hold a file of this name."""
    return name in (*SETTINGS, *TALK, TEMPLATE, *VOCABULARY) or bool(TEMPLATES.fullmatch(name))


def check_names(path: Path, files: Mapping[str, Any]) -> dict[str, FileSpec]:
    """{name: what the header says}, bounded before anything is allocated. Raises CorruptPack."""
    specs: dict[str, FileSpec] = {}
    try:
        whole(len(files), "files", 0, MOST_FILES)
        for name, said in files.items():
            what = f"file {short(name)}"
            if not is_known(name):
                raise ValueError(f"{what} is none that a pack may hold.")
            if not isinstance(said, list | tuple) or len(said) != 3 or not isinstance(said[2], str):
                raise ValueError(f"{what} is not given by two sizes and a checksum.")
            size = whole(said[0], what, 0, MOST_PARSED if _is_parsed(name) else MOST)
            specs[name] = FileSpec(size, whole(said[1], what, 0, size), said[2])
        whole(sum(spec.size for spec in specs.values()), "bytes of all files", 0, MOST_IN_ALL)
    except ValueError as error:
        raise CorruptPack(f"{path}: {error}") from None
    return specs


def check_file(path: Path, name: str, file: PackedFile, checksum: str) -> None:
    """Raise CorruptPack unless a file is what its header says, and its JSON asks for no code."""
    if file.spec.checksum != checksum:
        raise CorruptPack(
            f"{path}, file {name!r} does not match its checksum; fetch or make the pack again."
        )
    try:
        content = file.content()
        if content and _is_parsed(name):
            parse(content)
    except ValueError as error:
        raise CorruptPack(f"{path}, file {name!r}: {error}") from None


def parse(content: bytes) -> dict[str, Any]:
    """The JSON object of a file. Raises ValueError for another content, or a key that asks for code."""
    if sum(map(content.count, (b"[", b"{", b","))) > MOST_VALUES:
        raise ValueError(f"it has over {MOST_VALUES} values.")
    try:
        found = json.loads(content)
        asks = _asked(found)
    except (ValueError, RecursionError):
        raise ValueError("it is not JSON.") from None
    if not isinstance(found, dict):
        raise ValueError("it is not a JSON object.")
    if asks:
        raise ValueError(
            f"it has the key {asks!r}, which asks for code to be run; save it without."
        )
    return found


def _asked(value: object) -> str | None:
    """The first key that asks for code, at any depth."""
    if isinstance(value, dict):
        named = next((key for key in CODE if key in value), None)
        return named or next((a for inner in value.values() if (a := _asked(inner))), None)
    if isinstance(value, list):
        return next((a for inner in value if (a := _asked(inner))), None)
    return None


def _is_parsed(name: str) -> bool:
    """Whether a file is JSON in which a key may ask for code."""
    return name in SETTINGS or name in TALK


def _checksum(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=CHECKSUM_BYTES).hexdigest()
