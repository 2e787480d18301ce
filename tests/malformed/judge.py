"""What is asked of a file: that it is refused, or that it is a pack that says just what its bytes say."""

from __future__ import annotations

import contextlib
import resource
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cl_graft.skillpack import codecs
from cl_graft.skillpack.codecs import (
    Encoded,
    Factored,
    Scattered,
    coded_rows,
    entropy,
    packing,
    token_stream,
)
from cl_graft.skillpack.codecs.lossless import (
    MANTISSA,
    _patterns,
    _predicted,
    _rows,
    _sections,
    _Steps,
)
from cl_graft.skillpack.format import header
from cl_graft.skillpack.format.file import (
    CorruptPack,
    NonFinite,
    NotASkillPack,
    ShapeMismatch,
    SkillPack,
    SkillPackError,
    TruncatedPack,
    UnknownCodec,
    UnsupportedVersion,
)
from cl_graft.skillpack.live import decode as live
from tests.docs import reader
from tests.malformed.packs import Donor

A_PACK, A_DONOR = "a pack", "a donor"
ROOM = (
    64 << 20
)  # bytes that reading any small file may take, beside what its tensors are said to be
LONGEST = 12_000  # letters of a sentence: it may name a tensor
STATM = Path("/proc/self/statm")
LAYOUTS = coded_rows.LAYOUTS


def load(
    path: Path, shapes: dict[str, tuple[int, ...]] | None = None, room: int = ROOM
) -> SkillPack | SkillPackError:
    """The pack, or the error by which the file is refused, in one sentence that names it."""
    try:
        with bounded(room):
            return SkillPack.load(path, shapes=shapes)
    except SkillPackError as error:
        said = str(error)
        assert said.endswith(".") and "\n" not in said and str(path) in said, said[:300]
        assert len(said) < LONGEST, f"a sentence of {len(said)} letters"
        return error


def judge(
    path: Path, blob: bytes, donor: Donor, sealed: bool, tensors: Counter[tuple[str, str]]
) -> str:
    """How a file is answered: the name of an error, `A_PACK`, or `A_DONOR` where no byte was changed.

    sealed: whether its maker made checksums right. tensors: counts (codec, how a tensor was answered) of a pack that
    loads. Raises AssertionError where the file is not answered as it should be; what else is raised is a failure, too.
    """
    if sealed:
        return judge_sealed(path, blob, donor, tensors)
    if blob == donor.blob:
        assert isinstance(load(path), SkillPack)
        return A_DONOR
    found = load(path)
    assert isinstance(found, SkillPackError), "a damaged file was read"
    assert isinstance(found, right_kinds(donor, blob)), f"{type(found).__name__}: {found}"
    return type(found).__name__


def right_kinds(donor: Donor, blob: bytes) -> tuple[type[SkillPackError], ...]:
    """The errors that tell such damage; the header has to be right before the payload is looked at."""
    if donor.blob.startswith(blob):
        return (TruncatedPack,)
    if blob[: donor.start] == donor.blob[: donor.start]:
        return (TruncatedPack,) if len(blob) < len(donor.blob) else (CorruptPack,)
    if blob[8 : 8 + len(header.MAGIC)] != header.MAGIC:
        return (NotASkillPack, TruncatedPack)
    return (CorruptPack, TruncatedPack, UnsupportedVersion, UnknownCodec)


def judge_sealed(path: Path, blob: bytes, donor: Donor, tensors: Counter[tuple[str, str]]) -> str:
    """Refused on load, or on decode; or a pack, the only file of it, whose tensors are what a second reader reads."""
    pack = load(path)
    if not isinstance(pack, SkillPack):
        assert not isinstance(pack, ShapeMismatch)
        return f"{type(pack).__name__} on load"
    pack.save(path)
    assert path.read_bytes() == blob, "what was loaded is written as another file"
    pack = load(path, donor.shapes)
    if not isinstance(pack, SkillPack):
        assert isinstance(pack, ShapeMismatch), pack
        return f"{type(pack).__name__} on load"
    total = sum(torch.Size(encoded.shape).numel() for encoded in pack.tensors.values())
    limit = max(sum(torch.Size(shape).numel() for shape in donor.shapes.values()), 1 << 22)
    assert total <= 5 * limit, f"{total} elements"
    worst = A_PACK
    with bounded(ROOM + 24 * total):
        for name, encoded in pack.tensors.items():
            answer = judge_tensor(pack, name, encoded, donor)
            tensors[encoded.codec, answer] += 1
            worst = worst if answer == A_PACK else f"{answer} on decode"
    if total < 1 << 12:
        agree(path, pack, donor, worst)
    return worst


def judge_tensor(pack: SkillPack, name: str, encoded: Encoded, donor: Donor) -> str:
    """Refused on decode, or finite, of the dtype and shape that it says, the same by every way, and encoded back."""
    kept = codecs.kept_dtype(encoded)
    grown = tuple(pack.grown.get(name, encoded.shape))
    base = None if name in pack.added else donor.base(name, grown)
    try:
        delta = pack.delta(name) if kept is None else pack.tuned(name, base)
    except (NonFinite, CorruptPack) as error:
        said = str(error)
        assert said.endswith(".") and "\n" not in said, said[:300]
        if isinstance(error, CorruptPack):  # what a stream holds is known when it is decoded
            assert kept is not None or codecs.layout_name(encoded) == "small", said
            assert_refused(encoded)
        return type(error).__name__
    assert delta.dtype == (kept or torch.float32) and tuple(delta.shape) == encoded.shape
    assert torch.isfinite(delta).all()
    if delta.numel() and kept is None:
        assert_other_ways(encoded, delta)
    if delta.numel() < 1 << 16:
        assert_encoded_again(encoded, base)
    return A_PACK


def assert_refused(encoded: Encoded) -> None:
    """By the ways that do not make the whole tensor, too."""
    for way, kind in ((lambda e: live.factors([e]), Factored), (live.entries, Scattered)):
        if isinstance(codecs.codec_named(encoded.codec), kind):
            try:
                way(encoded)
            except ValueError:
                continue
            raise AssertionError(f"{encoded.codec} is refused whole, and not as {kind.__name__}")


def assert_other_ways(encoded: Encoded, delta: Tensor) -> None:
    """Factors, entries, rows and the other layout give the same tensor."""
    codec, least = codecs.codec_named(encoded.codec), 1e-4 * float(delta.abs().max())
    sparse = torch.zeros(delta.shape)
    if isinstance(codec, Scattered):
        places, values = live.entries(encoded)
        sparse.view(-1)[places] = values.float()
        assert isinstance(codec, Factored) or torch.equal(sparse, delta)
    if isinstance(codec, Factored):
        left, right = live.factors([encoded])
        if torch.isfinite(left).all() and torch.isfinite(right).all():
            sizes = left.abs() @ right.abs() + sparse.abs()  # of the terms, which may cancel out
            assert ((left @ right + sparse - delta).abs() <= 1e-4 * sizes + least).all()
    if delta.ndim:
        ids = torch.tensor([len(delta) - 1, 0])
        assert torch.allclose(codecs.rows(encoded, ids), delta[ids], rtol=1e-4, atol=least)
    if (layout := codecs.layout_name(encoded)) is not None:
        other = codecs.relaid(encoded, next(name for name in LAYOUTS if name != layout))
        assert torch.equal(codecs.decode(other), delta), "another delta in the other layout"


def assert_encoded_again(encoded: Encoded, base: Tensor | None) -> None:
    """What was read from streams and indices is written as the same bytes."""
    meta, parts, shape = encoded.meta, encoded.parts, encoded.shape
    if encoded.codec == "lossless":
        assert_bits_again(encoded, base)
    if "layout" in meta:
        if encoded.codec == "coded":
            sizes = [(meta["kept"], torch.Size(shape[1:] if len(shape) > 1 else shape).numel())]
        else:
            *stack, left, right = shape
            ranks = sum(meta.get("ranks", [])) + meta.get("rank", 0)
            count = stack[0] if stack else 1
            sizes = [(count, right), (count, left), (ranks, right), (ranks, left)]
            sizes += [(meta["kept"], right)] if "kept" in meta else []
        matrices = coded_rows.read(parts, sizes, meta)
        if meta["layout"] == "fast":
            again, said = coded_rows.write(matrices, "fast")
            assert said["bytes"] == meta["bytes"] and torch.equal(again["kinds"], parts["kinds"])
            codes = again["codes"]
        else:
            kinds = parts["kinds"].split([size[0] for size in sizes])
            codes = entropy.encode(matrices, kinds, meta["top"])
        assert torch.equal(codes, parts["codes"]), "other bytes of the same codes"
    if "index" in parts:
        rows = torch.Size(shape).numel()
        if encoded.codec in ("coded", "coded_table"):
            rows = shape[0] if len(shape) > 1 else 1
        gap = meta.get("gap")
        places = packing.unpack_index(parts["index"], gap, rows)
        if gap is None:
            stream = torch.zeros(rows, dtype=torch.uint8)
            stream[places] = 1
        else:
            stream = packing.gap_code(places, gap[0])
        again = packing.pack(stream, gap[0] if gap else 1)
        assert torch.equal(again, parts["index"]), "another index of the same positions"


def assert_bits_again(encoded: Encoded, base: Tensor | None) -> None:
    """The stream of a tensor that is kept bit for bit, under the tables that it has."""
    if not torch.Size(encoded.shape).numel():
        return
    dtype = codecs.kept_dtype(encoded)
    assert dtype is not None
    rows, tables, low, words = _sections(encoded)
    shape, mantissa = _rows(encoded.shape), MANTISSA[dtype]
    before = _predicted(base, encoded.shape, dtype).reshape(shape)
    after = _patterns(codecs.restore(encoded, base).reshape(-1)).reshape(shape)
    mine = slice(None) if rows is None else rows
    steps = _Steps(before[mine].reshape(-1), after[mine].reshape(-1), mantissa)
    again = token_stream.encode(steps, token_stream.read_tables(tables))
    assert again == (low.tobytes(), words.tobytes()), "other bytes of the same steps"


def agree(path: Path, pack: SkillPack, donor: Donor, answer: str) -> None:
    """The reader that was written from docs/pack-format.md reads the same, or refuses what is refused."""
    bases = {}
    for name, encoded in pack.tensors.items():
        if codecs.kept_dtype(encoded) is not None and name not in pack.added:
            base = donor.base(name, tuple(pack.grown.get(name, encoded.shape)))
            bases[name] = base.float().numpy()
    try:
        with np.errstate(all="ignore"):
            _, theirs = reader.read(path, bases)
    except (reader.Refused, IndexError, ValueError, OverflowError) as error:
        assert answer != A_PACK, f"the page's reader refuses it: {error}"
        return
    assert answer == A_PACK, f"the page's reader does not refuse it ({answer})"
    for name, encoded in pack.tensors.items():
        if codecs.kept_dtype(encoded) is not None:
            continue
        mine, other = pack.delta(name).numpy(), theirs[name]
        least = 1e-4 * float(np.abs(mine).max()) if mine.size else 0.0
        assert np.allclose(mine, other, rtol=1e-4, atol=least), f"{encoded.codec} is read otherwise"


@contextlib.contextmanager
def bounded(room: int) -> Iterator[None]:
    """Whoever asks for much more memory than now gets a MemoryError or a RuntimeError."""
    if not STATM.exists():
        yield
        return
    held = int(STATM.read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (held + room, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
