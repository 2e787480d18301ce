"""Malformed packs, made by a seed, and how each of them is answered: refused in a sentence, or read as what it says.

    python -m tests.malformed --packs 100000 --seed 0 --jobs 1 --out DIR

Valid packs of every codec are damaged: with the checksums left as they were, which must be refused; and with checksums
and digest made right again, which must be refused when the file is loaded or a tensor decoded, or be a pack that says
just what its bytes say. `--case NUMBER` tries one of them again and keeps its file.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from cl_graft.store.digests import machine, versions
from tests.malformed.campaign import DONORS, KINDS, Found, attempt, campaign, case
from tests.malformed.damage import DAMAGED
from tests.malformed.judge import A_DONOR, A_PACK
from tests.malformed.packs import MAKERS, pool

ANSWERS = {
    "truncated": ("TruncatedPack",),
    "corrupt": ("CorruptPack", "NonFinite"),
    "no pack, or of another version or codec": (
        "NotASkillPack",
        "UnsupportedVersion",
        "UnknownCodec",
    ),
    "not of the base": ("ShapeMismatch",),
}
HEAD = ["damage", "files", *ANSWERS, "on decode", "a pack", "unchanged", "failures"]
CODEC_HEAD = ["codec", "decoded and encoded again", "stream refused", "not finite"]


def cells(kind: str, found: Found) -> list[int]:
    """The row of a kind of damage."""
    mine = {answer: n for (of, answer), n in found.answers.items() if of == kind}
    on_load = {answer.removesuffix(" on load"): n for answer, n in mine.items()}
    failures = sum(of == kind for _, of, _ in found.failures)
    counts = [sum(on_load.get(name, 0) for name in names) for names in ANSWERS.values()]
    on_decode = sum(n for answer, n in mine.items() if answer.endswith(" on decode"))
    rest = [on_decode, mine.get(A_PACK, 0), mine.get(A_DONOR, 0), failures]
    return [sum(mine.values()) + failures, *counts, *rest]


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    rule = "|".join(["---", *["---:"] * (len(head) - 1)])
    lines = [f"| {' | '.join(head)} |", f"|{rule}|"]
    for row in rows:
        said = [f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row]
        lines.append(f"| {' | '.join(said)} |")
    return "\n".join(lines) + "\n"


def tables(found: Found) -> str:
    """How files of each kind of damage were answered, and tensors of each codec in those that loaded."""
    rows = [[kind, *cells(kind, found)] for kind in KINDS]
    total = ["all", *(sum(column) for column in list(zip(*rows, strict=True))[1:])]
    tensors = [
        [codec, *(found.tensors[codec, answer] for answer in (A_PACK, "CorruptPack", "NonFinite"))]
        for codec in sorted(MAKERS)
    ]
    return table(HEAD, [*rows, total]) + "\n" + table(CODEC_HEAD, tensors)


def summary(found: Found, seed: int, seconds: float, processor: float) -> dict[str, Any]:
    return {
        "packs": found.count,
        "seed": seed,
        "valid packs": DONORS,
        "failures": sorted(found.failures),
        "slowest_s": round(found.slowest, 3),
        "seconds": round(seconds),
        "processor_seconds": round(processor),
        "rows": [dict(zip(HEAD, [kind, *cells(kind, found)], strict=True)) for kind in KINDS],
        "tensors": {
            f"{codec}, {answer}": n for (codec, answer), n in sorted(found.tensors.items())
        },
        "versions": versions(),
        "machine": machine(),
    }


def again(number: int, seed: int, out: Path) -> None:
    """Try one case again; its file stays in the folder."""
    donors = pool(seed, DONORS)
    kind, donor, blob = case(number, seed, donors)
    file = out / f"case-{number}.safetensors"
    outcome = attempt(number, seed, donors, file)
    file.write_bytes(blob)
    made_of = ", ".join(encoded.codec for encoded in donor.pack.tensors.values())
    checksums = "left as they were" if kind in DAMAGED else "made right"
    print(f"{file}: {kind} (checksums {checksums}), of a pack of {made_of}")
    print(outcome.failure or outcome.answer)
    raise SystemExit(1 if outcome.failure else 0)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.malformed", description=__doc__)
    parser.add_argument("--packs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="malformed.md and .json go here")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--case", type=int, metavar="NUMBER", help="try this one again")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    if asked.case is not None:
        again(asked.case, asked.seed, asked.out)
    begun = time.monotonic()
    found = campaign(asked.packs, asked.seed, asked.jobs, partial(print, flush=True))
    said = summary(found, asked.seed, time.monotonic() - begun, found.processor)
    (asked.out / "malformed.json").write_text(json.dumps(said, indent=1) + "\n")
    (asked.out / "malformed.md").write_text(tables(found))
    print(tables(found), end="")
    raise SystemExit(1 if found.failures else 0)


if __name__ == "__main__":
    main()
