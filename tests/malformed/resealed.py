"""What is done to a pack by someone who makes its checksums and digest right again: only what the reader knows of
codecs and shapes can tell that something is wrong, and perhaps nothing is."""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from typing import Any

from tests.malformed.damage import Mutator
from tests.malformed.forge import forge
from tests.malformed.packs import Donor
from tests.malformed.values import (
    BOMB,
    CONTENTS,
    FILE_NAMES,
    NUMBERS,
    SIZES,
    anything,
    edited,
    inside,
    places,
    strange_shape,
    strange_spec,
)

LETTERS = [0, 1, 2, 3, 4, 8, 15, 16, 17, 41, 81, 120, 121, 0x7F, 0x80, 0xFF]


def _changed(data: bytes, rng: random.Random) -> bytes:
    """Some bytes changed, or cut, repeated or moved within their number."""
    pick, size = rng.random(), len(data)
    if not size:
        return data
    if pick < 0.6:
        bad = bytearray(data)
        for _ in range(rng.choice([1, 1, 2, 4])):
            bad[rng.randrange(size)] = rng.choice([*LETTERS, rng.getrandbits(8)])
        return bytes(bad)
    i, j = sorted(rng.choices(range(size + 1), k=2))
    if pick < 0.75:  # what follows moves up
        return data[:i] + data[j:] + bytes(j - i)
    if pick < 0.9:  # what follows moves down
        return (data[:j] + data[i:])[:size]
    return data[j:] + data[i:j] + data[:i]


def _chosen(donor: Donor, rng: random.Random) -> str | None:
    return rng.choice(list(donor.pack.tensors)) if donor.pack.tensors else None


def bytes_of_parts(donor: Donor, others: Sequence[Donor], rng: random.Random) -> bytes:
    """Bytes of one or more parts, whatever they stand for."""
    parts = dict(donor.parts)
    names = [key for key, data in parts.items() if data]
    for key in rng.sample(names, min(len(names), rng.choice([1, 1, 1, 2]))):
        parts[key] = _changed(parts[key], rng)
    return forge(donor, donor.about, rng, parts)


def kinds_of_rows(donor: Donor, others: Sequence[Donor], rng: random.Random) -> bytes:
    """The bytes that say how what follows is read: classes, widths, positions, tables, exponents."""
    parts = dict(donor.parts)
    heads = [
        k for k, data in parts.items() if data and k[0] is not None and k[1] not in ("values",)
    ]
    for key in rng.sample(heads, min(len(heads), 1)):
        bad = bytearray(parts[key])
        first = len(bad) if key[1] in ("kinds", "index") else min(len(bad), 12)
        bad[rng.randrange(first)] = rng.choice(LETTERS)
        parts[key] = bytes(bad)
    return forge(donor, donor.about, rng, parts)


def streams_resized(donor: Donor, others: Sequence[Donor], rng: random.Random) -> bytes:
    """A coded stream cut, lengthened, repeated, and the header's number of its bytes made right."""
    about, parts = donor.about, dict(donor.parts)
    coded = [name for name, said in about["tensors"].items() if "bytes" in said[2]]
    if not coded:
        return bytes_of_parts(donor, others, rng)
    name = rng.choice(coded)
    meta = about["tensors"][name][2]
    part = "code" if isinstance(meta["bytes"], list) else "codes"
    data = parts.get((name, part), b"")
    sizes = meta["bytes"] if part == "code" else [meta["bytes"]]
    # what stands before the sections is an index
    edges = [len(data) - sum(sizes)]
    for size in sizes:
        edges.append(edges[-1] + size)
    which = rng.randrange(len(sizes))
    own = data[edges[which] : edges[which + 1]]
    size = 4 * rng.randint(1, 3) if rng.random() < 0.7 else rng.randint(1, 9)
    place = 4 * rng.randint(0, len(own) // 4)
    own = rng.choice(
        [
            own[: max(0, len(own) - size)],
            own[size:],
            own + bytes(size),
            own + rng.randbytes(size),
            bytes(size) + own,
            own[:place] + own[place : place + size] + own[place:],
            own + own,
            b"",
        ]
    )
    sizes[which] = len(own)
    meta["bytes"] = sizes if part == "code" else sizes[0]
    parts[name, part] = data[: edges[which]] + own + data[edges[which + 1] :]
    return forge(donor, about, rng, parts)


def parts_of_others(donor: Donor, others: Sequence[Donor], rng: random.Random) -> bytes:
    """Parts, or all but the shape, of a tensor of another pack, or of this one."""
    about, parts, name = donor.about, dict(donor.parts), _chosen(donor, rng)
    if name is None:
        return forge(donor, about, rng)
    codec = about["tensors"][name][0]
    like = [(d, n) for d in others for n, e in d.pack.tensors.items() if e.codec == codec]
    anyone = [(d, n) for d in (donor, donor, rng.choice(others)) for n in d.pack.tensors]
    other, its = rng.choice(like if rng.random() < 0.7 and like else anyone)
    theirs = other.about["tensors"][its]
    own = {part: data for (tensor, part), data in other.parts.items() if tensor == its}
    if rng.random() < 0.5:
        shape = about["tensors"][name][1] if rng.random() < 0.7 else theirs[1]
        about["tensors"][name] = [theirs[0], shape, theirs[2]]
    elif own:
        part = rng.choice(list(own))
        own = {part: own[part]}
    parts |= {(name, part): data for part, data in own.items()}
    return forge(donor, about, rng, parts)


def numbers_changed(donor: Donor, others: Sequence[Donor], rng: random.Random) -> bytes:
    """Ranks, shapes, tops, bytes, counts: one or two of the numbers of the header."""
    about = donor.about
    spots = []
    for field in ("tensors", "tensors", "grown", "files"):
        spots += [
            (field, *path)
            for path in places(about[field])
            if type(inside(about[field], path)) is int
        ]
    for path in rng.sample(spots, min(len(spots), rng.choice([1, 1, 1, 2]))):
        inner = inside(about, path[:-1])
        value = inner[path[-1]]
        near = [value - 1, value + 1, value + 4, value - 4, 2 * value, value // 2, 0]
        inner[path[-1]] = rng.choice(near if rng.random() < 0.8 else NUMBERS)
    return forge(donor, about, rng)


def layouts_exchanged(donor: Donor, others: Sequence[Donor], rng: random.Random) -> bytes:
    """The bytes of one layout called those of the other, another top, another codec of the same parts."""
    about = donor.about
    laid = [said for said in about["tensors"].values() if "layout" in said[2]]
    said = rng.choice(laid or list(about["tensors"].values()) or [None])
    if said is None:
        return forge(donor, about, rng)
    meta, pick = said[2], rng.random()
    if "layout" not in meta or pick < 0.2:
        said[0] = rng.choice(
            [other[0] for d in others[:40] for other in d.about["tensors"].values()]
        )
    elif pick < 0.6:
        meta["layout"] = {"small": "fast", "fast": "small"}[meta["layout"]]
        meta.pop("top", None)
        if meta["layout"] == "small":
            meta["top"] = rng.choice([0, 1, 3, 40, 127, 8191])
    else:
        meta["top"] = rng.choice([0, 1, 2, meta.get("top", 0) + 1, meta.get("top", 0) - 1, 8191])
    return forge(donor, about, rng)


def fields_edited(donor: Donor, others: Sequence[Donor], rng: random.Random) -> bytes:
    """Anything anywhere in the header."""
    return forge(donor, edited(donor.about, rng), rng)


def strange_tensors(donor: Donor, others: Sequence[Donor], rng: random.Random) -> bytes:
    """Tensors of any codec, shape and meta, as small in bytes as they are large."""
    about = donor.about
    names = list(donor.shapes)[: rng.randint(1, 3)] or ["w"]
    for name in names:
        shape = rng.choice([list(donor.shapes.get(name, ())), strange_shape(rng)])
        about["tensors"][name] = strange_spec(shape, rng)
    return forge(donor, about, rng)


def outgrown(donor: Donor, others: Sequence[Donor], rng: random.Random) -> bytes:
    """What is added or grown, where the shapes of the base bound nothing."""
    about: dict[str, Any] = donor.about
    for name in rng.choice([["w"], ["v", "w"], []]):
        about["tensors"][name] = strange_spec(strange_shape(rng), rng)
        about["added"] = sorted([*about["added"], name])
    matrices = [name for name, shape in donor.shapes.items() if len(shape) == 2]
    for name in rng.choices(matrices, k=rng.randint(0, 2)) if matrices else []:
        base = list(donor.shapes[name])
        shape = [rng.choice([*SIZES, base[0] + 1]), base[1]]
        about["tensors"][name] = strange_spec(shape, rng)
        about["grown"][name] = rng.choice([base, base, base, anything(rng)])
    return forge(donor, about, rng)


def files_of_all_kinds(donor: Donor, others: Sequence[Donor], rng: random.Random) -> bytes:
    """Files of any name and content, compressed or said to be."""
    parts, about = dict(donor.parts), donor.about
    for _ in range(rng.randint(1, 3)):
        name, content = rng.choice(FILE_NAMES), rng.choice(CONTENTS)
        stored = zlib.compress(content, rng.choice([1, 9]))
        if rng.random() < 0.3:
            stored = rng.choice([content[:99], stored[:-1], stored + b"x", BOMB])
        size = len(content) if rng.random() < 0.8 else rng.choice([len(stored) + 1, *NUMBERS])
        about["files"][name] = [size, len(stored), ""]
        parts[None, name] = stored
    return forge(donor, about, rng, parts)


RESEALED: dict[str, Mutator] = {
    "bytes of parts changed": bytes_of_parts,
    "classes, widths, tables changed": kinds_of_rows,
    "streams cut, repeated, longer": streams_resized,
    "parts of other tensors": parts_of_others,
    "numbers of the header changed": numbers_changed,
    "layouts exchanged": layouts_exchanged,
    "fields of the header edited": fields_edited,
    "strange tensors": strange_tensors,
    "added and grown out of bounds": outgrown,
    "files of any kind": files_of_all_kinds,
}
