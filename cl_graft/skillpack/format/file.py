"""SkillPack: one safetensors file with the encoded delta of one task.

header.py has what the file says of itself, write.py how it is written; here it is read.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cl_graft.skillpack import codecs
from cl_graft.skillpack.codecs import Encoded, Spec
from cl_graft.skillpack.codecs.encoded import raw
from cl_graft.skillpack.format import header
from cl_graft.skillpack.format.errors import (
    CorruptPack,
    NoDelta,
    NonFinite,
    NotASkillPack,
    PackNotFound,
    ShapeMismatch,
    SkillPackError,
    TruncatedPack,
    UnknownCodec,
    UnsupportedVersion,
    WrongBase,
)
from cl_graft.skillpack.format.files import (
    CHECKSUM_BYTES,
    FILES,
    PackedFile,
    check_file,
    check_names,
)
from cl_graft.skillpack.format.fingerprint import fingerprint
from cl_graft.skillpack.format.header import (
    AGAIN,
    BESIDE_CHECKSUMS,
    DIGEST_BYTES,
    FIELDS,
    FORMAT,
    MAGIC,
    MAX_HEAD,
    MAX_TEXT,
    TableEntry,
)
from cl_graft.skillpack.format.write import current_versions, packed_size, verify, write_pack

__all__ = [
    "FORMAT",
    "CorruptPack",
    "NoDelta",
    "NonFinite",
    "NotASkillPack",
    "PackNotFound",
    "ShapeMismatch",
    "SkillPack",
    "SkillPackError",
    "TruncatedPack",
    "UnknownCodec",
    "UnsupportedVersion",
    "WrongBase",
    "current_versions",
    "fingerprint",
    "packed_size",
    "write_pack",
]


@dataclass(frozen=True, eq=False)
class SkillPack:
    """The encoded delta of one task; two packs are the same where their digests are.

    tensors: {parameter name: Encoded}; options: of the method, plain JSON; base: the `fingerprint`
    of the model that the delta is added to. added: tensors that the base lacks, whose delta is
    against zero. grown: {name: shape in the base} of tensors that the base has in another number of
    rows; the delta has the tuned shape, rows that the base lacks count as zero, and those that it
    has too many are cut. files: {name: what else makes the tuned model what it is}, see files.py.
    """

    tensors: Mapping[str, Encoded]
    task: str
    method: str
    options: dict[str, Any]
    base: str
    versions: dict[str, str] = field(default_factory=current_versions)
    added: list[str] = field(default_factory=list)
    grown: dict[str, list[int]] = field(default_factory=dict)
    files: Mapping[str, PackedFile] = field(default_factory=dict)

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """{name: shape of its delta}."""
        return {name: encoded.shape for name, encoded in self.tensors.items()}

    @property
    def nbytes(self) -> int:
        """Exact bytes of the file that `save` writes. Raises as `packed_size` does."""
        return packed_size(self._specs, **self._fields)

    @cached_property
    def digest(self) -> str:
        """BLAKE2b (32 hex digits) of all that the file says: its header, and thereby the checksum
        (8 bytes) of every tensor. It tells damage from a whole file, not friend from foe."""
        sums = b"".join(header.checksum(self.tensors[name]) for name in sorted(self.tensors))
        files = {name: file.spec for name, file in self.files.items()}
        about = header.describe({**self._fields, FILES: files}, self._specs)
        return header.digests(header.text_of(about), b"", sums, self.base)[-DIGEST_BYTES:].hex()

    def delta(self, name: str) -> Tensor:
        """Tuned minus base of one tensor, float32, on the CPU.

        Raises CorruptPack where its parts do not fit its codec, NonFinite where it overflows,
        UnknownCodec for a codec that is not registered, NoDelta where the tuned tensor is kept itself.
        """
        return self._decoded(name, codecs.decode)

    def tuned(self, name: str, base: Tensor | None) -> Tensor:
        """A tensor that is kept itself, bit for bit, in its own dtype, on the CPU.

        base: the base's tensor of this name, None where it has none. Raises as `delta` does, but for NoDelta.
        """
        return self._decoded(name, lambda encoded: codecs.restore(encoded, base))

    @property
    def lossless(self) -> bool:
        """Whether tuned tensors are kept themselves, so that there is no delta to be added or merged."""
        return any(codecs.kept_dtype(encoded) is not None for encoded in self.tensors.values())

    def rows(self, name: str, ids: Tensor) -> Tensor:
        """`delta(name)[ids]`, where the codec can without the rest of it. ids: int64 (n,), on the CPU.

        Raises as `delta` does.
        """
        return self._decoded(name, lambda encoded: codecs.rows(encoded, ids))

    def decode(self) -> dict[str, Tensor]:
        """{name: `delta(name)`}."""
        return {name: self.delta(name) for name in self.tensors}

    def save(self, path: str | os.PathLike[str]) -> int:
        """Write the file and return its bytes: `write_pack` of these tensors."""
        return write_pack(path, self._specs, self.tensors.__getitem__, **self._fields)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        base: str | None = None,
        shapes: Mapping[str, tuple[int, ...]] | None = None,
    ) -> SkillPack:
        """Read a file and check all of it, header first; nothing is allocated that it cannot hold.

        base: the fingerprint that it must be for. shapes: of the base's parameters; they bound what
        decoding allocates, for a small file may stand for a large delta. Raises a SkillPackError.
        """
        path = Path(path)
        try:
            if not stat.S_ISREG(path.stat().st_mode):
                raise NotASkillPack(f"{path} is no regular file; give the path of a SkillPack.")
            with path.open("rb") as file:
                return _read(path, file, base, shapes)
        except (FileNotFoundError, NotADirectoryError):
            raise PackNotFound(f"there is no file {path}; check the path.") from None
        except OSError as error:
            why = error.strerror
            raise SkillPackError(f"{path} cannot be read ({why}); check its rights.") from error

    def _decoded(self, name: str, decode: Callable[[Encoded], Tensor]) -> Tensor:
        what = f"tensor {name!r} of task {self.task!r}"
        try:
            decoded = decode(self.tensors[name])
        except (UnknownCodec, NoDelta) as error:
            raise type(error)(f"{what}: {error}") from error
        except ValueError as error:
            raise CorruptPack(f"{what}: {error}") from error
        if not torch.isfinite(decoded).all():
            raise NonFinite(f"{what} is not finite once decoded; compress the delta again.")
        return decoded

    @property
    def _specs(self) -> dict[str, Spec]:
        return {name: encoded.spec for name, encoded in self.tensors.items()}

    @property
    def _fields(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in FIELDS}


def _read(
    path: Path, file: BufferedReader, base: str | None, shapes: Mapping[str, tuple[int, ...]] | None
) -> SkillPack:
    size = os.fstat(file.fileno()).st_size
    head = _read_head(path, file, size)
    sizes = header.sizes_of(path, head)
    wanted = len(head) + sum(sizes)
    if size < wanted:
        raise TruncatedPack(f"{path} has {size} of {wanted} bytes; {AGAIN}")
    if size > wanted:
        raise CorruptPack(f"{path} has {size - wanted} bytes too many; {AGAIN}")
    if max(sizes[1:]) > MAX_TEXT:
        raise header.damage(path)
    file.seek(len(head) + sizes[0])
    stored, digests = file.read(sizes[1]), file.read(sizes[2])
    text = header.unpacked(path, stored)
    checksums, own = digests[:-BESIDE_CHECKSUMS], digests[-2 * DIGEST_BYTES : -DIGEST_BYTES].hex()
    if len(digests) < BESIDE_CHECKSUMS or header.digests(text, stored, checksums, own) != digests:
        raise header.damage(path)
    about = header.parse(path, text) | {"base": own}
    specs = header.read_tensors(path, about["tensors"])
    header.check_lacking(path, about, specs)
    about[FILES] = check_names(path, about[FILES])
    table = header.table_of(specs, about[FILES])
    try:
        same = header.text_of(header.describe(about, specs)) == text
    except (ValueError, RecursionError):
        same = False
    whole = header.payload_bytes(table), header.digests_bytes(len(specs))
    if not same or (sizes[0], sizes[2]) != whole:
        raise header.damage(path)
    header.check_base(path, about, specs, base, shapes)
    payload = bytearray(sizes[0])
    file.seek(len(head))
    if file.readinto(payload) != len(payload):
        raise TruncatedPack(f"{path} became shorter while it was read; {AGAIN}")
    parts: dict[str | None, dict[str, Tensor]] = {name: {} for name in (*specs, None)}
    for row in table:
        parts[row.tensor][row.part] = _view(payload, row)
    tensors = {name: Encoded(*specs[name], parts[name]) for name in specs}
    for i, (name, encoded) in enumerate(tensors.items()):
        if header.checksum(encoded) != checksums[i * CHECKSUM_BYTES :][:CHECKSUM_BYTES]:
            raise CorruptPack(f"{path}, tensor {name!r} does not match its checksum; {AGAIN}")
        verify(path, name, encoded)
    files = {
        name: PackedFile(spec.size, bytes(raw(parts[None][name])))
        for name, spec in about[FILES].items()
    }
    for name, packed in files.items():
        check_file(path, name, packed, about[FILES][name].checksum)
    return SkillPack(tensors, **{**{name: about[name] for name in FIELDS}, FILES: files})


def _read_head(path: Path, file: BufferedReader, size: int) -> bytes:
    """Everything before the payload, length included; of a file of another format its beginning."""
    start = file.read(8 + len(MAGIC))
    if not (start[8:] + MAGIC[len(start[8:]) :]).startswith(MAGIC):
        raise NotASkillPack(f"{path} is not a SkillPack; give the path of a file that one saved.")
    length = int.from_bytes(start[:8], "little")
    more = file.read(min(max(0, length - len(MAGIC)), MAX_HEAD))
    if more[:1] == b"{":  # where formats before this one had all that they said
        return start + more
    if len(start) == 8 + len(MAGIC) and not len(MAGIC) < length <= MAX_HEAD:
        raise CorruptPack(f"{path} claims a header of {length} bytes; {AGAIN}")
    if len(start) < 8 + len(MAGIC) or size < 8 + length:
        raise TruncatedPack(f"{path} ends within its header; {AGAIN}")
    return start + more


def _view(payload: bytearray, row: TableEntry) -> Tensor:
    """The part of a row, without a copy."""
    if row.start == row.end:
        return torch.empty(row.shape, dtype=row.dtype)
    count = (row.end - row.start) // row.dtype.itemsize
    flat = torch.frombuffer(payload, dtype=row.dtype, count=count, offset=row.start)
    return flat.reshape(row.shape)
