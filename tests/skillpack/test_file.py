"""The SkillPack file: exact sizes, nothing accepted but what was saved, no write half done."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import json
import math
import zlib
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
from cl_graft.skillpack.codecs import Encoded
from cl_graft.skillpack.codecs.quant import Quantized
from cl_graft.skillpack.format import files, header
from cl_graft.skillpack.format.file import (
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
    packed_size,
)
from cl_graft.skillpack.format.files import PackedFile
from tests.docs import reader
from tests.refusals import refusal

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


FILES = {
    "chat_template.jinja": PackedFile.of(b"{{ messages }}" * 9),
    "tokenizer.model": PackedFile.of(bytes(range(256))),
    "merges.txt": PackedFile.of(b""),
}


def same(a: SkillPack, b: SkillPack) -> bool:
    """Compared tensor by tensor, so not by trusting the digest."""
    fields = ("task", "method", "options", "base", "versions", "added", "grown", "files")
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


# forging: the same format through safetensors' own writer, with a valid digest


def compact(value: object) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def read_about(path: Path) -> dict[str, Any]:
    """The text of a file."""
    return json.loads(reader.stated(safetensors_load(path.read_bytes())["text"].numpy().tobytes()))


def places(path: Path) -> dict[str, tuple[Any, list[int], int, int]]:
    """{part: (dtype, shape, begin, end)} of a file, in the order of the payload."""
    about, _, end, _ = reader.told(path.read_bytes())
    parts = {name: reader.layout(*said) for name, said in about["tensors"].items()}
    found = {}
    for name, part, dtype, shape in reader.placed(parts, about["files"]):
        start, end = end, end + reader.size(dtype, shape)
        found[reader.key(name, part)] = codecs.STORABLE[dtype], shape, start, end
    return found


def read_parts(path: Path) -> dict[str, Tensor]:
    """{part: its tensor}."""
    data = path.read_bytes()
    return {
        key: torch.frombuffer(bytearray(data[start:end]), dtype=dtype).view(shape)
        if end > start
        else torch.empty(shape, dtype=dtype)
        for key, (dtype, shape, start, end) in places(path).items()
    }


PARTS = {
    "dense": ("values",),
    "sparse": ("values", "index"),
    "low_rank": ("left", "right"),
    "low_rank_stack": ("left", "right"),
    "quantized": ("codes", "scales"),
    "quantized_low_rank": ("codes", "scales"),
    "coded_low_rank": ("scales", "kinds", "codes"),
    "coded_low_rank_stack": ("scales", "kinds", "codes"),
    "coded_table": ("scales", "index", "kinds", "codes"),
    "coded": ("steps", "columns", "index", "kinds", "codes"),
    "sign_scale": ("signs", "scale"),
    "exact": ("values",),
}


def raw(*parts: Tensor) -> bytes:
    return b"".join(part.reshape(-1).view(torch.uint8).numpy().tobytes() for part in parts)


def checksum(name: str, said: Any, parts: dict[str, Tensor]) -> bytes:
    """That of a tensor's parts, if its entry is one at all."""
    named = PARTS.get(said[0], ()) if isinstance(said, list) and said else ()
    data = raw(*(parts[key] for part in named if (key := f"{name}:{part}") in parts))
    return hashlib.blake2b(data, digest_size=8).digest()


def forge(path: Path, about: dict[str, Any], parts: dict[str, Tensor]) -> None:
    """A file that says whatever its maker likes, its checksums and its digest valid."""
    tensors = about["tensors"] if isinstance(about["tensors"], dict) else {}
    order = list(codecs.STORABLE.values())
    keys = sorted(parts, key=lambda key: (order.index(parts[key].dtype), key))
    payload, text = raw(*(parts[key] for key in keys)), compact(about).encode()
    sums = b"".join(checksum(name, said, parts) for name, said in tensors.items())
    stored, version = zlib.compress(text, 9), about["version"]
    digest = hashlib.blake2b(text + sums + bytes.fromhex(BASE), digest_size=16).digest()
    sums += hashlib.blake2b(stored, digest_size=8).digest() + bytes.fromhex(BASE) + digest
    said = str(version) if type(version) is int else "3"
    head = reader.head(len(payload), len(stored), len(sums)).replace(
        b'"3"', f'"{said}"'.encode(), 1
    )
    path.unlink(missing_ok=True)  # a new file is quicker than a truncated one
    path.write_bytes(head + payload + stored + sums)


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


def test_the_file_is_one_that_safetensors_reads(saved: Path) -> None:
    state = {f"state.{t}": codecs.exact(torch.ones(3, dtype=t)) for t in codecs.STORABLE.values()}
    some_pack(tensors=some_tensors() | state).save(saved)
    with safe_open(saved, "pt") as file:
        assert file.metadata() == {"skillpack": "3"}
        assert set(file.keys()) == {"payload", "text", "digests"}
        payload = file.get_tensor("payload").numpy().tobytes()
    assert raw(*read_parts(saved).values()) == payload
    assert sorted(read_parts(saved))[:3] == ["a.weight:index", "a.weight:values", "b.weight:left"]
    assert {part.dtype for part in read_parts(saved).values()} == set(codecs.STORABLE.values())


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
        {"added": ["a.weight"]},
        {"grown": {"a.weight": [5, 8]}},
        {"files": FILES},
        {"files": FILES | {"tokenizer.model": PackedFile.of(bytes(range(256))[::-1])}},
    ]
    assert len({pack.digest, *(some_pack(**other).digest for other in others)}) == 10


def test_per_tensor_overhead_is_small() -> None:
    one = codecs.quantized_low_rank([(grid(8, 64, 4), grid(8, 64, 4))] * 3, (64, 64))
    names = [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(30)]
    few, many = (some_pack(tensors=dict.fromkeys(names[:n], one)).nbytes for n in (10, 30))
    assert (many - few) / 20 - codecs.payload_bytes(*one.spec) < 40


# tensors that the base lacks, or has in another number of rows


def test_added_and_grown_tensors_are_kept_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "x"
    lacking = {"added": ["e.weight", "a.weight"], "grown": {"c.weight": [5, 8], "b.weight": [9, 8]}}
    pack = some_pack(**lacking)
    assert pack.save(path) == pack.nbytes == path.stat().st_size > some_pack().nbytes
    specs = {name: encoded.spec for name, encoded in pack.tensors.items()}
    about = {"task": "math", "method": "graft", "options": pack.options}
    assert packed_size(specs, **about, **lacking) == pack.nbytes
    loaded = SkillPack.load(path)
    assert loaded.added == ["a.weight", "e.weight"]
    assert list(loaded.grown.items()) == [("b.weight", [9, 8]), ("c.weight", [5, 8])]
    assert loaded.digest == pack.digest
    assert (some_pack().added, some_pack().grown) == ([], {})


def test_the_base_must_lack_what_is_added_and_have_what_has_grown_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "x"
    some_pack(added=["a.weight"], grown={"b.weight": [5, 8]}).save(path)
    shapes = {name: encoded.shape for name, encoded in some_tensors().items()}
    base = shapes | {"b.weight": (5, 8)}
    del base["a.weight"]
    SkillPack.load(path, shapes=base)
    refusal(
        ShapeMismatch,
        lambda: SkillPack.load(path, shapes=base | {"a.weight": (6, 8)}),
        "'a.weight'",
        "must have none",
    )
    for other in ((6, 8), (4, 8)):
        wrong = base | {"b.weight": other}
        refusal(ShapeMismatch, lambda wrong=wrong: SkillPack.load(path, shapes=wrong), "'b.weight'")


@pytest.mark.parametrize(
    "lacking", [{"added": ["w"]}, {"grown": {"w": [1, 1 << 20]}}], ids=["added", "grown"]
)
def test_what_the_base_lacks_is_bounded_by_what_it_has(tmp_path: Path, lacking: Any) -> None:
    """A file of some hundred bytes may stand for a tensor of any size."""
    path = tmp_path / "x"
    shapes = {"e": (1 << 10, 1 << 10)} | ({"w": (1, 1 << 20)} if "grown" in lacking else {})
    most = 4 * sum(math.prod(shape) for shape in shapes.values()) >> 20  # rows, of the whole base
    for rows, fits in ((most, True), (most + 1, False)):
        zeros = codecs.quantized_low_rank([], (rows, 1 << 20))
        some_pack(tensors={"w": zeros}, **lacking).save(path)
        if fits:
            assert SkillPack.load(path, shapes=shapes).tensors["w"].shape == (rows, 1 << 20)
        else:
            load = lambda: SkillPack.load(path, shapes=shapes)  # noqa: E731
            refusal(ShapeMismatch, load, "out of proportion")


@pytest.mark.parametrize(
    "lacking", [{"added": ["nobody"]}, {"added": ["a.weight"] * 2}, {"grown": {"a.weight": [6, 8]}}]
)
def test_senseless_additions_are_not_saved(tmp_path: Path, lacking: Any) -> None:
    refusal(CorruptPack, lambda: some_pack(**lacking).save(tmp_path / "x"), "x")
    assert not list(tmp_path.iterdir())


# files beside the tensors


def test_files_round_trip_and_take_no_more_than_they_must(tmp_path: Path) -> None:
    path = tmp_path / "x"
    pack = some_pack(files=FILES)
    assert pack.save(path) == pack.nbytes == path.stat().st_size
    loaded = SkillPack.load(path)
    assert same(pack, loaded) and list(loaded.files) == sorted(FILES)
    content = {name: file.content() for name, file in loaded.files.items()}
    assert content["chat_template.jinja"] == b"{{ messages }}" * 9 and content["merges.txt"] == b""
    assert content["tokenizer.model"] == bytes(range(256))
    sizes = {name: (file.size, len(file.stored)) for name, file in loaded.files.items()}
    assert sizes["chat_template.jinja"][1] < 40 < sizes["chat_template.jinja"][0] == 126
    assert sizes["tokenizer.model"] == (256, 256) and sizes["merges.txt"] == (0, 0)
    parts = read_parts(path)
    assert (
        zlib.decompress(parts["files:chat_template.jinja"].numpy().tobytes())
        == content["chat_template.jinja"]
    )


def entry(stored: bytes, size: int | None = None) -> list[Any]:
    checksum = hashlib.blake2b(stored, digest_size=8).hexdigest()
    return [len(stored) if size is None else size, len(stored), checksum]


def forged_file(saved: Path, name: str, stored: bytes, said: Any) -> None:
    parts = read_parts(saved)
    if stored is not None:
        parts[f"files:{name}"] = torch.tensor(list(stored), dtype=torch.uint8)
    forge(saved, edit(read_about(saved), ["files"], {name: said}), parts)


def test_a_forged_file_that_is_right_is_read(saved: Path) -> None:
    """The premise of the refusals below."""
    text = b"{{ x }}" * 99
    for level in (1, 9):
        stored = zlib.compress(text, level)
        forged_file(saved, "chat_template.jinja", stored, entry(stored, len(text)))
        assert SkillPack.load(saved).files["chat_template.jinja"].content() == text


BOMB = zlib.compress(bytes(100_000_000), 9)


@pytest.mark.parametrize(
    ("name", "stored", "size", "word"),
    [
        ("../model.safetensors", b"x", None, "none that a pack may hold"),
        ("modeling.py", b"x", None, "none that a pack may hold"),
        ("additional_chat_templates/../x.jinja", b"x", None, "none that a pack may hold"),
        ("vocab.txt", b"words", 6, "zlib"),
        ("vocab.txt", b"words", 4, "not a whole number"),
        ("vocab.txt", BOMB, len(BOMB) + 9, "do not stand for"),  # more comes out than is said
        ("vocab.txt", zlib.compress(b"a" * 99), 100, "do not stand for"),
        ("vocab.txt", zlib.compress(b"a" * 99)[:-1], 99, "do not stand for"),
        ("vocab.txt", zlib.compress(b"a" * 99) + b"b", 99, "do not stand for"),
        ("vocab.txt", b"words", 1 << 40, "not a whole number"),
        ("config.json", zlib.compress(b" " * (9 << 20)), 9 << 20, "not a whole number"),
        ("config.json", b"[1]", None, "not a JSON object"),
        ("config.json", b"{1}", None, "not JSON"),
        ("config.json", b"[" * 99_999, None, "not JSON"),
        ("config.json", b"{" + b"," * (1 << 20) + b"}", None, "over 1048576 values"),
        ("tokenizer_config.json", b'{"a":[{"auto\\u005fmap":1}]}', None, "'auto_map'"),
        ("config.json", b'{"text_config":{"auto_map":{}}}', None, "'auto_map'"),
        ("generation_config.json", b'{"custom_generate":"a/b"}', None, "'custom_generate'"),
    ],
)
def test_a_file_is_refused_even_with_a_valid_checksum(
    saved: Path, name: str, stored: bytes, size: int | None, word: str
) -> None:
    forged_file(saved, name, stored, entry(stored, size))
    refusal(CorruptPack, lambda: SkillPack.load(saved), str(saved), word)


@pytest.mark.parametrize("said", [None, [1, 1], [1, 1, 1], [1.0, 1, ""], [1, -1, ""], {}, "x"])
def test_a_file_is_given_by_two_sizes_and_a_checksum(saved: Path, said: Any) -> None:
    forged_file(saved, "vocab.txt", b"x", said)
    refusal(CorruptPack, lambda: SkillPack.load(saved), str(saved), "vocab.txt")


def test_all_files_together_are_bounded(saved: Path) -> None:
    stored = zlib.compress(bytes(files.MOST), 9)
    about, parts = read_about(saved), read_parts(saved)
    for name in ("vocab.txt", "merges.txt", "vocab.json"):
        parts[f"files:{name}"] = torch.tensor(list(stored), dtype=torch.uint8)
        about["files"][name] = entry(stored, files.MOST)
    forge(saved, about, parts)
    refusal(CorruptPack, lambda: SkillPack.load(saved), "bytes of all files")
    about["files"] = {f"additional_chat_templates/{n}.jinja": entry(b"") for n in range(65)}
    forge(saved, about, {})
    refusal(CorruptPack, lambda: SkillPack.load(saved), "files: 65")


def test_a_file_with_damage_is_named(saved: Path) -> None:
    some_pack(files=FILES).save(saved)
    blob = saved.read_bytes()
    *_, start, end = places(saved)["files:chat_template.jinja"]
    for at in range(start, end):
        saved.write_bytes(blob[:at] + bytes([blob[at] ^ 1]) + blob[at + 1 :])
        refusal(CorruptPack, lambda: SkillPack.load(saved), "'chat_template.jinja'", "checksum")


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [("run.py", b"x", "run.py"), ("config.json", b'{"auto_map":{}}', "auto_map")],
)
def test_what_would_be_refused_is_not_saved(
    tmp_path: Path, name: str, content: bytes, word: str
) -> None:
    pack = some_pack(files={name: PackedFile.of(content)})
    refusal(CorruptPack, lambda: pack.save(tmp_path / "x"), word)
    assert not list(tmp_path.iterdir())


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


@pytest.mark.parametrize("base", ["", "0" * 31, "F" * 32, "the base"])
def test_a_base_without_a_fingerprint_is_not_saved(tmp_path: Path, base: str) -> None:
    refusal(SkillPackError, lambda: some_pack(base=base).save(tmp_path / "x"), "fingerprint")
    assert not list(tmp_path.iterdir())


def test_parts_that_do_not_fit_are_not_saved(tmp_path: Path) -> None:
    pack = some_pack()
    pack.tensors["e.weight"].parts["signs"] = torch.zeros(7, dtype=torch.uint8)
    refusal(CorruptPack, lambda: pack.save(tmp_path / "x"), "'e.weight'")
    refusal(CorruptPack, lambda: pack.delta("e.weight"), "'e.weight'")


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
    refusal(ShapeMismatch, lambda: SkillPack.load(saved, shapes=shapes), "'e.weight'", "has none")


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
        (["version"], 4, UnsupportedVersion),
        (["version"], True, CorruptPack),
        (["version"], 1.0, CorruptPack),
        (["base"], BASE, CorruptPack),  # which is not told in the text
        (["task"], None, CorruptPack),
        (["options"], [], CorruptPack),
        (["versions"], {"torch": 2}, CorruptPack),
        (["more"], 1, CorruptPack),
        (["tensors"], [], CorruptPack),
        (["tensors", "a.weight"], ["dense", [6, 8]], CorruptPack),
        (["tensors", "a.weight"], ["dense", [6, 8], {"dtype": "F32"}, ""], CorruptPack),
        (["tensors", "a.weight", 0], "zip", UnknownCodec),
        (["tensors", "a.weight", 0], "dense", CorruptPack),
        (["tensors", "a.weight", 1], [1 << 30, 1 << 30], CorruptPack),
        (["tensors", "a.weight", 1], [[6], 8], CorruptPack),
        (["tensors", "a.weight", 1], [2, 2], CorruptPack),
        (["tensors", "a.weight", 2, "kept"], 5, CorruptPack),
        (["tensors", "norm.weight", 1], [1 << 47], CorruptPack),
        (["tensors", "c.weight", 2, "bits"], 4, CorruptPack),
        (["tensors", "e.weight", 2, "x"], 4, CorruptPack),
        (["added"], ["a.weight", "nobody"], CorruptPack),
        (["added"], ["a.weight", "a.weight"], CorruptPack),
        (["added"], ["b.weight", "a.weight"], CorruptPack),  # not in order
        (["added"], [["a.weight"]], CorruptPack),
        (["added"], "a.weight", CorruptPack),
        (["grown"], {"nobody": [5, 8]}, CorruptPack),
        (["grown"], {"a.weight": 5}, CorruptPack),
        (["grown"], {"a.weight": [5]}, CorruptPack),
        (["grown"], {"a.weight": [5, 8, 1]}, CorruptPack),
        (["grown"], {"a.weight": [6, 8]}, CorruptPack),  # it has not grown
        (["grown"], {"a.weight": [6, 9]}, CorruptPack),
        (["grown"], {"a.weight": [-1, 8]}, CorruptPack),
        (["grown"], {"a.weight": [5.0, 8]}, CorruptPack),
        (["grown"], {"a.weight": [1 << 48, 8]}, CorruptPack),
        (["grown"], {"b.weight": [5, 8], "a.weight": [5, 8]}, CorruptPack),  # not in order
    ],
)
def test_a_header_is_refused_even_with_a_valid_digest(
    saved: Path, where: list[Any], value: Any, kind: type[SkillPackError]
) -> None:
    forge(saved, edit(read_about(saved), where, value), read_parts(saved))
    refusal(kind, lambda: SkillPack.load(saved), str(saved))


def test_a_tensor_is_added_or_grown_not_both(saved: Path) -> None:
    about = edit(edit(read_about(saved), ["added"], ["a.weight"]), ["grown"], {"a.weight": [5, 8]})
    forge(saved, about, read_parts(saved))
    refusal(CorruptPack, lambda: SkillPack.load(saved), "twice")


def test_one_pack_has_one_file(saved: Path) -> None:
    about, parts = read_about(saved), read_parts(saved)
    turned = edit(about, ["tensors"], dict(reversed(about["tensors"].items())))
    forge(saved, turned, parts)
    refusal(CorruptPack, lambda: SkillPack.load(saved), "header")
    forge(saved, {"version": 3, "method": "graft", **about}, parts)
    refusal(CorruptPack, lambda: SkillPack.load(saved), "header")


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


@pytest.mark.parametrize(
    "key", sorted(f"{n}:{p}" for n, e in some_tensors().items() for p in e.parts)
)
def test_the_tensor_whose_bytes_are_damaged_is_named(saved: Path, key: str) -> None:
    blob = saved.read_bytes()
    *_, start, end = places(saved)[key]
    assert end - start == len(raw(some_tensors()[key.split(":")[0]].parts[key.split(":")[1]]))
    for at in range(start, end):
        saved.write_bytes(blob[:at] + bytes([blob[at] ^ 16]) + blob[at + 1 :])
        refusal(CorruptPack, lambda: SkillPack.load(saved), f"'{key.split(':')[0]}'", "checksum")


def test_a_header_that_claims_terabytes_is_refused_by_the_size_of_its_file(tmp_path: Path) -> None:
    path, shape = tmp_path / "huge", (1 << 23, 1 << 24)
    specs = {"w": ("dense", shape, {"dtype": "F32"})}
    about = {"base": BASE, "task": "", "method": "", "options": {}, "versions": {}, "files": {}}
    text = header.text_of(header.describe(about | {"added": [], "grown": {}}, specs))
    payload, stored = header.payload_bytes(header.table_of(specs)), header.packed(text)
    path.write_bytes(header.head(payload, len(stored), header.digests_bytes(1)) + bytes(1000))
    refusal(TruncatedPack, lambda: SkillPack.load(path), str(path))
    tail = stored + header.digests(text, stored, bytes(8), BASE)
    path.write_bytes(header.head(1000, len(stored), header.digests_bytes(1)) + bytes(1000) + tail)
    refusal(CorruptPack, lambda: SkillPack.load(path), str(path))


@pytest.mark.parametrize("length", [0, 29, 513, 1 << 40, (1 << 64) - 1])
def test_a_mad_header_length_is_refused(saved: Path, length: int) -> None:
    saved.write_bytes(length.to_bytes(8, "little") + saved.read_bytes()[8:])
    refusal(CorruptPack, lambda: SkillPack.load(saved), str(length))


def test_json_made_to_break_parsers_is_refused(saved: Path) -> None:
    many = "[" + "1," * (5 << 20) + "1]"
    whole = '{"version":' + "9" * 10_000 + "}"
    for text in ("[" * 100_000, whole, '{"version":1e999}', "{NaN}", many):
        for stored in (zlib.compress(text.encode(), 9), text.encode()):
            head = header.head(0, len(stored), header.digests_bytes(0))
            saved.write_bytes(head + stored + header.digests(text, stored, b"", BASE))
            refusal(CorruptPack, lambda: SkillPack.load(saved), str(saved))


def test_a_text_that_would_fill_the_memory_is_refused(saved: Path) -> None:
    stored = zlib.compress(bytes(1 << 30), 9)
    saved.write_bytes(header.head(0, len(stored), header.digests_bytes(0)) + stored + bytes(40))
    refusal(CorruptPack, lambda: SkillPack.load(saved), str(saved))


def test_a_bit_that_zlib_passes_over_is_not_changed_unseen(tmp_path: Path) -> None:
    """Between the end of the last block and the checksum of the stream, where the block does not end with a byte."""
    path, passed = tmp_path / "x", 0
    for size in range(4):
        some_pack(options={"x": "y" * size}).save(path)
        blob = path.read_bytes()
        _, text, digests = header.sizes_of(path, blob[: 8 + int.from_bytes(blob[:8], "little")])
        end = len(blob) - digests
        stored = blob[end - text : end]
        for bit in range(8):
            bad = bytearray(stored)
            bad[-5] ^= 1 << bit
            path.write_bytes(blob[: end - text] + bad + blob[end:])
            refusal(CorruptPack, lambda: SkillPack.load(path), str(path))
            with contextlib.suppress(zlib.error):
                passed += zlib.decompress(bad) == zlib.decompress(stored)
    assert passed


def test_a_file_of_an_earlier_format_is_told_as_such(saved: Path) -> None:
    """Those had all that they said in the header."""
    said = header.MAGIC + b'{\\"version\\":2}' + b" " * 999
    saved.write_bytes((999).to_bytes(8, "little") + said)
    refusal(UnsupportedVersion, lambda: SkillPack.load(saved), str(saved), "use the release")
