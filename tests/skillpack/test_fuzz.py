"""Malformed files: each is refused in a sentence, or it is a pack that says just what its bytes say.

`CL_GRAFT_FUZZ` says how many are made in all (1,200 unless told); they are seeded. `python -m tests.malformed` prints the
table of many, and tries one again.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cl_graft.skillpack import codecs
from cl_graft.skillpack.codecs import Encoded
from cl_graft.skillpack.format import header
from cl_graft.skillpack.format.file import CorruptPack
from tests.malformed import judge
from tests.malformed.campaign import KINDS, attempt, campaign, case
from tests.malformed.damage import DAMAGED
from tests.malformed.forge import assemble, forge, sealed
from tests.malformed.packs import MAKERS, Donor, pool, scratch

COUNT = int(os.environ.get("CL_GRAFT_FUZZ", "1200"))
VALID = 60


@pytest.fixture(scope="module")
def donors() -> list[Donor]:
    return pool("test", VALID)


@pytest.fixture(scope="module")
def path() -> Iterator[Path]:
    with scratch() as folder:
        yield Path(folder) / "x"


@pytest.mark.parametrize("kind", KINDS)
def test_malformed_files_are_refused_or_say_what_their_bytes_say(
    donors: list[Donor], path: Path, kind: str
) -> None:
    first, answers = list(KINDS).index(kind), Counter[str]()
    for number in range(first, COUNT, len(KINDS)):
        outcome = attempt(number, "test", donors, path)
        assert not outcome.failure, f"case {number}: {outcome.failure}"
        answers[outcome.answer] += 1
    print(f"{kind}: {dict(answers)}")
    refused = answers.total() - answers[judge.A_PACK] - answers[judge.A_DONOR]
    assert answers.total() == len(range(first, COUNT, len(KINDS))) and refused
    assert kind in DAMAGED or COUNT < 1000 or refused < answers.total()


def test_valid_packs_of_every_codec_are_what_is_damaged(donors: list[Donor], path: Path) -> None:
    assert set(MAKERS) == set(codecs.CODECS)
    assert {e.codec for donor in donors for e in donor.pack.tensors.values()} == set(MAKERS)
    for donor in donors:
        path.write_bytes(donor.blob)
        tensors = Counter[tuple[str, str]]()
        assert judge.judge(path, donor.blob, donor, True, tensors) == judge.A_PACK
        assert tensors.total() == len(donor.pack.tensors)
        assert judge.judge(path, donor.blob, donor, False, tensors) == judge.A_DONOR
        assert forge(donor, donor.about, random.Random(0)) == donor.blob
        assert assemble(donor.text, donor.payload, donor.digests) == donor.blob


def test_a_case_is_told_by_its_number(donors: list[Donor]) -> None:
    made_again = pool("test", VALID)
    for number in range(len(KINDS)):
        one, other = case(number, "test", donors), case(number, "test", made_again)
        assert (one.kind, one.blob) == (other.kind, other.blob)
    assert case(0, "test", donors).blob != case(0, "other", donors).blob


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("read", "a damaged file was read"),
        ("other", "ZeroDivisionError"),
        ("lines", "line"),
        ("memory", "Error"),
    ],
)
def test_whatever_is_answered_otherwise_is_a_failure(
    donors: list[Donor], path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str, said: str
) -> None:
    def load(file: Path, shapes: object = None) -> object:
        if wrong == "other":
            raise ZeroDivisionError
        if wrong == "lines":
            raise CorruptPack(f"{file} is one line\nor two.")
        if wrong == "memory":
            return torch.empty(1 << 30)
        return donors[0].pack

    monkeypatch.setattr(judge.SkillPack, "load", load)
    outcome = attempt(0, "test", donors, path)
    assert said in outcome.failure and outcome.answer == ""


def test_a_process_that_dies_or_hangs_costs_one_case(monkeypatch: pytest.MonkeyPatch) -> None:
    """Number 1 ends its process, number 2 does not come back; all others are tried."""
    monkeypatch.setattr("tests.malformed.campaign.HANGS", 0.2)
    monkeypatch.setattr("tests.malformed.campaign.DONORS", 1)
    tried = attempt

    def attempted(number, seed, donors, path):
        if number == 1:
            os._exit(7)
        while number == 2:
            pass
        return tried(number, seed, donors, path)

    monkeypatch.setattr("tests.malformed.campaign.attempt", attempted)
    found = campaign(5, "test", 1)
    assert found.count == 5 and found.answers.total() == 3
    assert [number for number, *_ in found.failures] == [1, 2]
    assert "ended with 7" in found.failures[0][2] and "no end" in found.failures[1][2]


# what malformed packs have uncovered


def test_a_stream_under_a_top_of_0_is_refused_in_a_sentence(path: Path) -> None:
    """A row of a class whose table has one code alone, which the coder has no model for."""
    kinds = torch.ones(2, dtype=torch.uint8)
    meta = {"kept": 2, "columns": 0, "layout": "small", "bytes": 0, "top": 0}
    parts = {
        "steps": torch.ones(2).bfloat16(),
        "columns": torch.zeros(0).bfloat16(),
        "index": torch.tensor([3], dtype=torch.uint8),
        "kinds": kinds,
        "codes": torch.zeros(0, dtype=torch.uint8),
    }
    encoded = Encoded("coded", (2, 3), meta, parts)
    with pytest.raises(ValueError, match=r"class is not below 1, with codes up to 0\.$"):
        codecs.decode(encoded)
    assert not codecs.decode(Encoded("coded", (2, 3), meta, parts | {"kinds": 0 * kinds})).any()


@pytest.mark.parametrize("codec", ["coded", "coded_low_rank", "coded_table", "lossless"])
def test_a_tensor_without_an_element_has_no_stream(codec: str) -> None:
    """It would never be read, so that many files would say the same."""
    lies = {"layout": "small", "bytes": 0, "top": 0}
    metas = {
        "coded": {"kept": 0, "columns": 0, **lies},
        "coded_low_rank": {"rank": 0, **lies},
        "coded_table": {"rank": 0, "kept": 0, **lies},
        "lossless": {"dtype": "F32", "bytes": [0, 0, 0]},
    }
    meta = metas[codec]
    assert codecs.payload_bytes(codec, (0, 5), meta) >= 0
    for more in ({"bytes": 4}, {"top": 1}) if codec != "lossless" else ({"bytes": [0, 0, 4]},):
        with pytest.raises(ValueError):
            codecs.layout(codec, (0, 5), meta | more)


def fast(kinds: list[int], codes: bytes, shape: tuple[int, int], rank: int) -> Encoded:
    """`coded_low_rank` in the layout fast, of any bytes."""
    meta = {"rank": rank, "layout": "fast", "bytes": len(codes)}
    parts = {
        "scales": torch.ones(rank).bfloat16(),
        "kinds": torch.tensor(kinds, dtype=torch.uint8),
        "codes": torch.tensor(list(codes), dtype=torch.uint8),
    }
    return Encoded("coded_low_rank", shape, meta, parts)


def test_codes_and_shifts_beyond_their_range_are_refused_when_a_file_is_loaded() -> None:
    """The layout fast has room for codes up to 32767 and for shifts that make infinities."""
    rows = [0, 0, 16, 2]  # shifts of right and left, then right, then left
    for code, right in ((8191, True), (-8191, True), (8192, False), (-8192, False)):
        encoded = fast(rows, code.to_bytes(2, "little", signed=True) + b"\1", (1, 1), 1)
        if right:
            assert codecs.decode(encoded).item() == code
            continue
        with pytest.raises(ValueError, match="a code is not from -8191 to 8191"):
            codecs.check(encoded)
    for shift, width in ((31, 8), (-31, 8), (-128, 8), (8191, 16), (-8191, 16)):
        data = shift.to_bytes(width // 8, "little", signed=True)
        with pytest.raises(ValueError, match="a shift is not from -30 to 30"):
            codecs.check(fast([width, 0], data, (1, 1), 0))
    codecs.check(fast([8, 0], bytes([30]), (1, 1), 0))


def test_a_row_of_no_codes_has_no_width() -> None:
    """One of 16 bits ended in an error of torch."""
    meta = {"kept": 2, "columns": 0, "layout": "fast", "bytes": 0}
    empty = torch.zeros(0, dtype=torch.uint8)
    parts = {"steps": torch.ones(2).bfloat16(), "columns": empty.bfloat16(), "codes": empty}
    parts |= {"index": torch.tensor([3], dtype=torch.uint8)}
    for width in (0, 2, 16):
        parts["kinds"] = torch.tensor([width, 0], dtype=torch.uint8)
        encoded = Encoded("coded", (2, 0), meta, parts)
        if not width:
            codecs.check(encoded)
            continue
        with pytest.raises(ValueError, match="a row is wider than its codes"):
            codecs.check(encoded)


def test_rows_of_each_width_are_as_narrow_as_they_can_be() -> None:
    """The largest and the least code of each width, and one beyond; a bound of 128 wraps around in int8."""
    for width, most in ((2, 1), (4, 7), (8, 127)):
        for code, wanted in ((most, width), (-most - 1, width), (most + 1, 2 * width)):
            codes = torch.tensor([[code, 0, 1]], dtype=torch.int16)
            encoded = codecs.coded(codes, torch.ones(1), (1, 3), "fast")
            assert encoded.parts["kinds"].tolist() == [wanted]
            assert codecs.decode(encoded).tolist() == [[code, 0, 1]]


@pytest.mark.slow
@pytest.mark.parametrize("value", ["[[[[]]]]", '{"":0}'])
def test_the_largest_header_takes_bounded_memory(
    donors: list[Donor], path: Path, value: str
) -> None:
    """JSON made to be large once parsed, under a digest that is right."""
    donor = donors[0]
    each = value.count("[") + value.count("{") + 1
    count = min(header.MAX_VALUES // each, header.MAX_TEXT // (len(json.dumps(value)) - 1)) - 999
    for factor, room in ((1, 2 << 30), (4, 512 << 20)):  # beyond the limits, nothing is parsed
        options = '"options":{"a":[' + ",".join([value] * count * factor) + "],"
        text = donor.text.replace('"options":{', options, 1)
        assert header.fits(text.encode()) == (factor == 1)
        digests = sealed(text, donor.digests[:-40], donor.pack.base)
        path.write_bytes(assemble(text, donor.payload, digests))
        del options, text
        start = time.process_time()
        assert isinstance(judge.load(path, room=room), CorruptPack)
        assert time.process_time() - start < 30 / factor
