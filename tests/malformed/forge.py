"""Files by someone who computes all that can be computed: sizes, checksums, digest, and the header that follows."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import random
import zlib
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


def assemble(text: str, payload: bytes, digests: bytes, head: bytes | None = None) -> bytes:
    """A file of any text, payload and digests, under the head that goes with them, or another."""
    stored = zlib.compress(text.encode("utf-8", "surrogatepass"), 9)
    if head is None:
        head = header.head(len(payload), len(stored), len(digests))
    return head + payload + stored + digests


def compact(value: object) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def sealed(text: str, checksums: bytes, base: str) -> bytes:
    """Digests that are right."""
    data, own = text.encode("utf-8", "surrogatepass"), bytes.fromhex(base)
    said = hashlib.blake2b(zlib.compress(data, 9), digest_size=8).digest()
    digest = hashlib.blake2b(data + checksums + own, digest_size=16).digest()
    return checksums + said + own + digest


def forge(
    donor: Donor, about: dict[str, Any], rng: random.Random, parts: Parts | None = None
) -> bytes:
    """A file that says `about`. parts: their bytes, by default the donor's; made to fit where they are of another size."""
    about, payload, sums = copy.deepcopy(about), donor.payload, donor.digests[:-40]
    own = donor.parts if parts is None else parts
    with contextlib.suppress(SkillPackError, ValueError, TypeError, KeyError, AttributeError):
        specs = header.read_tensors(NOWHERE, about["tensors"])
        sizes = check_names(NOWHERE, about["files"])
        table = header.table_of(specs, sizes)
        if header.payload_bytes(table) < 1 << 16:
            payload = b"".join(_fitted(own.get((r.tensor, r.part), b""), r, rng) for r in table)
        found = {}
        for name in specs:
            mine = {row.part: payload[row.start : row.end] for row in table if row.tensor == name}
            data = b"".join(mine[part] for part in codecs.layout(*specs[name]))
            found[name] = hashlib.blake2b(data, digest_size=8).digest()
        for row in table:
            if row.tensor is None:
                stored = payload[row.start : row.end]
                checksum = hashlib.blake2b(stored, digest_size=8).hexdigest()
                about["files"][row.part] = [*sizes[row.part][:2], checksum]
        if rng.random() < 0.9:
            about = header.describe(about, specs)
        sums = b"".join(found[name] for name in about["tensors"])
    text = compact(about)
    return assemble(text, payload, sealed(text, sums, donor.pack.base))


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
