"""The SkillPack file: exact sizes, nothing accepted but what was saved, no write half done."""

from __future__ import annotations

import copy
import dataclasses
import errno
import hashlib
import json
import math
import os
import random
import resource
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load as safetensors_load
from safetensors.torch import save as safetensors_save
from torch import Tensor

from cl_graft.skillpack import codecs
from cl_graft.skillpack import file as pack_file
from cl_graft.skillpack.codecs import Encoded
from cl_graft.skillpack.file import (
    CorruptPack,
    NonFinite,
    NotASkillPack,
    PackNotFound,
    ShapeMismatch,
    SkillPack,
    SkillPackError,
    TruncatedPack,
    UnknownCodec,
    UnsupportedVersion,
    WrongBase,
    fingerprint,
    packed_size,
)
from cl_graft.skillpack.quant import Quantized

BASE = "0123456789abcdef" * 2


def grid(rows: int, cols: int, bits: int) -> Quantized:
    g = torch.Generator().manual_seed(rows)
    codes, zero = (torch.randint(0, 2**bits, (rows, n), generator=g).byte() for n in (cols, 1))
    return Quantized(codes, torch.randn(rows, 1, generator=g).half(), zero, bits, 64, -9)


def some_tensors() -> dict[str, Encoded]:
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    return {
        "norm.weight": codecs.dense(x[0], torch.float32),
        "a.weight": codecs.sparse_top(x, 4),
        "b.weight": codecs.low_rank(x[:, :1], x[:1], torch.float16),
        "c.weight": codecs.quantized(grid(6, 8, 3)),
        "d.weight": codecs.quantized_low_rank([(grid(2, 6, 3), grid(2, 8, 3))], (6, 8)),
        "e.weight": codecs.sign_scale(x),
        "f.weight": codecs.quantized_low_rank([], (6, 8)),
    }


def some_pack(**changes: Any) -> SkillPack:
    about = {"task": "math", "method": "graft", "options": {"budget": 0.1}, "base": BASE}
    return SkillPack(**{"tensors": some_tensors(), **about, **changes})


def same(a: SkillPack, b: SkillPack) -> bool:
    """Compared tensor by tensor, so not by trusting the digest."""
    fields = ("task", "method", "options", "base", "versions")
    if any(getattr(a, name) != getattr(b, name) for name in fields) or a.digest != b.digest:
        return False
    if a.tensors.keys() != b.tensors.keys():
        return False
    pairs = [(a.tensors[name], b.tensors[name]) for name in a.tensors]
    return all(
        x.spec == y.spec
        and x.parts.keys() == y.parts.keys()
        and all(torch.equal(x.parts[key], y.parts[key]) for key in x.parts)
        for x, y in pairs
    )


def refusal(kind: type[SkillPackError], action: Callable[[], object], *words: str) -> None:
    """`action` is refused with exactly this class, in one sentence that has these words."""
    with pytest.raises(SkillPackError) as caught:
        action()
    assert type(caught.value) is kind
    message = str(caught.value)
    assert message.endswith(".") and "\n" not in message
    assert all(word in message for word in words), message


# forging: the same format through safetensors' own writer, with a valid digest


def compact(value: object) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def read_about(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["skillpack"])


def read_parts(path: Path) -> dict[str, Tensor]:
    return safetensors_load(path.read_bytes())


def forge(path: Path, about: dict[str, Any], parts: dict[str, Tensor]) -> None:
    """A file that says whatever its maker likes, its digest valid."""
    about = {name: value for name, value in about.items() if name != "digest"}
    blob = safetensors_save(parts, {"skillpack": ""})
    payload = blob[8 + int.from_bytes(blob[:8], "little") :]
    digest = hashlib.blake2b(compact(about).encode() + payload, digest_size=16).hexdigest()
    text = compact(about | {"digest": digest})
    path.unlink(missing_ok=True)  # a new file is quicker than a truncated one
    path.write_bytes(safetensors_save(parts, {"skillpack": text}))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "math.skillpack"
    some_pack().save(path)
    return path


# what is saved is what is loaded


def test_round_trip_and_exact_size(tmp_path: Path) -> None:
    pack, path = some_pack(), tmp_path / "math.skillpack"
    assert pack.save(path) == pack.nbytes == path.stat().st_size
    loaded = SkillPack.load(path, base=BASE, shapes={k: e.shape for k, e in pack.tensors.items()})
    assert same(pack, loaded)
    for name, delta in loaded.decode().items():
        assert torch.equal(delta, codecs.decode(pack.tensors[name]))
    assert list(tmp_path.iterdir()) == [path]


names = st.text(st.characters(codec="utf-8"), max_size=12)
plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | names,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=40, deadline=None)
@given(
    st.dictionaries(names, st.sampled_from(list(some_tensors().values())), max_size=5),
    names,
    st.dictionaries(names, plain, max_size=3),
)
def test_any_names_and_options_round_trip_and_sizes_are_foretold(
    tmp_path_factory: pytest.TempPathFactory,
    tensors: dict[str, Encoded],
    task: str,
    options: dict[str, Any],
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.skillpack"
    pack = some_pack(tensors=tensors, task=task, options=options)
    specs = {name: encoded.spec for name, encoded in tensors.items()}
    foretold = packed_size(specs, task=task, method="graft", options=options)
    assert foretold == pack.nbytes == pack.save(path) == path.stat().st_size
    assert same(pack, SkillPack.load(path))


def test_the_file_is_what_safetensors_would_write(saved: Path) -> None:
    with safe_open(saved, "pt") as file:
        metadata = file.metadata()
    assert safetensors_save(read_parts(saved), metadata) == saved.read_bytes()
    assert sorted(read_parts(saved))[:3] == ["a.weight:index", "a.weight:values", "b.weight:left"]


def test_the_digest_depends_on_content_only() -> None:
    pack = some_pack()
    assert pack.digest == some_pack().digest
    assert pack.digest == some_pack(tensors=dict(reversed(pack.tensors.items()))).digest
    changed = some_tensors()
    changed["a.weight"].parts["values"][0] += 1
    others = [
        {"task": "code"},
        {"base": BASE[::-1]},
        {"options": {"budget": 0.2}},
        {"versions": {}},
        {"tensors": changed},
    ]
    assert len({pack.digest, *(some_pack(**other).digest for other in others)}) == 6


def test_per_tensor_overhead_is_small() -> None:
    one = codecs.quantized_low_rank([(grid(8, 64, 4), grid(8, 64, 4))] * 3, (64, 64))
    names = [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(30)]
    few, many = (some_pack(tensors=dict.fromkeys(names[:n], one)).nbytes for n in (10, 30))
    assert (many - few) / 20 - codecs.payload_bytes(*one.spec) < 400


# what does not fit to be saved


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(("tensor", "part"), [("norm.weight", "values"), ("d.weight", "scales")])
def test_non_finite_values_are_not_saved(
    tmp_path: Path, bad: float, tensor: str, part: str
) -> None:
    pack = some_pack()
    pack.tensors[tensor].parts[part][0] = bad
    refusal(NonFinite, lambda: pack.save(tmp_path / "x"), tensor, "NaN or Inf")
    assert not list(tmp_path.iterdir())


def test_a_delta_that_overflows_float32_is_refused() -> None:
    huge = dataclasses.replace(grid(6, 8, 8), exponent=117, scale=torch.full((6, 1), 6e4).half())
    pack = some_pack(tensors={"w": codecs.quantized(huge)})
    refusal(NonFinite, lambda: pack.decode(), "'w'", "'math'")


@pytest.mark.parametrize(
    "options",
    [{"x": math.nan}, {"x": torch.ones(1)}, {1: 1, "1": 2}, {"x": "\ud800"}, {"x": {1, 2}}],
)
def test_options_that_json_does_not_keep_are_not_saved(tmp_path: Path, options: Any) -> None:
    refusal(SkillPackError, lambda: some_pack(options=options).save(tmp_path / "x"), "JSON")


def test_parts_that_do_not_fit_are_not_saved(tmp_path: Path) -> None:
    pack = some_pack()
    pack.tensors["e.weight"].parts["signs"] = torch.zeros(7, dtype=torch.uint8)
    refusal(CorruptPack, lambda: pack.save(tmp_path / "x"), "'e.weight'")
    refusal(CorruptPack, lambda: pack.delta("e.weight"), "'e.weight'")


# a save that fails or is killed


@pytest.mark.parametrize(("module", "call"), [(os, "replace"), (os, "fsync")])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
def test_a_failed_save_leaves_the_old_file(
    saved: Path, monkeypatch: pytest.MonkeyPatch, module: Any, call: str, error: BaseException
) -> None:
    def fail(*_: object) -> None:
        raise error

    before = saved.read_bytes()
    monkeypatch.setattr(module, call, fail)
    if isinstance(error, OSError):
        refusal(SkillPackError, lambda: some_pack(task="b").save(saved), str(saved), "disk is full")
    else:
        with pytest.raises(KeyboardInterrupt):
            some_pack(task="b").save(saved)
    assert list(saved.parent.iterdir()) == [saved]
    assert saved.read_bytes() == before


def test_a_write_that_the_system_cuts_short_leaves_the_old_file(saved: Path) -> None:
    before, limits = saved.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        refusal(SkillPackError, lambda: some_pack(task="b").save(saved), str(saved), "too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(saved.parent.iterdir()) == [saved]
    assert saved.read_bytes() == before


def test_a_folder_that_does_not_exist_is_named(tmp_path: Path) -> None:
    path = tmp_path / "no" / "x"
    refusal(SkillPackError, lambda: some_pack().save(path), str(path), "No such file")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of fork in a process with threads
def test_a_killed_save_leaves_the_old_file_or_the_new(saved: Path) -> None:
    old, new = some_pack(), some_pack(task="code")
    rng = random.Random(0)
    for _ in range(20):
        child = os.fork()
        if not child:
            while True:
                new.save(saved)
                old.save(saved)
        time.sleep(rng.uniform(0.001, 0.02))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert SkillPack.load(saved).digest in (old.digest, new.digest)


# refusals, each by its own name


def test_no_file_and_files_of_other_kinds(tmp_path: Path) -> None:
    refusal(PackNotFound, lambda: SkillPack.load(tmp_path / "x"), str(tmp_path / "x"))
    refusal(NotASkillPack, lambda: SkillPack.load(tmp_path), str(tmp_path))
    other = tmp_path / "other"
    for blob in (
        b"hello, this is no tensor file at all, but a few words of text",
        safetensors_save({"x": torch.ones(2)}),
        safetensors_save({"x": torch.ones(2)}, {"format": "pt"}),
        b"PK\3\4" + bytes(200),
    ):
        other.write_bytes(blob)
        refusal(NotASkillPack, lambda: SkillPack.load(other), str(other))
    other.write_bytes(b"")
    refusal(TruncatedPack, lambda: SkillPack.load(other), str(other))


def test_wrong_base_and_wrong_shapes(saved: Path) -> None:
    shapes = {name: encoded.shape for name, encoded in some_tensors().items()}
    refusal(WrongBase, lambda: SkillPack.load(saved, base="f" * 32), str(saved), BASE)
    wrong = shapes | {"e.weight": (8, 6)}
    refusal(ShapeMismatch, lambda: SkillPack.load(saved, shapes=wrong), "'e.weight'", "(8, 6)")
    del shapes["e.weight"]
    refusal(ShapeMismatch, lambda: SkillPack.load(saved, shapes=shapes), "no such tensor")


def edit(about: dict[str, Any], where: list[Any], value: Any) -> dict[str, Any]:
    """A copy of `about` with another value at this place."""
    about = copy.deepcopy(about)
    inner: Any = about
    for key in where[:-1]:
        inner = inner[key]
    inner[where[-1]] = value
    return about


@pytest.mark.parametrize(
    ("where", "value", "kind"),
    [
        (["version"], 2, UnsupportedVersion),
        (["version"], True, CorruptPack),
        (["version"], 1.0, CorruptPack),
        (["base"], None, CorruptPack),
        (["options"], [], CorruptPack),
        (["versions"], {"torch": 2}, CorruptPack),
        (["more"], 1, CorruptPack),
        (["tensors"], [], CorruptPack),
        (["tensors", "a.weight"], ["dense", [6, 8]], CorruptPack),
        (["tensors", "a.weight", 0], "zip", UnknownCodec),
        (["tensors", "a.weight", 0], "dense", CorruptPack),
        (["tensors", "a.weight", 1], [1 << 30, 1 << 30], CorruptPack),
        (["tensors", "a.weight", 1], [[6], 8], CorruptPack),
        (["tensors", "a.weight", 1], [2, 2], CorruptPack),
        (["tensors", "a.weight", 2, "kept"], 5, CorruptPack),
        (["tensors", "norm.weight", 1], [1 << 47], CorruptPack),
        (["tensors", "c.weight", 2, "bits"], 4, CorruptPack),
        (["tensors", "e.weight", 2, "x"], 4, CorruptPack),
    ],
)
def test_a_header_is_refused_even_with_a_valid_digest(
    saved: Path, where: list[Any], value: Any, kind: type[SkillPackError]
) -> None:
    forge(saved, edit(read_about(saved), where, value), read_parts(saved))
    refusal(kind, lambda: SkillPack.load(saved), str(saved))


def test_a_forged_file_with_no_edit_is_the_pack(saved: Path) -> None:
    before = saved.read_bytes()
    forge(saved, read_about(saved), read_parts(saved))
    assert saved.read_bytes() == before


@pytest.mark.parametrize(
    ("key", "index", "value", "kind"),
    [
        ("norm.weight:values", 0, math.nan, NonFinite),
        ("b.weight:left", 0, math.inf, NonFinite),
        ("c.weight:scales", 0, -math.inf, NonFinite),
        ("e.weight:scale", 0, math.nan, NonFinite),
        ("c.weight:codes", 0, 0x80, CorruptPack),  # an exponent of -128
        ("c.weight:codes", -1, 0xFF, CorruptPack),  # bits after the last zero
        ("a.weight:index", 0, 0xFF, CorruptPack),
    ],
)
def test_contents_are_refused_even_with_a_valid_digest(
    saved: Path, key: str, index: int, value: float, kind: type[SkillPackError]
) -> None:
    parts = read_parts(saved)
    parts[key].view(-1)[index] = value
    forge(saved, read_about(saved), parts)
    refusal(kind, lambda: SkillPack.load(saved), str(saved), key.split(":")[0])


def test_a_header_that_claims_terabytes_is_refused_by_the_size_of_its_file(tmp_path: Path) -> None:
    path, shape = tmp_path / "huge", (1 << 23, 1 << 24)
    specs = {"w": ("dense", shape, {"dtype": "F32"})}
    about = {"base": BASE, "task": "", "method": "", "options": {}, "versions": {}}
    claim = pack_file._about_of(about, specs) | {"digest": "0" * 32}
    path.write_bytes(pack_file._header(claim, pack_file._table(specs)) + bytes(1000))
    refusal(TruncatedPack, lambda: SkillPack.load(path), str(path))


@pytest.mark.parametrize("length", [0, 31, (16 << 20) + 1, 1 << 40, (1 << 64) - 1])
def test_a_mad_header_length_is_refused(saved: Path, length: int) -> None:
    saved.write_bytes(length.to_bytes(8, "little") + saved.read_bytes()[8:])
    refusal(CorruptPack, lambda: SkillPack.load(saved), str(length))


def test_json_made_to_break_parsers_is_refused(saved: Path) -> None:
    for inner in ("[" * 100_000, '{"version":' + "9" * 10_000 + "}", '{"version":1e999}', "{NaN}"):
        saved.write_bytes(safetensors_save({}, {"skillpack": "{" + inner}))
        refusal(CorruptPack, lambda: SkillPack.load(saved), str(saved))


# fuzzing: more than 5500 damaged files, and not one is accepted or answered by another exception


def flips(blob: bytes, rng: random.Random) -> Iterator[bytes]:
    """One bit of every byte in turn, then bytes in random places."""
    for i in range(len(blob)):
        yield blob[:i] + bytes([blob[i] ^ 1 << rng.randrange(8)]) + blob[i + 1 :]
    for _ in range(1000):
        bad = bytearray(blob)
        for _ in range(rng.randint(1, 8)):
            bad[rng.randrange(len(bad))] = rng.randrange(256)
        yield bytes(bad)


def cuts(blob: bytes, rng: random.Random) -> Iterator[bytes]:
    """Every length, and something more or less in the middle or at the end."""
    yield from (blob[:i] for i in range(len(blob)))
    for _ in range(400):
        i, j = sorted(rng.choices(range(len(blob)), k=2))
        yield blob[:i] + rng.randbytes(rng.randint(1, 9)) + blob[i:]
        yield blob[:i] + blob[j:]
        yield blob + bytes(rng.randint(1, 64))


@pytest.mark.parametrize("damage", [flips, cuts])
def test_no_damaged_file_is_accepted(
    saved: Path, damage: Callable[[bytes, random.Random], Iterator[bytes]]
) -> None:
    blob, count = saved.read_bytes(), 0
    for bad in damage(blob, random.Random(0)):
        if bad == blob:
            continue
        saved.unlink()
        saved.write_bytes(bad)
        count += 1
        with pytest.raises(SkillPackError):
            SkillPack.load(saved)
    assert count > 2700


def places(value: Any, where: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path to everything inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        yield (*where, key)
        if isinstance(inner, dict | list):
            yield from places(inner, (*where, key))


def test_no_edit_of_a_header_breaks_the_reader(saved: Path) -> None:
    """Forged with a valid digest: refused, or a pack that decodes within the shapes of the base."""
    about, parts, rng = read_about(saved), read_parts(saved), random.Random(0)
    shapes = {name: encoded.shape for name, encoded in some_tensors().items()}
    values = [None, True, -1, 0, 1, 2, 3, 9, 1 << 50, 0.5, "", "F16", "dense", [], [1], [6, 8], {}]
    values += ["low_rank", [2, 9], [[2, 3, 64, 64]], {"dtype": "F16"}, "\n", "F32", [48], 10**30]
    loaded, everywhere = 0, list(places(about))
    for _ in range(1000):
        forge(saved, edit(about, list(rng.choice(everywhere)), rng.choice(values)), parts)
        try:
            pack = SkillPack.load(saved, shapes=shapes)
            deltas = pack.decode()
        except SkillPackError as error:
            assert str(error).endswith(".") and "\n" not in str(error)
            continue
        loaded += 1
        assert {
            name: tuple(delta.shape) for name, delta in deltas.items()
        }.items() <= shapes.items()
    assert 0 < loaded < 500


# fingerprints


def test_a_fingerprint_covers_names_dtypes_shapes_and_bytes() -> None:
    x = torch.arange(6, dtype=torch.bfloat16)
    base = {"a": x, "b": x.float(), "c": torch.tensor(1.5), "d": torch.empty(0)}
    found = fingerprint(base.items())
    assert len(found) == 32 and found == fingerprint(reversed(base.items()))
    nudged = x.clone()
    nudged.view(torch.int16)[3] += 1
    others = [
        base | {"a": nudged},
        base | {"a": x.half()},
        base | {"a": x.view(2, 3)},
        base | {"a": x.view(torch.int16)},
        {("A" if name == "a" else name): tensor for name, tensor in base.items()},
        {name: base[name] for name in "abc"},
        base | {"d": torch.empty(0, 1)},
    ]
    assert len({found, *(fingerprint(other.items()) for other in others)}) == 8


def test_a_fingerprint_does_not_depend_on_strides() -> None:
    x = torch.randn(3, 4)
    assert fingerprint([("x", x.T)]) == fingerprint([("x", x.T.contiguous())])
