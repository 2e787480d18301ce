"""SkillPack: one safetensors file with the encoded delta of one task.

Parts are named `<tensor>:<part>`. The metadata have one key, `skillpack`, with compact JSON: format
version, digest, fingerprint of the base, task, method, options, versions, and the tensors as
{name: [codec, shape, meta]}. Everything else in the header follows from these, so it is written
here rather than by a library: one pack has exactly one file, whose size is known before its bytes
are, and a reader compares a header with what it must be instead of interpreting it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.metadata
import json
import os
import secrets
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cl_graft.errors import CLGraftError
from cl_graft.skillpack import codecs
from cl_graft.skillpack.codecs import CODECS, DTYPES, Encoded, Spec

FORMAT = 1
MAGIC = b'{"__metadata__":{"skillpack":"{'
MAX_HEADER = 16 << 20  # bytes; a pack of a thousand tensors takes about half a megabyte
DIGEST_BYTES = 16
Buffer = bytes | bytearray | memoryview
NO_DIGEST = "0" * 2 * DIGEST_BYTES
NAMES = {dtype: name for name, dtype in DTYPES.items()} | {torch.uint8: "U8"}
FIELDS = {"base": str, "task": str, "method": str, "options": dict, "versions": dict}


class SkillPackError(CLGraftError):
    """A pack that cannot be written, read or used."""


class PackNotFound(SkillPackError):
    """There is no such file."""


class NotASkillPack(SkillPackError):
    """A file of another kind."""


class TruncatedPack(SkillPackError):
    """The file ends too early."""


class CorruptPack(SkillPackError):
    """The file is not what `save` wrote."""


class UnsupportedVersion(SkillPackError):
    """A format that this code does not read."""


class UnknownCodec(SkillPackError):
    """A tensor is stored in a way that this code does not know."""


class ShapeMismatch(SkillPackError):
    """A tensor that the base does not have, or not in this shape."""


class WrongBase(SkillPackError):
    """A delta of another base."""


class NonFinite(SkillPackError):
    """NaN or Inf among the values."""


def fingerprint(named: Iterable[tuple[str, Tensor]]) -> str:
    """BLAKE2b (32 hex digits) of names, dtypes, shapes and bytes, in the order of the names.

    Holds at most one copy of a tensor at a time. `named`: as of `model.named_parameters()`.
    """
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for name, tensor in sorted(named, key=lambda item: item[0]):
        digest.update(_compact([name, str(tensor.dtype), list(tensor.shape)]).encode() + b"\n")
        digest.update(_raw(tensor))
    return digest.hexdigest()


def current_versions() -> dict[str, str]:
    """Versions of what writes a pack; what is not installed as a distribution is left out."""
    versions = {}
    for name in ("torch", "safetensors", "cl-graft"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name.replace("-", "_")] = importlib.metadata.version(name)
    return versions


def packed_size(
    specs: Mapping[str, Spec],
    *,
    task: str,
    method: str,
    options: dict[str, Any],
    base: str = NO_DIGEST,
    versions: dict[str, str] | None = None,
) -> int:
    """Exact bytes of a pack's file, from {name: (codec, shape, meta)} and no data.

    Every fingerprint is as long as the default. Raises ValueError for a spec that makes no sense.
    """
    versions = current_versions() if versions is None else versions
    about = {"base": base, "task": task, "method": method, "options": options, "versions": versions}
    table = _table(specs)
    header = _header(_about_of(about, specs) | {"digest": NO_DIGEST}, table)
    return len(header) + _payload_bytes(table)


@dataclass(frozen=True, eq=False)
class SkillPack:
    """The encoded delta of one task; two packs are the same where their digests are.

    tensors: {parameter name: Encoded}; options: of the method, plain JSON; base: the `fingerprint`
    of the model that the delta is added to.
    """

    tensors: dict[str, Encoded]
    task: str
    method: str
    options: dict[str, Any]
    base: str
    versions: dict[str, str] = field(default_factory=current_versions)

    @property
    def nbytes(self) -> int:
        """Exact bytes of the file that `save` writes. Raises ValueError as `packed_size` does."""
        fields: dict[str, Any] = {name: getattr(self, name) for name in FIELDS}
        return packed_size(self._specs, **fields)

    @property
    def digest(self) -> str:
        """BLAKE2b (32 hex digits) of all that the file says, header and tensors."""
        return _digest(self._about, self._chunks)

    def delta(self, name: str) -> Tensor:
        """Tuned minus base of one tensor, float32, on the CPU.

        Raises CorruptPack where its parts do not fit its codec, NonFinite where it overflows.
        """
        try:
            delta = codecs.decode(self.tensors[name])
        except ValueError as error:
            raise CorruptPack(f"tensor {name!r} of task {self.task!r}: {error}") from error
        if not torch.isfinite(delta).all():
            what = f"tensor {name!r} of task {self.task!r}"
            raise NonFinite(f"{what} is not finite once decoded; compress the delta again.")
        return delta

    def decode(self) -> dict[str, Tensor]:
        """{name: `delta(name)`}."""
        return {name: self.delta(name) for name in self.tensors}

    def save(self, path: str | os.PathLike[str]) -> int:
        """Write the file and return its bytes; at any moment the path holds all of a pack or none.

        Raises SkillPackError where a tensor is not fit to be stored or the system refuses the file.
        """
        path = Path(path)
        _verify(path, self.tensors)
        header = _header(self._about | {"digest": self.digest}, _table(self._specs))
        if len(header) > MAX_HEADER:
            raise SkillPackError(
                f"{path} needs {len(header)} bytes of header; store fewer tensors."
            )
        try:
            return _write(path, [header, *self._chunks])
        except OSError as error:
            why = "the disk is full" if error.errno == errno.ENOSPC else error.strerror
            cure = f"find a folder that takes {self.nbytes} bytes and save again."
            raise SkillPackError(f"{path} was not written ({why}); {cure}") from error

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

    @property
    def _specs(self) -> dict[str, Spec]:
        return {name: encoded.spec for name, encoded in self.tensors.items()}

    @property
    def _about(self) -> dict[str, Any]:
        return _about_of({name: getattr(self, name) for name in FIELDS}, self._specs)

    @property
    def _chunks(self) -> list[Buffer]:
        return [_raw(self.tensors[row.name].parts[row.part]) for row in _table(self._specs)]


# what a file says


class Row(NamedTuple):
    """One part in the file: bytes start to end of the payload."""

    name: str
    part: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


def _table(specs: Mapping[str, Spec]) -> list[Row]:
    """Every part in its place: widest dtype first, as safetensors orders them, then by key."""
    order = list(NAMES)
    parts = [
        (order.index(dtype), f"{name}:{part}", name, part, dtype, shape)
        for name, spec in specs.items()
        for part, (dtype, shape) in codecs.layout(*spec).items()
    ]
    rows, end = [], 0
    for *_, name, part, dtype, shape in sorted(parts, key=lambda row: row[:2]):
        start, end = end, end + codecs.part_bytes(dtype, shape)
        rows.append(Row(name, part, dtype, shape, start, end))
    return rows


def _payload_bytes(table: list[Row]) -> int:
    return table[-1].end if table else 0


def _about_of(fields: dict[str, Any], specs: Mapping[str, Spec]) -> dict[str, Any]:
    """The JSON of the header, without its digest; tensors in the order of their names."""
    tensors = {name: [codec, list(shape), meta] for name, (codec, shape, meta) in specs.items()}
    return {"version": FORMAT, **fields, "tensors": dict(sorted(tensors.items()))}


def _header(about: dict[str, Any], table: list[Row]) -> bytes:
    """All bytes before the payload. Raises SkillPackError for what JSON does not bring back."""
    header: dict[str, Any] = {"__metadata__": {"skillpack": _text(about)}}
    for row in table:
        where = {"shape": list(row.shape), "data_offsets": [row.start, row.end]}
        header[f"{row.name}:{row.part}"] = {"dtype": NAMES[row.dtype], **where}
    text = _compact(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _text(about: dict[str, Any]) -> str:
    try:
        text = _compact(about)
        if _compact(json.loads(text)) == text and text.encode():
            return text
    except (TypeError, ValueError, RecursionError):
        pass
    raise SkillPackError(
        f"task {about['task']!r} has a name, options or versions that JSON does not keep; "
        "use strings, finite numbers, lists and dictionaries with distinct string keys."
    )


def _compact(value: object) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def _digest(about: dict[str, Any], chunks: Iterable[Buffer]) -> str:
    rest = {name: value for name, value in about.items() if name != "digest"}
    digest = hashlib.blake2b(_text(rest).encode(), digest_size=DIGEST_BYTES)
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()


def _raw(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in row-major order; no copy of a contiguous tensor on the CPU."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _verify(path: Path, tensors: Mapping[str, Encoded]) -> None:
    for name, encoded in tensors.items():
        try:
            codecs.check(encoded)
        except ValueError as error:
            raise CorruptPack(f"{path}, tensor {name!r}: {error}") from error
        if not codecs.finite(encoded):
            raise NonFinite(f"{path}, tensor {name!r} holds NaN or Inf; train or compress again.")


def _write(path: Path, chunks: list[Buffer]) -> int:
    """Write a sibling, push it to the disk, rename it: a kill leaves the old file or the new."""
    sibling = path.parent / f".{secrets.token_hex(8)}.tmp"
    try:
        with sibling.open("xb") as file:
            size = sum(file.write(chunk) for chunk in chunks)
            file.flush()
            os.fsync(file.fileno())
        os.replace(sibling, path)
    except BaseException:
        with contextlib.suppress(OSError):
            sibling.unlink()
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return size


# what a file may say


def _read(
    path: Path, file: BufferedReader, base: str | None, shapes: Mapping[str, tuple[int, ...]] | None
) -> SkillPack:
    again = "fetch or make the pack again."
    size = os.fstat(file.fileno()).st_size
    header = _read_header(path, file, size)
    about = _parse(path, header)
    specs = _read_specs(path, about["tensors"])
    table = _table(specs)
    try:
        damaged = _header(about, table) != header
    except (ValueError, SkillPackError):
        damaged = True
    if damaged:
        raise CorruptPack(f"the header of {path} is damaged; {again}")
    wanted = len(header) + _payload_bytes(table)
    if size < wanted:
        raise TruncatedPack(f"{path} has {size} of {wanted} bytes; {again}")
    if size > wanted:
        raise CorruptPack(f"{path} has {size - wanted} bytes too many; {again}")
    _check_base(path, about["base"], specs, base, shapes)
    payload = bytearray(wanted - len(header))
    if file.readinto(payload) != len(payload):
        raise TruncatedPack(f"{path} became shorter while it was read; {again}")
    if _digest(about, [payload]) != about["digest"]:
        raise CorruptPack(f"{path} does not match its digest; {again}")
    parts: dict[str, dict[str, Tensor]] = {name: {} for name in specs}
    for row in table:
        parts[row.name][row.part] = _view(payload, row)
    tensors = {name: Encoded(*specs[name], parts[name]) for name in specs}
    _verify(path, tensors)
    return SkillPack(tensors, **{name: about[name] for name in FIELDS})


def _read_header(path: Path, file: BufferedReader, size: int) -> bytes:
    """Everything before the payload, length included, undigested."""
    start = file.read(8 + len(MAGIC))
    if not (start[8:] + MAGIC[len(start[8:]) :]).startswith(MAGIC):
        raise NotASkillPack(f"{path} is not a SkillPack; give the path of a file that one saved.")
    length = int.from_bytes(start[:8], "little")
    if len(start) == 8 + len(MAGIC) and not len(MAGIC) < length <= MAX_HEADER:
        raise CorruptPack(
            f"{path} claims a header of {length} bytes; fetch or make the pack again."
        )
    if len(start) < 8 + len(MAGIC) or size < 8 + length:
        raise TruncatedPack(f"{path} ends within its header; fetch or make the pack again.")
    return start + file.read(length - len(MAGIC))


def _parse(path: Path, header: bytes) -> dict[str, Any]:
    """The JSON of a header, every field of the right type, the version one that can be read."""
    damage = CorruptPack(f"the header of {path} is damaged; fetch or make the pack again.")
    try:
        about = json.loads(json.loads(header[8:])["__metadata__"]["skillpack"])
    except (ValueError, TypeError, KeyError, RecursionError):
        raise damage from None
    if not isinstance(about, dict) or type(about.get("version")) is not int:
        raise damage
    if about["version"] != FORMAT:
        raise UnsupportedVersion(
            f"{path} has format {about['version']}, not {FORMAT}; use the release that wrote it."
        )
    types = {"version": int, **FIELDS, "tensors": dict, "digest": str}
    if list(about) != list(types) or any(type(about[k]) is not types[k] for k in types):
        raise damage
    if any(type(version) is not str for version in about["versions"].values()):
        raise damage
    return about


def _read_specs(path: Path, tensors: dict[str, Any]) -> dict[str, Spec]:
    """{name: (codec, shape, meta)}, each of which has a layout."""
    specs: dict[str, Spec] = {}
    for name, spec in tensors.items():
        if not isinstance(spec, list) or [type(item) for item in spec] != [str, list, dict]:
            raise CorruptPack(f"{path}, tensor {name!r}: no codec, shape and meta; make it again.")
        codec, shape, meta = spec
        if codec not in CODECS:
            known = ", ".join(CODECS)
            what = f"{path}, tensor {name!r} has the unknown codec {codec!r}"
            raise UnknownCodec(f"{what} (known: {known}); use the release that wrote it.")
        try:
            codecs.layout(codec, tuple(shape), meta)
        except ValueError as error:
            raise CorruptPack(f"{path}, tensor {name!r}: {error}") from error
        specs[name] = codec, tuple(shape), meta
    return specs


def _check_base(
    path: Path,
    found: str,
    specs: Mapping[str, Spec],
    base: str | None,
    shapes: Mapping[str, tuple[int, ...]] | None,
) -> None:
    if base is not None and found != base:
        raise WrongBase(
            f"{path} is for base {found!r}, not {base!r}; load the base it was made on."
        )
    for name, (_, shape, _) in specs.items():
        if shapes is not None and (name not in shapes or tuple(shapes[name]) != shape):
            there = f"shape {tuple(shapes[name])}" if name in shapes else "no such tensor"
            what = f"{path}, tensor {name!r} has shape {shape}, but the base has {there}"
            raise ShapeMismatch(f"{what}; load the base it was made on.")


def _view(payload: bytearray, row: Row) -> Tensor:
    """The part of a row, without a copy."""
    if row.start == row.end:
        return torch.empty(row.shape, dtype=row.dtype)
    count = (row.end - row.start) // row.dtype.itemsize
    flat = torch.frombuffer(payload, dtype=row.dtype, count=count, offset=row.start)
    return flat.reshape(row.shape)
