"""Writing a pack: its size before there are data, then the file, one tensor at a time."""

from __future__ import annotations

import contextlib
import errno
import importlib.metadata
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from cl_graft.atomic import Write, replacing
from cl_graft.skillpack import codecs
from cl_graft.skillpack.codecs import Encoded, Spec
from cl_graft.skillpack.codecs.encoded import raw
from cl_graft.skillpack.format import header
from cl_graft.skillpack.format.errors import CorruptPack, NonFinite, SkillPackError
from cl_graft.skillpack.format.files import FILES, Files, check_file, check_names
from cl_graft.skillpack.format.header import FIELDS, TableEntry

Shapes = Mapping[str, Sequence[int]]


def current_versions() -> dict[str, str]:
    """Versions of what writes a pack; what is not installed as a distribution is left out."""
    return dict(_versions())


@cache
def _versions() -> dict[str, str]:
    # once a process: each is parsed from a file that may be long
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
    base: str = "",
    versions: dict[str, str] | None = None,
    added: Iterable[str] = (),
    grown: Shapes | None = None,
    files: Files | None = None,
) -> int:
    """Exact bytes of a pack's file, from {name: (codec, shape, meta)} and no data, whatever its base.

    Raises ValueError for a spec that makes no sense,
    SkillPackError for what JSON does not keep.
    """
    fields = _fields(base, task, method, options, versions, added, grown, files)
    payload = sum(codecs.payload_bytes(*spec) for spec in specs.values())
    payload += sum(file.stored for file in fields[FILES].values())
    text = header.writable(header.describe(fields, specs))
    sizes = payload, len(header.packed(text)), header.digests_bytes(len(specs))
    return len(header.head(*sizes)) + sum(sizes)


def write_pack(
    path: str | os.PathLike[str],
    specs: Mapping[str, Spec],
    fetch: Callable[[str], Encoded],
    *,
    task: str,
    method: str,
    options: dict[str, Any],
    base: str,
    versions: dict[str, str] | None = None,
    added: Iterable[str] = (),
    grown: Shapes | None = None,
    files: Files | None = None,
) -> int:
    """Write a pack one tensor at a time and return its bytes, those that `SkillPack.save` writes.

    `fetch` gives the tensor of each spec, once and in the order of specs; it is written and let go
    before the next is asked for. At any moment the path holds all of a pack or what was there: the
    bytes go to a sibling that is pushed to the disk and renamed. files: what else the pack holds, by
    names that it may. Raises SkillPackError where a tensor or a file is not fit to be stored or the
    system refuses the pack; what `fetch` raises passes.
    """
    path = Path(path)
    fields = _fields(base, task, method, options, versions, added, grown, files)
    header.check_specs(path, specs)
    check_names(path, fields[FILES])
    for name, file in (files or {}).items():
        check_file(path, name, file, file.spec.checksum)
    blank = header.describe(fields, specs)
    text = header.writable(blank)
    header.check_lacking(path, blank, specs)
    try:
        header.digests(text, b"", b"", base)
    except ValueError:
        raise SkillPackError(
            f"{path} needs the fingerprint of its base, and {base!r} is none; give that of `fingerprint`."
        ) from None
    if not header.fits(text.encode()):
        raise SkillPackError(f"{path} needs {len(text)} bytes of header; store fewer tensors.")
    table, packed = header.table_of(specs, fields[FILES]), header.packed(text)
    payload, tail = header.payload_bytes(table), header.digests_bytes(len(specs))
    head = header.head(payload, len(packed), tail)
    start = len(head)
    size = start + payload + len(packed) + tail
    rows: dict[str | None, list[TableEntry]] = {name: [] for name in (*specs, None)}
    for row in table:
        rows[row.tensor].append(row)
    with replacing(path, partial(_refusal, path, size)) as write:
        checksums = {
            name: _store(path, name, specs[name], fetch, rows[name], start, write) for name in specs
        }
        for row in rows[None]:
            write(raw((files or {})[row.part].part), start + row.start)
        sums = b"".join(checksums[name] for name in sorted(specs))
        write(packed + header.digests(text, packed, sums, base), start + payload)
        write(head, 0)
    return size


def _fields(
    base: str,
    task: str,
    method: str,
    options: dict[str, Any],
    versions: dict[str, str] | None,
    added: Iterable[str],
    grown: Shapes | None,
    files: Files | None,
) -> dict[str, Any]:
    versions = current_versions() if versions is None else versions
    sizes = {name: file.spec for name, file in (files or {}).items()}
    values = (base, task, method, options, versions, list(added), grown or {}, sizes)
    return dict(zip(FIELDS, values, strict=True))


def _store(
    path: Path,
    name: str,
    spec: Spec,
    fetch: Callable[[str], Encoded],
    rows: list[TableEntry],
    start: int,
    write: Write,
) -> bytes:
    """Fetch, verify and write one tensor; its checksum."""
    encoded = fetch(name)
    if encoded.spec != (spec[0], tuple(spec[1]), spec[2]):
        raise CorruptPack(f"{path}, tensor {name!r} is {encoded.spec}, not {spec} as was foretold.")
    verify(path, name, encoded)
    for row in rows:
        write(raw(encoded.parts[row.part]), start + row.start)
    return header.checksum(encoded)


def verify(path: Path, name: str, encoded: Encoded) -> None:
    """Raise CorruptPack or NonFinite for a tensor that is not fit to be stored."""
    try:
        codecs.check(encoded)
    except ValueError as error:
        raise CorruptPack(f"{path}, tensor {name!r}: {error}") from error
    if not codecs.finite(encoded):
        raise NonFinite(f"{path}, tensor {name!r} holds NaN or Inf; train or compress again.")


def _refusal(path: Path, size: int, error: OSError) -> SkillPackError:
    """What the system refuses, in a sentence."""
    why = "the disk is full" if error.errno == errno.ENOSPC else error.strerror
    cure = f"find a folder that takes {size} bytes and save again."
    return SkillPackError(f"{path} was not written ({why}); {cure}")
