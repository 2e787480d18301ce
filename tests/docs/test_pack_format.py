"""docs/pack-format.md: its example to the byte, and a reader written from it against the engine."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import re
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from cl_graft import SkillPack, SkillPackError
from cl_graft.skillpack import codecs
from cl_graft.skillpack.codecs import Encoded
from cl_graft.skillpack.codecs.quant import BITS, Quantized
from cl_graft.skillpack.format import file as engine
from cl_graft.skillpack.format import header
from cl_graft.skillpack.format.files import PackedFile
from tests.docs.reader import Refused, fingerprint, read, told, unpacked
from tests.skillpack.tensors import grid, normal

PAGE = Path(__file__).parents[2] / "docs" / "pack-format.md"
BASE = bytes(range(16)).hex()
SUMS = (
    "low_rank",
    "coded_table",
    "quantized_low_rank",
    "quantized_product",
    "sign_low_rank",
    "sparse_low_rank",
    "dct_patches",
)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def block(mark: str) -> str:
    """The fenced block that follows a mark of the page."""
    found = re.search(rf"<!-- {mark} -->\n```\w*\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    assert found, mark
    return found[1]


def pack_of(tensors: dict[str, Encoded], **fields: Any) -> SkillPack:
    about = {"task": "t", "method": "m", "options": {}, "base": BASE, "versions": {}}
    return SkillPack(tensors, **(about | fields))


def example() -> SkillPack:
    """The pack that the page describes in words."""
    x = torch.zeros(4, 8)
    x[0, 1], x[1, 1] = 1.5, -2.0
    weight = Quantized(
        codes=torch.tensor([[7, 0, 5], [1, 2, 4]], dtype=torch.uint8),
        scale=torch.tensor([[0.5, 1.0], [2.0, 0.25]], dtype=torch.float16),
        zero=torch.tensor([[3, 0], [1, 4]], dtype=torch.uint8),
        bits=3,
        group_size=2,
        exponent=-4,
    )
    tensors = {"bias": codecs.sparse(x, x != 0), "weight": codecs.quantized(weight)}
    files = {"chat_template.jinja": PackedFile.of(b"{{ messages }}\n")}
    return pack_of(tensors, task="math", method="by hand", options={"rate": 0.5}, files=files)


def dump(data: bytes) -> str:
    rows = (data[i : i + 16] for i in range(0, len(data), 16))
    return "".join(f"{16 * i:04x}  {row.hex(' ')}\n" for i, row in enumerate(rows))


def described() -> dict[str, Any]:
    return {
        "bias": [(0, 1, 1.5), (1, 1, -2.0)],
        "weight": [[0.125, -0.09375, 0.3125], [0.0, 0.125, 0.0]],
    }


def bytes_of_the_page() -> bytes:
    lines = block("pack bytes").splitlines()
    return bytes.fromhex("".join(line.partition("  ")[2] for line in lines))


def test_the_example_is_what_the_engine_writes(tmp_path: Path) -> None:
    """But for how zlib puts the text, of which there are several."""
    example().save(tmp_path / "pack")
    found, wanted = (tmp_path / "pack").read_bytes(), bytes_of_the_page()
    (text, sums, start, end), page = told(found), told(wanted)
    assert (text, sums[-32:]) == (page[0], page[1][-32:]) and found[start:end] == wanted[
        slice(*page[2:])
    ]
    assert dump(wanted) == block("pack bytes")


def test_the_examples_bytes_are_read_as_the_page_says(tmp_path: Path) -> None:
    (tmp_path / "pack").write_bytes(bytes_of_the_page())
    text, deltas = read(tmp_path / "pack")
    assert (text.pop("base"), text.pop("digest")) == (BASE, example().digest)
    compact = json.dumps(text, separators=(",", ":"), ensure_ascii=False)
    assert compact == block("pack text").strip()
    assert deltas["weight"].tolist() == described()["weight"]
    kept = [(i, j, float(deltas["bias"][i, j])) for i, j in np.argwhere(deltas["bias"])]
    assert kept == described()["bias"] and deltas["bias"].shape == (4, 8)
    assert set(SkillPack.load(tmp_path / "pack", base=BASE).decode()) == {"bias", "weight"}


def codes(shape: tuple[int, int], top: int) -> torch.Tensor:
    """Rows of very different size, some of zeros, the largest of magnitude `top`."""
    sizes = torch.logspace(-2, 0, shape[0])[:, None]
    found = (normal(shape, top) * sizes * top / 2).round().clamp(-top, top)
    found[-1, 0] = -top
    return found.to(torch.int16)


def every_codec() -> dict[str, Encoded]:
    """Each codec in each of its forms, with shapes that fill no byte or group, and none at all."""
    found: dict[str, Encoded] = {}
    for dtype in FLOATS:
        kind = str(dtype).removeprefix("torch.")
        found[f"dense {kind}"] = codecs.dense(normal((3, 5), 1), dtype)
        found[f"low_rank {kind}"] = codecs.low_rank(normal((7, 2), 2), normal((2, 5), 3), dtype)
        found[f"sparse {kind}"] = codecs.sparse_top(normal((9, 11), 4), 30, dtype)
    for dtype in (*FLOATS, torch.float64, torch.int64, torch.int32, torch.uint8):
        kind = str(dtype).removeprefix("torch.")
        found[f"exact {kind}"] = codecs.exact((normal((3, 5), 1) * 1e4).abs().to(dtype))
    found["exact beyond F32"] = codecs.exact(torch.tensor([2**24 + 1, 2**24 + 3, -(2**63)]))
    found["exact scalar"] = codecs.exact(torch.tensor(1 / 3, dtype=torch.float64))
    found["dense scalar"] = codecs.dense(torch.tensor(0.5))
    found["dense empty"] = codecs.dense(torch.zeros(0, 3))
    found["low_rank none"] = codecs.low_rank(torch.zeros(4, 0), torch.zeros(0, 3))
    found["low_rank_stack"] = codecs.low_rank_stack(normal((3, 5, 2), 9), normal((3, 2, 4), 10))
    found["low_rank_stack none"] = codecs.low_rank_stack(torch.zeros(2, 4, 0), torch.zeros(2, 0, 3))
    found["sparse gaps"] = codecs.sparse_top(normal((300, 41), 5), 60)
    found["sparse wide gaps"] = codecs.sparse_top(normal((1 << 20,), 5), 3)
    found["sparse none"] = codecs.sparse_top(normal((6, 6), 6), 0)
    found["mask"] = codecs.mask(normal((3, 5, 7), 8) > 0)
    found["mask scalar"] = codecs.mask(torch.tensor(True))
    found["sign_scale"] = codecs.sign_scale(normal((3, 5, 7), 7))
    for bits in BITS:
        found[f"quantized {bits}"] = codecs.quantized(grid(5, 13, bits, 4, bits))
    pairs = [
        (grid(2, 9, 8, 4, 1), grid(2, 7, 8, 3, 2)),
        (grid(3, 9, 3, 128, 3), grid(3, 7, 3, 2, 4)),
    ]
    found["quantized_low_rank"] = codecs.quantized_low_rank(pairs, (9, 7))
    for layout in get_args(codecs.CodeLayout):
        for top in (1, 100, 8191):
            rows = codes((5, 13), top), codes((5, 9), top)
            scales = normal((5,), 11)
            kind = f"coded_low_rank {layout} {top}"
            found[kind] = codecs.coded_low_rank(*rows, scales, (13, 9), layout)
            shifts = codes((1, 13), 30)[0], codes((1, 9), 30)[0]
            own = torch.arange(0, 13, 3), codes((5, 9), top) | 1
            found[f"coded_table {layout} {top}"] = codecs.coded_table(
                *rows, normal((6,), 15), shifts, own, layout
            )
            found[f"coded {layout} {top}"] = codecs.coded(
                codes((40, 7), top), normal((40,), 12), (40, 7), layout, columns=normal((7,), 13)
            )
        empty = torch.zeros(0, 4, dtype=torch.int16)
        found[f"coded_low_rank {layout} none"] = codecs.coded_low_rank(
            empty, empty, torch.zeros(0), (4, 4), layout
        )
        still = torch.zeros(300, dtype=torch.int16), torch.zeros(4, dtype=torch.int16)
        none = torch.zeros(0, 300, dtype=torch.int16), empty, torch.zeros(1), still
        own = torch.tensor([7, 250]), codes((2, 4), 9)
        found[f"coded_table {layout} gaps"] = codecs.coded_table(*none, own, layout)
        own = torch.zeros(0, dtype=torch.int64), empty
        found[f"coded_table {layout} none"] = codecs.coded_table(*none, own, layout)
        matrix = codecs.coded_low_rank(
            codes((3, 5), 90), codes((3, 9), 90), normal((3,), 14), (5, 9)
        )
        found[f"coded_low_rank_stack {layout}"] = codecs.coded_low_rank_stack(
            [matrix, None, matrix], (3, 5, 9), layout
        )
        found[f"coded {layout} vector"] = codecs.coded(
            codes((1, 9), 50), torch.tensor([0.25]), (9,), layout
        )
    found["quantized_low_rank none"] = codecs.quantized_low_rank([], (9, 7))
    pairs = [(grid(9, 2, 8, 4, 1), pairs[0][1]), (grid(9, 3, 3, 2, 3), pairs[1][1])]
    found["quantized_product"] = codecs.quantized_product(pairs, (9, 7))
    found["quantized_product none"] = codecs.quantized_product([], (9, 7))
    x = normal((9, 13), 11)
    for axis in (0, 1):
        found[f"sign_scales {axis}"] = codecs.sign_scales(x, axis)
    for bits in (1, 5, 8):
        entries = torch.randint(0, 2**bits, x.shape, dtype=torch.uint8)
        levels = normal((2**bits,), bits)
        found[f"sparse_codebook {bits}"] = codecs.sparse_codebook(entries, x > 0.01, levels)
    found["sparse_codebook gaps"] = codecs.sparse_codebook(entries, x > 0.02, levels)
    for dtype, rate in zip(FLOATS, (1 << 41, 1 << 46, 1 << 48), strict=True):
        found[f"seeded_sparse {rate}"] = codecs.seeded_sparse(x, 2**48 - rate // 7, rate, dtype)
    thin = normal((3, 9), 12) * (normal((3, 9), 12) > 0), normal((3, 13), 13)
    found["sparse_low_rank"] = codecs.sparse_low_rank(*thin)
    found["sparse_low_rank gaps"] = codecs.sparse_low_rank(torch.eye(3, 300), torch.eye(3, 250))
    high = grid(2, 9, 2, 4, 1), grid(2, 13, 2, 5, 2)
    found["sign_low_rank"] = codecs.sign_low_rank(high, thin, 4)
    none = tuple(normal((0, n), 0) for n in (9, 13))
    found["sign_low_rank none"] = codecs.sign_low_rank(high, none, 128)
    found["dct_patches"] = codecs.dct_patches(x, 4, [4, 2, 1, 0], [1, 3, 4, 4])
    found["dct_patches one"] = codecs.dct_patches(x, 16, [8], [1])
    return found


def against_a_base() -> dict[str, tuple[Encoded, Tensor | None]]:
    """Tensors that are kept themselves, each with the base's: no delta is to be had of them."""
    found: dict[str, tuple[Encoded, Tensor | None]] = {}
    for dtype, own in itertools.product(FLOATS, FLOATS):
        base = normal((9, 11), 1, own)
        x = (base.float() * (1 + normal((9, 11), 2))).to(dtype)
        found[f"moved {dtype} {own}"] = codecs.lossless(x, base), base
        x[1::2] = base[1::2].to(dtype)
        found[f"some rows {dtype} {own}"] = codecs.lossless(x, base), base
        drawn = torch.randint(-(2**15), 2**15, (300,), generator=torch.Generator().manual_seed(3))
        drawn = drawn.short().view(dtype)
        drawn = drawn[drawn.isfinite()]
        found[f"any bits {dtype} {own}"] = codecs.lossless(drawn, base[0]), base[0]
    found["added"] = codecs.lossless(normal((3, 5), 4), None), None
    found["cut"] = codecs.lossless(normal((3, 11), 4), base), base
    found["scalar"] = codecs.lossless(torch.tensor(0.5), torch.tensor(-0.0)), torch.tensor(-0.0)
    found["empty"] = codecs.lossless(torch.zeros(0, 3), torch.ones(2, 3)), torch.ones(2, 3)
    table, few = normal((4000, 2), 5), normal((4000, 2), 5)
    few[1234] += 1
    found["far rows"] = codecs.lossless(few, table), table
    found["the same"] = codecs.lossless(table, table), table
    long = normal((300_000,), 6, torch.bfloat16)
    found["two blocks"] = codecs.lossless((long.float() + 1e-5).bfloat16(), long), long
    return found


def test_every_codec_is_in_what_is_compared() -> None:
    kept = against_a_base().values()
    found = {e.codec for e in every_codec().values()} | {encoded.codec for encoded, _ in kept}
    assert found == set(codecs.CODECS)
    forms = [encoded.meta.keys() for encoded, _ in kept]
    assert any(e.meta.get("gap", [0])[0] > 8 for e in every_codec().values())
    assert {"dtype", "bytes", "rows"} in forms and {"dtype", "bytes", "rows", "gap"} in forms


def test_the_reader_and_the_engine_restore_the_same_bits(tmp_path: Path) -> None:
    both = against_a_base()
    pack_of({name: encoded for name, (encoded, _) in both.items()}).save(tmp_path / "pack")
    loaded = SkillPack.load(tmp_path / "pack")
    arrays = {name: base.float().numpy() for name, (_, base) in both.items() if base is not None}
    _, found = read(tmp_path / "pack", arrays)
    for name, (_, base) in both.items():
        wanted = loaded.tuned(name, base)
        signed = torch.int32 if wanted.dtype.itemsize == 4 else torch.int16
        assert (
            found[name].tolist() == (wanted.view(signed).numpy().view(found[name].dtype)).tolist()
        )


def test_the_reader_agrees_with_the_engine(tmp_path: Path) -> None:
    options = {'Ü\n\x01"\\': [1.0, 1e-05, 1.5e16, -0.0, 0.1, True, None, {"": []}]}
    tensors = every_codec()
    grown = {"dense float32": [2, 5]}
    contents = {"merges.txt": b"", "tokenizer.json": b"[1, 2" * 99, "config.json": b'{"a": []}'}
    contents["additional_chat_templates/rag.jinja"] = "{{ ü }}".encode() * 9
    files = {name: PackedFile.of(content) for name, content in contents.items()}
    about = {"options": options, "added": ["sign_scale"], "grown": grown, "task": "λ"}
    pack = pack_of(tensors, files=files, **about)
    pack.save(tmp_path / "pack")
    text, found = read(tmp_path / "pack")
    loaded = SkillPack.load(tmp_path / "pack")
    wanted = loaded.decode()
    assert text["options"] == options and text["digest"] == loaded.digest
    assert set(found) == set(wanted) == set(tensors)
    assert text["files"].keys() == contents.keys()
    for name, said in text["files"].items():
        assert unpacked(name, *said, files[name].stored) == contents[name]
        assert loaded.files[name].content() == contents[name]
    for name, delta in wanted.items():
        assert found[name].dtype == np.float32 and found[name].shape == tuple(delta.shape)
        if tensors[name].codec in SUMS:
            # a sum is as exact as its largest term
            atol = 1e-6 * float(delta.abs().max())
            np.testing.assert_allclose(found[name], delta.numpy(), rtol=1e-5, atol=atol)
        else:
            np.testing.assert_array_equal(found[name], delta.numpy())


def test_the_fingerprint_is_the_engines() -> None:
    named = {"b.ü": normal((3, 4), 1), "a": normal((5,), 2), "b": torch.tensor(-0.0)}
    arrays = {name: tensor.numpy() for name, tensor in named.items()}
    halves = {name: tensor.bfloat16() for name, tensor in named.items()}
    assert fingerprint(arrays) == engine.fingerprint(named.items())
    widened = {name: tensor.float().numpy() for name, tensor in halves.items()}
    assert fingerprint(widened) == engine.fingerprint(halves.items())


@pytest.mark.parametrize("seed", range(60))
def test_both_refuse_a_byte_that_was_changed(tmp_path: Path, seed: int) -> None:
    example().save(tmp_path / "pack")
    data, rng = bytearray((tmp_path / "pack").read_bytes()), random.Random(seed)
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    (tmp_path / "pack").write_bytes(data)
    with pytest.raises(SkillPackError):
        SkillPack.load(tmp_path / "pack")
    with pytest.raises(Refused):
        read(tmp_path / "pack")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("run.py", b"x", [1, 1]),
        ("vocab.txt", b"words", [9, 5]),
        ("vocab.txt", b"words", [4, 5]),
        ("vocab.txt", b"words", [65 << 20, 5]),
        ("config.json", b"[]", [2, 2]),
        ("config.json", b'{"a":{"auto_map":1}}', [20, 20]),
        ("tokenizer_config.json", b"{,,}", [4, 4]),
    ],
)
def test_both_refuse_a_file_that_no_pack_may_hold(
    tmp_path: Path, name: str, content: bytes, said: list[int]
) -> None:
    """Of a maker who computes every checksum."""
    spec = header.FileSpec(*said, hashlib.blake2b(content, digest_size=8).hexdigest())
    about = {"task": "t", "method": "m", "options": {}, "base": BASE, "versions": {}}
    text = header.text_of(
        header.describe(about | {"added": [], "grown": {}, "files": {name: spec}}, {})
    )
    stored = header.packed(text)
    head = header.head(len(content), len(stored), header.digests_bytes(0))
    (tmp_path / "pack").write_bytes(
        head + content + stored + header.digests(text, stored, b"", BASE)
    )
    with pytest.raises(SkillPackError):
        SkillPack.load(tmp_path / "pack")
    with pytest.raises(Refused):
        read(tmp_path / "pack")
