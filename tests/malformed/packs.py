"""Small valid packs of every codec, drawn by a seed, and what is in them once they are taken apart."""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cl_graft.skillpack import codecs
from cl_graft.skillpack.codecs import Encoded
from cl_graft.skillpack.codecs.coded_low_rank import SHIFTED
from cl_graft.skillpack.codecs.coded_rows import LAYOUTS
from cl_graft.skillpack.codecs.encoded import STORABLE
from cl_graft.skillpack.codecs.quant import BITS, Quantized, round_to_nearest
from cl_graft.skillpack.codecs.seeded_sparse import LEAST, WHOLE
from cl_graft.skillpack.format import header
from cl_graft.skillpack.format.file import SkillPack
from cl_graft.skillpack.format.files import PackedFile

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
FILES = {
    "chat_template.jinja": b"{{ messages }}" * 9,
    "additional_chat_templates/a-b.jinja": b"{{ tools }}",
    "config.json": b'{"eos_token_id":[1,2],"rope_parameters":{"rope_theta":1e4,"auto":null}}',
    "tokenizer.model": bytes(range(256)),
    "merges.txt": b"",
}
NAMES = ["a.weight", "b.bias", "model.layers.0.mlp.up_proj.weight", '\N{SNOWMAN} "\\\n.weight', ""]


def scratch() -> tempfile.TemporaryDirectory[str]:
    """A folder in memory, where the system has such a place."""
    memory = Path("/dev/shm")
    return tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None)


def table_of(pack: SkillPack) -> list[header.TableEntry]:
    specs = {name: encoded.spec for name, encoded in pack.tensors.items()}
    return header.table_of(specs, {name: file.spec for name, file in pack.files.items()})


@dataclass
class Donor:
    """A valid file, taken apart. shapes: of the base that it goes with; bases: tensors of it that decoding needs."""

    pack: SkillPack
    bases: Mapping[str, Tensor] = field(default_factory=dict)
    blob: bytes = field(init=False)
    shapes: dict[str, tuple[int, ...]] = field(init=False)
    parts: dict[tuple[str | None, str], bytes] = field(init=False)

    def __post_init__(self) -> None:
        with scratch() as folder:
            self.pack.save(Path(folder) / "x")
            self.blob = (Path(folder) / "x").read_bytes()
        self.shapes = {n: e.shape for n, e in self.pack.tensors.items() if n not in self.pack.added}
        self.shapes |= {name: tuple(shape) for name, shape in self.pack.grown.items()}
        table = table_of(self.pack)
        self.parts = {(row.tensor, row.part): self.payload[row.start : row.end] for row in table}

    @property
    def start(self) -> int:
        """Where its payload begins."""
        return 8 + int.from_bytes(self.blob[:8], "little")

    @property
    def edges(self) -> tuple[int, int, int]:
        """Where its payload, its text and its digests end."""
        payload, text, digests = header.sizes_of(Path("x"), self.blob[: self.start])
        return self.start + payload, self.start + payload + text, len(self.blob)

    @property
    def payload(self) -> bytes:
        return self.blob[self.start : self.edges[0]]

    @property
    def text(self) -> str:
        return header.unpacked(Path("x"), self.blob[slice(*self.edges[:2])])

    @property
    def digests(self) -> bytes:
        return self.blob[self.edges[1] :]

    @property
    def about(self) -> dict[str, Any]:
        return json.loads(self.text)

    def base(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The base's tensor of this name; zeros where it has another shape there."""
        found = self.bases.get(name)
        return torch.zeros(shape) if found is None or tuple(found.shape) != shape else found


@dataclass
class Draw:
    """What a valid tensor is drawn from: choices, and numbers of a normal distribution."""

    rng: random.Random
    noise: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.noise = torch.Generator().manual_seed(self.rng.getrandbits(32))

    def size(self, least: int = 0) -> int:
        return max(least, self.rng.choice([0, 1, 2, 3, 4, 5, 7, 8, 9, 12, 17]))

    def shape(self) -> tuple[int, ...]:
        return tuple(self.size() for _ in range(self.rng.choice([0, 1, 1, 2, 2, 2, 3])))

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.noise)

    def codes(self, rows: int, cols: int) -> Tensor:
        """int16, rows of very different sizes, some of zeros."""
        top = self.rng.choice([1, 1, 3, 7, 40, 127, 500, 8191])
        sizes = 4.0 ** -self.normal(rows, 1).abs() * (self.normal(rows, 1) > -1)
        return (self.normal(rows, cols) * sizes * top / 2).round().clamp(-top, top).short()

    def grid(self, rows: int, cols: int, bits: int | None = None) -> Quantized:
        """A quantised matrix, also of no rows or no columns."""
        bits, size = bits or self.rng.choice(BITS), self.rng.choice([1, 2, 3, 4, 64])
        if rows and cols:
            return round_to_nearest(self.normal(rows, cols), bits, size)
        empty = torch.zeros(rows, -(-cols // size))
        codes = torch.zeros(rows, cols, dtype=torch.uint8)
        return Quantized(codes, empty.half(), empty.byte(), bits, size)

    def pairs(self, count: int, rows: int, cols: int, product: bool) -> list[Any]:
        found = []
        for _ in range(count):
            rank, bits = self.size(), self.rng.choice(BITS)
            left = self.grid(rows, rank, bits) if product else self.grid(rank, rows, bits)
            found.append((left, self.grid(rank, cols, bits)))
        return found


def _sparse(d: Draw) -> Encoded:
    x = d.normal(*d.shape())
    if d.rng.random() < 0.3:  # so few that gaps are shorter than a bitmap
        x = d.normal(40, 30)
        return codecs.sparse_top(x, d.rng.randint(0, 5), d.rng.choice(FLOATS))
    return codecs.sparse_top(x, d.rng.randint(0, x.numel()), d.rng.choice(FLOATS))


def _exact(d: Draw) -> Encoded:
    x = 100 * d.normal(*d.shape())
    dtype = d.rng.choice(list(STORABLE.values()))
    return codecs.exact(x.abs().to(dtype) if dtype == torch.uint8 else x.to(dtype))


def _low_rank(d: Draw) -> Encoded:
    rows, rank, cols = d.size(), d.size(), d.size()
    return codecs.low_rank(d.normal(rows, rank), d.normal(rank, cols), d.rng.choice(FLOATS))


def _low_rank_stack(d: Draw) -> Encoded:
    stack, rows, rank, cols = d.size(), d.size(), d.size(), d.size()
    left, right = d.normal(stack, rows, rank), d.normal(stack, rank, cols)
    return codecs.low_rank_stack(left, right, d.rng.choice(FLOATS))


def _coded_low_rank(d: Draw) -> Encoded:
    rows, cols = d.size(), d.size()
    rank = d.rng.randint(0, min(rows, cols))
    shifts = [
        None if d.rng.random() < 0.5 else (4 * d.normal(n)).round().clamp(-SHIFTED, SHIFTED).short()
        for n in (rows, cols)
    ]
    codes = d.codes(rank, rows), d.codes(rank, cols)
    layout = d.rng.choice(LAYOUTS)
    return codecs.coded_low_rank(
        *codes, d.normal(rank), (rows, cols), layout, (shifts[0], shifts[1])
    )


def _coded_low_rank_stack(d: Draw) -> Encoded:
    stack, rows, cols = d.rng.choice([1, 2, 3]), d.size(), d.size()
    matrices: list[Encoded | None] = []
    for _ in range(stack):
        rank = d.rng.randint(0, min(rows, cols))
        codes = d.codes(rank, rows), d.codes(rank, cols)
        shifts = [(4 * d.normal(n)).round().clamp(-SHIFTED, SHIFTED).short() for n in (rows, cols)]
        made = codecs.coded_low_rank(*codes, d.normal(rank), (rows, cols), "fast", tuple(shifts))
        matrices.append(made if d.rng.random() < 0.8 else None)
    return codecs.coded_low_rank_stack(matrices, (stack, rows, cols), d.rng.choice(LAYOUTS))


def _coded(d: Draw) -> Encoded:
    shape = d.shape()
    rows = shape[0] if len(shape) > 1 else 1
    n = torch.Size(shape[1:] if len(shape) > 1 else shape).numel()
    codes = d.codes(rows, n)
    if d.rng.random() < 0.4:  # few rows are left
        codes *= (d.normal(rows, 1) > 1).short()
    columns = d.normal(n).abs() if d.rng.random() < 0.5 else None
    steps = d.normal(rows).abs()
    return codecs.coded(codes, steps, shape, d.rng.choice(LAYOUTS), columns)


def _coded_table(d: Draw) -> Encoded:
    rows, cols = d.size(), d.size()
    rank, share = d.rng.randint(0, min(rows, cols)), d.rng.choice([-9, 0, 2])
    shifts = [(4 * d.normal(n)).round().clamp(-SHIFTED, SHIFTED).short() for n in (rows, cols)]
    own = d.codes(rows, cols) * (d.normal(rows, 1) > share)
    return codecs.coded_table(
        d.codes(rank, rows),
        d.codes(rank, cols),
        d.normal(rank + 1),
        (shifts[0], shifts[1]),
        (torch.arange(rows), own),
        d.rng.choice(LAYOUTS),
    )


def _lossless(d: Draw) -> tuple[Encoded, Tensor | None]:
    """Beside what the base has: the same rows, fewer, more, or nothing."""
    x = 0.1 * d.normal(*d.shape())
    if d.rng.random() < 0.3:
        x = 0.1 * d.normal(40, 3)
    base: Tensor | None = x
    if x.ndim:
        x = x.clone()
        still = d.normal(len(x)) < d.rng.choice([-9, 0, 2])
        moved = x + 2.0 ** d.rng.choice([-20, -9, -3]) * d.normal(*x.shape)
        x = torch.where(still.reshape(-1, *[1] * (x.ndim - 1)), x, moved)
        kind = d.rng.random()
        if kind < 0.2:
            base = None
        elif kind < 0.4:
            assert base is not None
            base = torch.cat([base, base])[: max(1, len(x) + d.rng.choice([-2, 3]))]
    dtype = d.rng.choice(FLOATS)
    if base is not None:
        base = base.to(d.rng.choice(FLOATS))
    return codecs.lossless(x.to(dtype), base), base


def _product(d: Draw, make: Callable[..., Encoded], product: bool) -> Encoded:
    rows, cols = d.size(), d.size()
    return make(d.pairs(d.rng.choice([0, 1, 1, 2, 3]), rows, cols, product), (rows, cols))


def _sign_low_rank(d: Draw) -> Encoded:
    rows, cols = d.size(1), d.size(1)
    low = d.size()
    pair = d.pairs(1, rows, cols, False)[0]
    return codecs.sign_low_rank(
        pair, (d.normal(low, rows), d.normal(low, cols)), d.rng.choice([1, 4, 64])
    )


def _sparse_low_rank(d: Draw) -> Encoded:
    rows, cols = d.size(), d.size()
    rank = d.rng.randint(0, max(rows, cols))
    left, right = d.normal(rank, rows), d.normal(rank, cols)
    least = d.rng.choice([-9.0, 0.0, 1.0])
    return codecs.sparse_low_rank(left * (left > least), right * (right > least))


def _sparse_codebook(d: Draw) -> Encoded:
    shape, bits = d.shape(), d.rng.choice([1, 2, 3, 8])
    codes = (d.normal(*shape).abs() * 2**bits / 3).clamp_max(2**bits - 1).byte()
    mask = d.normal(*shape) > d.rng.choice([-1, 1])
    return codecs.sparse_codebook(codes, mask, d.normal(2**bits))


def _dct_patches(d: Draw) -> Encoded:
    x, patch = d.normal(d.size(), d.size()), d.rng.choice([1, 2, 3, 8])
    count = -(-x.shape[0] // patch) * -(-x.shape[1] // patch)
    first = d.rng.randint(0, count)
    bits = d.rng.choice([[8, 0], [3, 2], [1, 0], [4, 2]])
    return codecs.dct_patches(x, patch, bits, [first, count - first])


def _seeded_sparse(d: Draw) -> Encoded:
    rate = d.rng.choice([LEAST, WHOLE // 8, WHOLE // 2, WHOLE])
    return codecs.seeded_sparse(d.normal(*d.shape()), d.rng.getrandbits(40), rate)


MAKERS: dict[str, Callable[[Draw], Encoded | tuple[Encoded, Tensor | None]]] = {
    "dense": lambda d: codecs.dense(d.normal(*d.shape()), d.rng.choice(FLOATS)),
    "sparse": _sparse,
    "exact": _exact,
    "low_rank": _low_rank,
    "low_rank_stack": _low_rank_stack,
    "quantized": lambda d: codecs.quantized(d.grid(d.size(), d.size())),
    "quantized_low_rank": lambda d: _product(d, codecs.quantized_low_rank, False),
    "quantized_product": lambda d: _product(d, codecs.quantized_product, True),
    "coded_low_rank": _coded_low_rank,
    "coded_low_rank_stack": _coded_low_rank_stack,
    "coded_table": _coded_table,
    "coded": _coded,
    "lossless": _lossless,
    "sparse_low_rank": _sparse_low_rank,
    "sign_low_rank": _sign_low_rank,
    "sign_scale": lambda d: codecs.sign_scale(d.normal(*d.shape())),
    "sign_scales": lambda d: codecs.sign_scales(d.normal(d.size(), d.size()), d.rng.choice([0, 1])),
    "sparse_codebook": _sparse_codebook,
    "seeded_sparse": _seeded_sparse,
    "dct_patches": _dct_patches,
    "mask": lambda d: codecs.mask(d.normal(*d.shape()) > 0),
}
# the codes of the engine's own packs get half of all tensors
OFTEN = ("coded_low_rank", "coded_table", "coded", "lossless")


def tensor(rng: random.Random, codec: str) -> tuple[Encoded, Tensor | None]:
    """A valid tensor of a codec; and the base's, where it was encoded beside one."""
    made = MAKERS[codec](Draw(rng))
    return made if isinstance(made, tuple) else (made, None)


def drawn(rng: random.Random, first: str) -> Donor:
    """A valid pack of one to three tensors, the first of them by this codec: perhaps with files, added and grown ones."""
    tensors: dict[str, Encoded] = {}
    bases: dict[str, Tensor] = {}
    added: list[str] = []
    grown: dict[str, list[int]] = {}
    chosen = [first]
    for _ in range(rng.choice([0, 0, 1, 2])):
        chosen.append(rng.choice(OFTEN) if rng.random() < 0.5 else rng.choice(list(MAKERS)))
    for name, codec in zip(rng.sample(NAMES, len(chosen)), chosen, strict=True):
        encoded, base = tensor(rng, codec)
        tensors[name] = encoded
        pick = rng.random()
        if codec == "lossless":
            if base is None:
                added.append(name)
            elif tuple(base.shape) != encoded.shape:
                grown[name] = list(base.shape)
            if base is not None:
                bases[name] = base
        elif pick < 0.15:
            added.append(name)
        elif pick < 0.3 and encoded.shape:
            grown[name] = [encoded.shape[0] + rng.choice([1, 2]), *encoded.shape[1:]]
    options = rng.choice([{}, {"budget": 0.1, "deep": [[{"\u00e9": None}], True, -1e-7]}])
    files = {n: PackedFile.of(FILES[n]) for n in rng.sample(list(FILES), rng.choice([0, 0, 1, 3]))}
    about = {"added": added, "grown": grown, "files": files}
    return Donor(
        SkillPack(tensors, "math", "graft", options, "01" * 16, {"torch": "2"}, **about), bases
    )


def pool(seed: object, count: int) -> list[Donor]:
    """So many valid packs; every codec comes first in one of them, in turn, if there are enough."""
    order = [*MAKERS, *OFTEN * 3]
    return [drawn(random.Random(f"{seed} pack {n}"), order[n % len(order)]) for n in range(count)]
