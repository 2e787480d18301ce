"""`dct_patches`: square patches of a matrix by their cosine transforms, each at bits of its own (arXiv 2503.06676).

The matrix is filled up with zeros to whole patches, which are taken row by row. meta: patch, its side, and bits =
[[bits, patches], ...]; parts: kinds, the place in `bits` of each patch, and codes, of the patches of each kind in turn,
both bit-packed uint8 (packing.py), and scales, bfloat16, of the patches of more than 0 bits in the order of codes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cl_graft.skillpack.codecs import packing
from cl_graft.skillpack.codecs.codec import Codec, register
from cl_graft.skillpack.codecs.encoded import (
    Encoded,
    Layout,
    Meta,
    Spec,
    fields,
    matrix,
    rounded,
    whole,
    wholes,
)

LARGEST = 256  # side of a patch
KINDS = 8
SHRINKS = 24  # ranges of a patch that are tried


def dct_patches(x: Tensor, patch: int, bits: list[int], counts: list[int]) -> Encoded:
    """The patches with the largest norms at bits[0], as many as counts[0], the next at bits[1], and so on.

    x: (rows, cols). bits: 0 to 8 each, falling; 0 drops a patch. counts: adding up to the number of patches. Each
    coefficient c of a patch is scale * (code - (2**bits - 1) / 2), the scale that of the least squared error of 24
    ranges, refitted. Raises ValueError where bits and counts do not fit, and on NaN or Inf.
    """
    x = rounded(x, torch.float32, "the tensor")
    spec = dct_patches_spec(tuple(x.shape), patch, bits, counts)
    DctPatchesCodec().layout(spec[1], spec[2])
    cut = _cut(x, patch)
    order = cut.square().sum((1, 2)).argsort(descending=True, stable=True)
    kinds = torch.empty(len(cut), dtype=torch.uint8)
    kinds[order] = torch.arange(len(bits), dtype=torch.uint8).repeat_interleave(
        torch.tensor(counts)
    )
    cosines = _cosines(patch)
    coefficients = (cosines @ cut @ cosines.T).flatten(1)
    codes, scales = [], []
    for kind, width in enumerate(bits):
        if width:
            found, scale = _quantised(coefficients[kinds == kind], width)
            codes.append(packing.pack(found, width))
            scales.append(scale)
    parts = {
        "kinds": packing.pack(kinds, _width(len(bits))),
        "codes": torch.cat([torch.empty(0, dtype=torch.uint8), *codes]),
        "scales": torch.cat([torch.empty(0, dtype=torch.bfloat16), *scales]),
    }
    return Encoded(*spec, parts)


def dct_patches_spec(
    shape: tuple[int, ...], patch: int, bits: list[int], counts: list[int]
) -> Spec:
    """What `dct_patches` says of a matrix of this shape, before there is one."""
    said = [list(pair) for pair in zip(bits, counts, strict=True)]
    return DctPatchesCodec.name, shape, {"patch": patch, "bits": said}


def patches_in(shape: tuple[int, ...], patch: int) -> int:
    """How many patches cover a matrix of this shape."""
    return math.prod(-(-size // patch) for size in shape)


@register
class DctPatchesCodec(Codec):
    name = "dct_patches"

    def layout(self, shape: tuple[int, ...], meta: Meta) -> Layout:
        fields(meta, "patch", "bits")
        side = whole(meta["patch"], "patch", 1, LARGEST)
        patches = patches_in(matrix(shape), side)
        said = _bits(meta)
        if sum(count for _, count in said) != patches:
            raise ValueError(f"bits is not of the {patches} patches that there are.")
        codes = sum(packing.packed_bytes(count * side * side, bits) for bits, count in said if bits)
        return {
            "kinds": (torch.uint8, (packing.packed_bytes(patches, _width(len(said))),)),
            "codes": (torch.uint8, (codes,)),
            "scales": (torch.bfloat16, (sum(count for bits, count in said if bits),)),
        }

    def check(self, encoded: Encoded) -> None:
        _kinds(encoded)
        for codes, bits, count in _streams(encoded):
            packing.check_packed(codes, count, bits)

    def decode(self, encoded: Encoded) -> Tensor:
        side = encoded.meta["patch"]
        kinds, scales = _kinds(encoded), encoded.parts["scales"].float()
        streams = _streams(encoded)
        coefficients = torch.zeros(len(kinds), side * side)
        for kind, (bits, count) in enumerate(encoded.meta["bits"]):
            if bits:
                codes, _, _ = next(streams)
                steps = packing.unpack(codes, count * side * side, bits).float() - _middle(bits)
                coefficients[kinds == kind] = (
                    steps.reshape(count, side * side) * scales[:count, None]
                )
                scales = scales[count:]
        cosines = _cosines(side)
        return _joined(cosines.T @ coefficients.unflatten(1, (side, side)) @ cosines, encoded.shape)

    def weight_bits(self, shape: tuple[int, ...], meta: Meta) -> int:
        return meta["patch"] ** 2 * sum(bits * count for bits, count in meta["bits"])

    def least_bits(self, shape: tuple[int, ...], meta: Meta) -> float:
        """Codes and scales, and the logarithm of the number of ways to choose the patches of each kind."""
        counts = [count for _, count in meta["bits"]]
        ways = math.lgamma(sum(counts) + 1) - sum(math.lgamma(count + 1) for count in counts)
        scales = sum(count for bits, count in meta["bits"] if bits)
        return self.weight_bits(shape, meta) + 16 * scales + ways / math.log(2)


def _bits(meta: Meta) -> list[list[int]]:
    """[bits, patches] of each kind. Raises ValueError on nonsense."""
    if not isinstance(meta["bits"], list):
        raise ValueError("bits is not a list.")
    whole(len(meta["bits"]), "the number of kinds", 1, KINDS)
    said = [wholes(pair, 2, "bits") for pair in meta["bits"]]
    for bits, count in said:
        whole(bits, "bits", 0, 8)
        whole(count, "patches", 0)
    return said


def _width(kinds: int) -> int:
    """Bits of the place of a kind."""
    return max(1, (kinds - 1).bit_length())


def _kinds(encoded: Encoded) -> Tensor:
    """The kind of each patch, uint8. Raises ValueError where they are not as many of each as the meta says."""
    said = encoded.meta["bits"]
    patches = sum(count for _, count in said)
    kinds = packing.unpack(encoded.parts["kinds"], patches, _width(len(said)))
    counts = torch.bincount(kinds.long(), minlength=len(said)).tolist()
    if counts != [count for _, count in said]:
        raise ValueError(f"the patches of each kind are {counts}, not as bits says.")
    return kinds


def _streams(encoded: Encoded):
    """(codes, bits, how many) of each kind of more than 0 bits."""
    codes, area = encoded.parts["codes"], encoded.meta["patch"] ** 2
    for bits, count in encoded.meta["bits"]:
        if bits:
            size = packing.packed_bytes(count * area, bits)
            yield codes[:size], bits, count * area
            codes = codes[size:]


def _middle(bits: int) -> float:
    return (2**bits - 1) / 2


def _cosines(size: int) -> Tensor:
    """The orthonormal DCT-II, float32 (frequency, place)."""
    places = torch.arange(size, dtype=torch.float64)
    angles = math.pi / size * (places[None] + 0.5) * places[:, None]
    scale = torch.full((size, 1), math.sqrt(2 / size), dtype=torch.float64)
    scale[0] = math.sqrt(1 / size)
    return (angles.cos() * scale).float()


def _cut(x: Tensor, side: int) -> Tensor:
    """The patches of a matrix, (patches, side, side)."""
    rows, cols = x.shape
    filled = torch.nn.functional.pad(x, (0, -cols % side, 0, -rows % side))
    tiles = filled.unflatten(1, (filled.shape[1] // side, side)).unflatten(0, (-1, side))
    return tiles.transpose(1, 2).flatten(0, 1)


def _joined(patches: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `_cut`."""
    side = patches.shape[-1]
    down, across = (-(-size // side) for size in shape)
    filled = patches.unflatten(0, (down, across)).transpose(1, 2)
    return filled.reshape(down * side, across * side)[: shape[0], : shape[1]].contiguous()


def _quantised(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes, uint8 (patches, coefficients), and scales, bfloat16 (patches,)."""
    top, middle = 2**bits - 1, _middle(bits)
    widest = x.abs().amax(1) / middle if x.numel() else x.new_zeros(len(x))
    best = torch.full_like(widest, math.inf)
    chosen = torch.zeros_like(widest)

    def codes(scale: Tensor) -> Tensor:
        safe = torch.where(scale > 0, scale, 1.0)
        return (x / safe[:, None] + middle).round_().clamp_(0, top)

    for n in range(1, SHRINKS + 1):
        steps = codes(widest * n / SHRINKS) - middle
        fitted = ((x * steps).sum(1) / steps.square().sum(1)).bfloat16().float().clamp_min(0.0)
        missed = (x - fitted[:, None] * (codes(fitted) - middle)).square().sum(1)
        better = missed < best
        best = torch.where(better, missed, best)
        chosen = torch.where(better, fitted, chosen)
    return codes(chosen).byte(), chosen.bfloat16()
