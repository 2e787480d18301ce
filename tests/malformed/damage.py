"""What is done to a pack by someone who cannot compute checksums, or does not: no such file is read."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from cl_graft.skillpack.format import header
from tests.malformed.forge import assemble, compact
from tests.malformed.packs import Donor
from tests.malformed.values import NUMBERS, edited

Mutator = Callable[[Donor, Sequence[Donor], random.Random], bytes]


def flipped(donor: Donor, others: Sequence[Donor], rng: random.Random) -> bytes:
    bad = bytearray(donor.blob)
    for _ in range(rng.choice([1, 1, 1, 2, 8])):
        bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
    return bytes(bad)


def overwritten(donor: Donor, others: Sequence[Donor], rng: random.Random) -> bytes:
    i, j = sorted(rng.choices(range(len(donor.blob) + 1), k=2))
    i = max(i, j - 40)
    return (
        donor.blob[:i] + rng.randbytes(rng.choice([0, j - i, rng.randint(1, 9)])) + donor.blob[j:]
    )


def repeated(donor: Donor, others: Sequence[Donor], rng: random.Random) -> bytes:
    """A range of the file comes twice, or takes the place of what follows it."""
    i, j = sorted(rng.choices(range(len(donor.blob) + 1), k=2))
    i = max(i, j - rng.choice([1, 4, 40, 4000]))
    after = donor.blob[j:] if rng.random() < 0.5 else donor.blob[2 * j - i :]
    return donor.blob[:j] + donor.blob[i:j] + after


def truncated(donor: Donor, others: Sequence[Donor], rng: random.Random) -> bytes:
    """In the length, the magic, the rest of the head, the payload, the text, the digests."""
    edges = [0, 8, 8 + len(header.MAGIC), donor.start, *donor.edges]
    region = rng.randrange(6)
    return donor.blob[: rng.randint(edges[region], max(edges[region], edges[region + 1]))]


def lengthened(donor: Donor, others: Sequence[Donor], rng: random.Random) -> bytes:
    more = [bytes(rng.randint(1, 64)), rng.randbytes(8), donor.blob, donor.payload]
    return donor.blob + rng.choice(more) if rng.random() < 0.8 else b"\0" + donor.blob


def mislength(donor: Donor, others: Sequence[Donor], rng: random.Random) -> bytes:
    """The first eight bytes say another length."""
    length = rng.choice([rng.getrandbits(64), rng.getrandbits(20), *(n % 2**64 for n in NUMBERS)])
    length = rng.choice([length, donor.start - 8 + rng.randint(-9, 9)])
    return length.to_bytes(8, "little") + donor.blob[8:]


def spliced(donor: Donor, others: Sequence[Donor], rng: random.Random) -> bytes:
    """The beginning of one pack and the end of another."""
    other = rng.choice(others)
    i = rng.randrange(len(donor.blob))
    return rng.choice(
        [
            donor.blob[: donor.start] + other.blob[other.start :],
            donor.blob[:i] + other.blob[i:],
            donor.blob[:i] + other.blob[rng.randrange(len(other.blob)) :],
            assemble(donor.text, other.payload, donor.digests),
            assemble(other.text, donor.payload, donor.digests),
            assemble(donor.text, donor.payload, other.digests),
        ]
    )


def swapped(donor: Donor, others: Sequence[Donor], rng: random.Random) -> bytes:
    """Two ranges of the payload change places."""
    a, b, c, d = sorted(rng.choices(range(len(donor.payload) + 1), k=4))
    p = donor.payload
    p = p[:a] + p[c:d] + p[b:c] + p[a:b] + p[d:]
    return donor.blob[: donor.start] + p + donor.blob[donor.edges[0] :]


def undigested(donor: Donor, others: Sequence[Donor], rng: random.Random) -> bytes:
    """Another text, under the digests of the old one."""
    return assemble(compact(edited(donor.about, rng)), donor.payload, donor.digests)


def misspelt(donor: Donor, others: Sequence[Donor], rng: random.Random) -> bytes:
    """The same JSON or something near it in other words: no second spelling is accepted."""
    where = rng.randrange(2)
    text = [donor.text, donor.blob[8 : donor.start].decode()][where]
    spots = [i for i, letter in enumerate(text) if letter in ',:[]{}"'] or [0]
    i = rng.choice(spots)
    letters = [i for i, letter in enumerate(text) if letter.isalpha()] or [0]
    k = rng.choice(letters)
    digits = [i for i, letter in enumerate(text) if letter.isdigit()] or [0]
    d = rng.choice(digits)
    said = rng.choice([" ", "\t", "\n", "\0", "NaN", "1e999", "-", "[" * 9, "[" * 10**5, '"a":1,'])
    others_ = [
        text[:i] + said + text[i:],
        text[: i + 1] + said + text[i + 1 :],
        text[:k] + f"\\u{ord(text[k]):04x}" + text[k + 1 :],
        text[:d] + rng.choice(["0", "9" * 5000, "1.0", "1e400", "-0", "Infinity"]) + text[d + 1 :],
        text.replace('"task":', '"task":"","task":', 1),
        text.replace('"version":3', '"version":3.0', 1),
        text.replace('"version":3', '"version":1,"version":3', 1),
        text.replace('"tensors":{', '"tensors":{"w":["dense",[1],{"dtype":"F32"}],', 1),
        text.replace('"data_offsets":[0,', '"data_offsets":[-0,', 1),
    ]
    text = rng.choice([other for other in others_ if other != text])
    if where == 0:
        return assemble(text, donor.payload, donor.digests)
    head = text.encode("utf-8", "surrogatepass")
    head = len(head).to_bytes(8, "little") + head
    return assemble(donor.text, donor.payload, donor.digests, head)


DAMAGED: dict[str, Mutator] = {
    "bits flipped": flipped,
    "bytes overwritten": overwritten,
    "a range repeated": repeated,
    "cut off": truncated,
    "made longer": lengthened,
    "another header length": mislength,
    "spliced with another pack": spliced,
    "ranges swapped": swapped,
    "header edited, old digest": undigested,
    "header spelt otherwise": misspelt,
}
