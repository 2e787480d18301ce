"""What a codec is, where codecs are registered, and what can be asked of an encoded tensor.

A codec is one file: a class that says all that the library needs to know, and beside it the function
that encodes. The functions below are the only way by which the rest of the library asks; none of
them, and nothing else, knows a codec by its name. Each raises UnknownCodec for a name that is not
registered.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from reprlib import repr as short
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from cl_graft.skillpack.codecs.coded_rows import CodeLayout
from cl_graft.skillpack.codecs.encoded import (
    STORABLE,
    Encoded,
    Layout,
    Meta,
    check_shape,
    part_bytes,
)
from cl_graft.skillpack.codecs.errors import NoDelta, SkillPackError, UnknownCodec


class Codec(ABC):
    """One way to store a tensor. The layout follows from shape and meta alone, so that sizes are
    known before the data are, and a reader can refuse a file before it allocates anything.

    All methods but `layout` are given what has passed it (and `decode`, `rows` what has passed
    `check`): they need not look again.
    """

    name: ClassVar[str]

    @abstractmethod
    def layout(self, shape: tuple[int, ...], meta: Meta) -> Layout:
        """{part: (dtype, shape)}, in the order of the checksum; ValueError on a meta that is nonsense.

        shape: any that a tensor may have. Every whole number of the meta must be bounded here.
        """

    def check(self, encoded: Encoded) -> None:
        """Raise ValueError for parts that fit the layout and yet stand for nothing."""
        return

    @abstractmethod
    def decode(self, encoded: Encoded) -> Tensor:
        """The tensor, float32, of `encoded.shape`, on the CPU, in memory of its own."""

    @abstractmethod
    def weight_bits(self, shape: tuple[int, ...], meta: Meta) -> int:
        """Bits of the weights that are kept, values of any float dtype at 16: no masks, positions,
        scales, zeros or headers (the convention of the GraftLLM paper's comparison)."""

    def least_bits(self, shape: tuple[int, ...], meta: Meta) -> float:
        """Bits that the content takes in theory, without padding; by default those of the parts."""
        return 8 * _bytes(self.layout(shape, meta))

    def rows(self, encoded: Encoded, ids: Tensor) -> Tensor:
        """`decode(encoded)[ids]`, bit for bit; ids: int64 (n,). Worth its own code where that is quicker."""
        return self.decode(encoded)[ids]


class Factored(Codec):
    """A codec of matrices that are left @ right: it is multiplied by, or added, without the matrix."""

    @abstractmethod
    def rank(self, meta: Meta) -> int:
        """Columns of left, rows of right."""

    @abstractmethod
    def write_factors(self, encoded: Encoded, left: Tensor, right: Tensor) -> None:
        """Fill left (rows, rank) and right (rank, cols), of any float dtype and any strides.

        Every entry is computed in float32 and rounded once. The parts have passed the layout but not `check`:
        ValueError on what `check` would refuse.
        """


class Scattered(Codec):
    """A codec of tensors that are zero but at stored positions: it is added there alone."""

    @abstractmethod
    def entries(self, encoded: Encoded) -> tuple[Tensor, Tensor]:
        """(positions int64 (kept,), strictly increasing, row-major; values (kept,), any float dtype).

        The parts have passed the layout but not `check`: ValueError on what `check` would refuse.
        """


class Relaid(Codec):
    """A codec that stores the same numbers in more than one layout."""

    @abstractmethod
    def relaid(self, encoded: Encoded, layout: CodeLayout) -> Encoded:
        """Lay a tensor out so, bit for bit the same."""

    @abstractmethod
    def codes(self, encoded: Encoded) -> list[Tensor]:
        """The whole numbers, int16 matrices, whose rows have the classes or widths `kinds` in the parts."""


class Relative(Codec):
    """A codec of tensors as they are after tuning, bit for bit, beside the base's: without that there is nothing to
    decode, and with it there is no delta, but the tensor itself."""

    @abstractmethod
    def dtype(self, meta: Meta) -> torch.dtype:
        """Dtype of what `restore` gives."""

    @abstractmethod
    def restore(self, encoded: Encoded, base: Tensor | None) -> Tensor:
        """The tensor, on the CPU, in memory of its own; base: as of `restore` below.

        ValueError where the parts, which have passed `check`, do not go with it.
        """

    def decode(self, encoded: Encoded) -> Tensor:
        """Raise NoDelta."""
        raise NoDelta(
            f"codec {self.name} keeps tuned weights bit for bit and no delta that could be added; put the pack, "
            "alone, on its base by Grafted or by `cl-graft pack apply`."
        )


CODECS: dict[str, Codec] = {}
C = TypeVar("C", bound=type[Codec])


def register(codec: C) -> C:
    """Make a codec known under its name: a decorator of its class.

    A class that is defined a second time, as when its file is imported anew, takes its own place.
    Raises SkillPackError where another class has the name.
    """
    mine = codec()
    other = type(CODECS.get(mine.name, mine))
    if (other.__module__, other.__qualname__) != (codec.__module__, codec.__qualname__):
        raise SkillPackError(
            f"codec {mine.name!r} is defined in {codec.__module__} and in {other.__module__}; "
            "give one of them another name."
        )
    CODECS[mine.name] = mine
    return codec


def codec_named(name: str) -> Codec:
    """The codec of this name. Raises UnknownCodec."""
    if name not in CODECS:
        raise UnknownCodec(
            f"there is no codec named {short(name)} (known: {', '.join(sorted(CODECS))}); "
            "import the module that defines it, or use the release that wrote it."
        )
    return CODECS[name]


def layout(codec: str, shape: tuple[int, ...], meta: Meta) -> Layout:
    """{part: (dtype, shape)}, exactly the parts that must be there; ValueError on nonsense."""
    known = codec_named(codec)
    check_shape(shape)
    parts = known.layout(shape, meta)
    for part, (dtype, _) in parts.items():
        if dtype not in STORABLE.values():
            raise ValueError(
                f"codec {codec} lays out part {part} in {dtype}: a file has {', '.join(STORABLE)}."
            )
    return parts


def payload_bytes(codec: str, shape: tuple[int, ...], meta: Meta) -> int:
    """Bytes of all parts, without the file's header. Raises ValueError as `layout` does."""
    return _bytes(layout(codec, shape, meta))


def weight_bits(codec: str, shape: tuple[int, ...], meta: Meta) -> int:
    """Bits of the weights that a tensor keeps: see `Codec.weight_bits`."""
    return codec_named(codec).weight_bits(shape, meta)


def least_bits(codec: str, shape: tuple[int, ...], meta: Meta) -> float:
    """Bits that a tensor takes in theory: see `Codec.least_bits`."""
    return codec_named(codec).least_bits(shape, meta)


def rank_of(encoded: Encoded) -> int | None:
    """The rank of the factors that a tensor is stored as; None where it is stored otherwise."""
    codec = codec_named(encoded.codec)
    return codec.rank(encoded.meta) if isinstance(codec, Factored) else None


def is_factored(encoded: Encoded) -> bool:
    """Whether a tensor is stored as factors."""
    return isinstance(codec_named(encoded.codec), Factored)


def is_scattered(encoded: Encoded) -> bool:
    """Whether a tensor is stored as positions and values."""
    return isinstance(codec_named(encoded.codec), Scattered)


def relaid(encoded: Encoded, layout: CodeLayout) -> Encoded:
    """Lay a tensor out so, bit for bit the same; as it is where its codec has one layout. ValueError as of `check`."""
    codec = codec_named(encoded.codec)
    if not isinstance(codec, Relaid) or encoded.meta["layout"] == layout:
        return encoded
    check(encoded)
    return codec.relaid(encoded, layout)


def layout_name(encoded: Encoded) -> str | None:
    """The layout of a tensor whose codec knows several; None for another."""
    return encoded.meta["layout"] if isinstance(codec_named(encoded.codec), Relaid) else None


def kept_dtype(encoded: Encoded) -> torch.dtype | None:
    """The dtype of what `restore` gives; None where a tensor is stored as a delta."""
    codec = codec_named(encoded.codec)
    return codec.dtype(encoded.meta) if isinstance(codec, Relative) else None


def check_parts(encoded: Encoded) -> None:
    """Raise ValueError unless the parts have the dtypes and shapes that `layout` asks for."""
    wanted = layout(*encoded.spec)
    given = {name: (part.dtype, tuple(part.shape)) for name, part in encoded.parts.items()}
    if given != wanted:
        raise ValueError(f"codec {encoded.codec} needs the parts {wanted}, not {given}.")


def check(encoded: Encoded) -> None:
    """Raise ValueError unless the parts are what `layout` asks for, with no bit out of place."""
    check_parts(encoded)
    codec_named(encoded.codec).check(encoded)


def decode(encoded: Encoded) -> Tensor:
    """The delta, float32, of `encoded.shape`, on the CPU. Raises ValueError as `check` does."""
    check(encoded)
    # the other size of an empty tensor may be beyond any memory
    if not math.prod(encoded.shape):
        return torch.zeros(encoded.shape)
    return codec_named(encoded.codec).decode(encoded)


def restore(encoded: Encoded, base: Tensor | None) -> Tensor:
    """The tuned tensor itself, bit for bit, in its own dtype, on the CPU.

    base: the base's tensor of this name, in any dtype that holds its values; None where it has none. Raises ValueError
    as `check` does, where the base's tensor is another one than when the tensor was encoded and that shows, and for a
    codec that is not Relative.
    """
    check(encoded)
    codec = codec_named(encoded.codec)
    if not isinstance(codec, Relative):
        raise ValueError(f"codec {encoded.codec} stores a delta; decode it instead.")
    if not math.prod(encoded.shape):
        return torch.zeros(encoded.shape, dtype=codec.dtype(encoded.meta))
    return codec.restore(encoded, base)


def rows(encoded: Encoded, ids: Tensor) -> Tensor:
    """`decode(encoded)[ids]`; ids: int64 (n,), on the CPU. Raises ValueError as `check` does."""
    check(encoded)
    return codec_named(encoded.codec).rows(encoded, ids)


def _bytes(parts: Layout) -> int:
    return sum(part_bytes(*part) for part in parts.values())
