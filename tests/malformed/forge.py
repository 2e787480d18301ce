"""Files by someone who computes all that can be computed: sizes, checksums, digest, and the header that follows."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cl_graft.skillpack import codecs
from cl_graft.skillpack.format import header
from cl_graft.skillpack.format.file import SkillPackError
from cl_graft.skillpack.format.files import check_names
from tests.malformed.packs import Donor

NOWHERE = Path("x")
Parts = Mapping[tuple[str | None, str], bytes]


def assemble(inner: str, rest: str, payload: bytes) -> bytes:
    """A file whose metadata are any text, with what follows them in the header."""
    quoted = json.dumps(inner, ensure_ascii=False)
    text = ('{"__metadata__":{"skillpack":' + quoted + rest).encode("utf-8", "surrogatepass")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + payload


def compact(value: object) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def sealed(about: dict[str, Any]) -> str:
    """The JSON with a digest that is right."""
    rest = {name: value for name, value in about.items() if name != "digest"}
    data = compact(rest).encode("utf-8", "surrogatepass")
    return compact(rest | {"digest": hashlib.blake2b(data, digest_size=16).hexdigest()})


def forge(
    donor: Donor, about: dict[str, Any], rng: random.Random, parts: Parts | None = None
) -> bytes:
    """A file that says `about`. parts: their bytes, by default the donor's; made to fit where they are of another size."""
    about, payload, rest = copy.deepcopy(about), donor.payload, donor.texts[1]
    own = donor.parts if parts is None else parts
    with contextlib.suppress(SkillPackError, ValueError, TypeError, KeyError, AttributeError):
        specs, _ = header.read_tensors(NOWHERE, about["tensors"])
        sizes = check_names(NOWHERE, about["files"])
        table = header.table_of(specs, sizes)
        if header.payload_bytes(table) < 1 << 16:
            payload = b"".join(_fitted(own.get((r.tensor, r.part), b""), r, rng) for r in table)
        for name in specs:
            mine = {row.part: payload[row.start : row.end] for row in table if row.tensor == name}
            data = b"".join(mine[part] for part in codecs.layout(*specs[name]))
            about["tensors"][name][3] = hashlib.blake2b(data, digest_size=8).hexdigest()
        for row in table:
            if row.tensor is None:
                stored = payload[row.start : row.end]
                checksum = hashlib.blake2b(stored, digest_size=8).hexdigest()
                about["files"][row.part] = [*sizes[row.part][:2], checksum]
        if rng.random() < 0.9:
            about = header.describe(about, specs, {n: t[3] for n, t in about["tensors"].items()})
        blob = header.encode(header.text_of(about), "0" * 32, table)
        rest = blob.decode("utf-8", "replace")[8:]
        rest = rest[json.JSONDecoder().raw_decode(rest, len(header.MAGIC) - 2)[1] :]
    return assemble(sealed(about), rest, payload)


def _fitted(own: bytes, row: header.TableEntry, rng: random.Random) -> bytes:
    """These bytes where they fit; else cut off, repeated, or followed by zeros or by anything."""
    size = row.end - row.start
    if len(own) >= size:
        return own[:size]
    pick = rng.random()
    if pick < 0.5:
        return own + bytes(size - len(own))
    if pick < 0.8 or not own:
        return own + rng.randbytes(size - len(own))
    return (own * (size // len(own) + 1))[:size]
