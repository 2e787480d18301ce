"""What a SkillPack says of itself, what it may say, and where the bytes of each part lie.

A file is a safetensors file of three entries: the payload, with all parts; the text, compact JSON under zlib; and the
digests: the checksums of the tensors in their order and of the text, the base's fingerprint, and a digest. The
text has the format version, task, method, options, versions, the tensors that the base lacks (`added`) or has in
another number of rows (`grown`), the files beside them (files.py) as {name: [size, stored bytes, checksum]}, and the
tensors as {name: [codec, shape, meta]}. Where parts lie follows from these, and an entry for each of them would take a
fifth of a pack of half a megabyte. A file's size is known before its bytes and its base are.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cl_graft.skillpack import codecs
from cl_graft.skillpack.codecs import STORABLE, Encoded, Spec
from cl_graft.skillpack.codecs.encoded import raw
from cl_graft.skillpack.format.errors import (
    CorruptPack,
    ShapeMismatch,
    SkillPackError,
    UnknownCodec,
    UnsupportedVersion,
    WrongBase,
)
from cl_graft.skillpack.format.files import CHECKSUM_BYTES, FILES, FileSpec

FORMAT = 3
MAGIC = b'{"__metadata__":{"skillpack":"'
MAX_HEAD = 512  # bytes
MAX_TEXT = 32 << 20  # bytes; a tensor takes some 120
MAX_VALUES = 4 << 20  # in the JSON; a tensor takes some 10, and parsing them is what costs
DIGEST_BYTES = 16
BESIDE_CHECKSUMS = CHECKSUM_BYTES + 2 * DIGEST_BYTES  # of what stands behind the tensors' checksums
ONE_EXPERT = re.compile(r"\.experts\.\d+\.")
TEXT = {
    "task": str,
    "method": str,
    "options": dict,
    "versions": dict,
    "added": list,
    "grown": dict,
    FILES: dict,
}
FIELDS = ("base", *TEXT)
AGAIN = "fetch or make the pack again."

# What the base does not bound: elements of one added or grown tensor against the base's largest, of
# all of them against the whole base, and what is harmless beside any base.
MOST_OF_LARGEST, MOST_OF_BASE, HARMLESS = 16, 4, 1 << 22


class TableEntry(NamedTuple):
    """One part in the file: bytes start to end of the payload. tensor: None for a file, which `part` names."""

    tensor: str | None
    part: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


def table_of(
    specs: Mapping[str, Spec], files: Mapping[str, FileSpec] | None = None
) -> list[TableEntry]:
    """Every part in its place: widest dtype first, as safetensors orders them, then by key."""
    order = list(STORABLE.values())
    parts: list[tuple[int, str, str | None, str, torch.dtype, tuple[int, ...]]] = [
        (order.index(dtype), f"{name}:{part}", name, part, dtype, shape)
        for name, spec in specs.items()
        for part, (dtype, shape) in codecs.layout(*spec).items()
    ]
    parts += [
        (order.index(torch.uint8), f"{FILES}:{name}", None, name, torch.uint8, (file.stored,))
        for name, file in (files or {}).items()
    ]
    rows, end = [], 0
    for *_, tensor, part, dtype, shape in sorted(parts, key=lambda row: row[:2]):
        start, end = end, end + codecs.part_bytes(dtype, shape)
        rows.append(TableEntry(tensor, part, dtype, shape, start, end))
    return rows


def payload_bytes(table: list[TableEntry]) -> int:
    """Bytes after the header."""
    return table[-1].end if table else 0


def checksum(encoded: Encoded) -> bytes:
    """BLAKE2b, 8 bytes, of the parts' bytes, in the order of the layout."""
    digest = hashlib.blake2b(digest_size=CHECKSUM_BYTES)
    for part in codecs.layout(*encoded.spec):
        digest.update(raw(encoded.parts[part]))
    return digest.digest()


# writing


def describe(fields: Mapping[str, Any], specs: Mapping[str, Spec]) -> dict[str, Any]:
    """The JSON of the text, tensors in the order of their names. fields: one of each of `TEXT`, or more."""
    lacking = {
        "added": sorted(fields["added"]),
        "grown": {name: list(shape) for name, shape in sorted(fields["grown"].items())},
        FILES: {name: list(spec) for name, spec in sorted(fields[FILES].items())},
    }
    tensors = {name: [spec[0], list(spec[1]), spec[2]] for name, spec in specs.items()}
    fields = {name: fields[name] for name in TEXT}
    return {"version": FORMAT, **fields, **lacking, "tensors": dict(sorted(tensors.items()))}


def text_of(about: Mapping[str, Any]) -> str:
    """The JSON as it is written. Raises TypeError, ValueError or RecursionError where it is none."""
    return _compact(about)


def digests(text: str, stored: bytes, checksums: bytes, base: str) -> bytes:
    """The checksums of the text's tensors, in their order, that of the text as it is stored, the base, and BLAKE2b, 16
    bytes, of the text, the tensors' checksums and the base.

    So a byte that zlib passes over is not changed unseen, and the digest is the same whoever's zlib it was. Raises
    ValueError where the base is not given by 32 hexadecimal digits.
    """
    if not re.fullmatch(f"[0-9a-f]{{{2 * DIGEST_BYTES}}}", base):
        raise ValueError(f"{base!r} is not 32 hexadecimal digits.")
    fingerprint, said = bytes.fromhex(base), hashlib.blake2b(stored, digest_size=CHECKSUM_BYTES)
    digest = hashlib.blake2b(text.encode() + checksums + fingerprint, digest_size=DIGEST_BYTES)
    return checksums + said.digest() + fingerprint + digest.digest()


def packed(text: str) -> bytes:
    """The text as it is stored."""
    return zlib.compress(text.encode(), 9)


def digests_bytes(tensors: int) -> int:
    """Bytes of the `digests` of so many tensors."""
    return tensors * CHECKSUM_BYTES + BESIDE_CHECKSUMS


def head(payload: int, text: int, digests: int) -> bytes:
    """All bytes before the payload, from the bytes of payload, stored text and digests."""
    entries: dict[str, Any] = {"__metadata__": {"skillpack": str(FORMAT)}}
    end = 0
    for name, size in (("payload", payload), ("text", text), ("digests", digests)):
        start, end = end, end + size
        entries[name] = {"dtype": "U8", "shape": [size], "data_offsets": [start, end]}
    data = _compact(entries).encode()
    data += b" " * (-len(data) % 8)
    return len(data).to_bytes(8, "little") + data


def writable(about: Mapping[str, Any]) -> str:
    """`text_of`; raises SkillPackError where a file would not bring back what is written."""
    try:
        text = text_of(about)
        if _compact(json.loads(text)) == text and text.encode() and _well_typed(about):
            return text
    except (TypeError, ValueError, RecursionError):
        pass
    raise SkillPackError(
        f"task {about['task']!r} has a name, options or versions that JSON does not keep; "
        "use strings, finite numbers, lists and dictionaries with distinct string keys."
    )


def fits(text: bytes) -> bool:
    """Whether a reader takes a text of so many bytes and, before it parses them, values."""
    values = sum(map(text.count, (b"[", b"{", b",")))
    return len(text) <= MAX_TEXT and values <= MAX_VALUES


def _compact(value: object) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def _well_typed(about: Mapping[str, Any]) -> bool:
    types = {"version": int, **TEXT, "tensors": dict}
    return (
        list(about) == list(types)
        and all(isinstance(about[name], kind) for name, kind in types.items())
        and all(isinstance(version, str) for version in about["versions"].values())
    )


# reading


def damage(path: Path) -> CorruptPack:
    """The error for a file that contradicts itself."""
    return CorruptPack(f"the header of {path} is damaged; {AGAIN}")


def sizes_of(path: Path, start: bytes) -> tuple[int, int, int]:
    """The bytes of payload, text and digests, by all that stands before them.

    Raises CorruptPack, or UnsupportedVersion for a format other than this one.
    """
    said = start[8 + len(MAGIC) :]
    version = re.match(rb"(\d{1,9})\"", said)
    if said[:1] == b"{" or (version and int(version[1]) != FORMAT):
        other = version[1].decode() if version else "1 or 2"
        raise UnsupportedVersion(
            f"{path} has format {other}, not {FORMAT}; use the release that wrote it."
        )
    sizes = [int(size) for size in re.findall(rb'"shape":\[(\d{1,15})\]', said)]
    if len(sizes) != 3 or head(*sizes) != start:
        raise damage(path)
    return sizes[0], sizes[1], sizes[2]


def unpacked(path: Path, stored: bytes) -> str:
    """The text, of what is stored. Raises CorruptPack where that is no text, or one that is too long."""
    stream = zlib.decompressobj()
    try:
        text = stream.decompress(stored, MAX_TEXT + 1)
        whole = stream.eof and not stream.unused_data and stored[:2] == b"\x78\xda"
        if whole and fits(text):
            return text.decode()
    except (zlib.error, ValueError):
        pass
    raise damage(path)


def parse(path: Path, text: str) -> dict[str, Any]:
    """The JSON of a text, every field of the right type. Raises CorruptPack."""
    try:
        about = json.loads(text)
    except (ValueError, RecursionError):
        raise damage(path) from None
    if not isinstance(about, dict) or about.get("version") != FORMAT or not _well_typed(about):
        raise damage(path)
    return about


def read_tensors(path: Path, tensors: dict[str, Any]) -> dict[str, Spec]:
    """{name: (codec, shape, meta)} of tensors each of which has a layout. Raises CorruptPack, UnknownCodec."""
    specs: dict[str, Spec] = {}
    for name, said in tensors.items():
        if not isinstance(said, list) or [type(item) for item in said] != [str, list, dict]:
            raise CorruptPack(
                f"{path}, tensor {name!r} is not given by codec, shape and meta; {AGAIN}"
            )
        codec, shape, meta = said
        specs[name] = codec, tuple(shape), meta
    check_specs(path, specs)
    return specs


def check_specs(path: Path, specs: Mapping[str, Spec]) -> None:
    """Raise CorruptPack for a tensor without a layout, UnknownCodec where its codec is not known."""
    for name, spec in specs.items():
        try:
            codecs.layout(*spec)
        except UnknownCodec as error:
            raise UnknownCodec(f"{path}, tensor {name!r}: {error}") from error
        except ValueError as error:
            raise CorruptPack(f"{path}, tensor {name!r}: {error}") from error


def check_lacking(path: Path, about: Mapping[str, Any], specs: Mapping[str, Spec]) -> None:
    """Raise CorruptPack unless `added` and `grown` speak of this pack's tensors, in sane shapes."""
    added, grown = about["added"], about["grown"]
    names = [*added, *grown]
    if any(not isinstance(name, str) or name not in specs for name in names):
        raise CorruptPack(f"{path} calls tensors added or grown that it does not hold; {AGAIN}")
    if len(set(names)) != len(names):
        raise CorruptPack(f"{path} calls a tensor added or grown twice; {AGAIN}")
    for name, rows in grown.items():
        shape = specs[name][1]
        try:
            if not isinstance(rows, list):
                raise ValueError("the base's shape is not a list of sizes.")
            codecs.check_shape(tuple(rows))
            if len(rows) != len(shape) or rows[1:] != list(shape[1:]) or rows[:1] == [*shape[:1]]:
                raise ValueError(f"shape {shape} is not {tuple(rows)} but for the first size.")
        except ValueError as error:
            raise CorruptPack(f"{path}, grown tensor {name!r}: {error}") from error


def check_base(
    path: Path,
    about: Mapping[str, Any],
    specs: Mapping[str, Spec],
    base: str | None,
    shapes: Mapping[str, tuple[int, ...]] | None,
) -> None:
    """Raise WrongBase or ShapeMismatch unless the pack goes with this base, where one is given."""
    if base is not None and about["base"] != base:
        raise WrongBase(
            f"{path} is for base {about['base']!r}, not {base!r}; load the base it was made on."
        )
    if shapes is None:
        return
    added, grown = set(about["added"]), about["grown"]
    for name, (_, shape, _) in specs.items():
        wanted = None if name in added else tuple(grown.get(name, shape))
        in_base = tuple(shapes[name]) if name in shapes else None
        if in_base is None and ".experts." in name and any(map(ONE_EXPERT.search, shapes)):
            raise ShapeMismatch(
                f"{path} keeps {name!r} as one stack and the base's folder has each expert apart; load the base in "
                "transformers, save it by save_pretrained(NEW, save_original_format=False), and give NEW."
            )
        if wanted != in_base:
            there, here = (f"shape {s}" if s is not None else "none" for s in (in_base, wanted))
            what = f"{path}, tensor {name!r}: the base must have {here}, but has {there}"
            raise ShapeMismatch(f"{what}; load the base it was made on.")
    sizes = {name: math.prod(max(1, n) for n in specs[name][1]) for name in (*added, *grown)}
    _check_room(path, sizes, shapes)


def _check_room(
    path: Path, sizes: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Refuse added and grown tensors (of these elements) that are out of proportion to the base.

    An empty one counts by its other sizes.
    """
    there = [math.prod(shape) for shape in shapes.values()]
    one = max(HARMLESS, MOST_OF_LARGEST * max(there, default=0))
    total = max(HARMLESS, MOST_OF_BASE * sum(there))
    if max(sizes.values(), default=0) > one or sum(sizes.values()) > total:
        raise ShapeMismatch(
            f"{path} adds tensors out of proportion to the base (over {one} elements in one, or "
            f"{total} in all); load the base it was made on."
        )
