"""The fingerprint of a base model: which weights a delta belongs to, whatever they are loaded as."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from cl_graft.skillpack.codecs.encoded import raw

FINGERPRINT_BYTES = 16
PIECE = 1 << 22  # elements hashed at a time: at most 64 MiB of them and of their copies

PACKED = ("torch.float4_e2m1fn_x2",)  # two values a byte: bytes, for all that can be done with it


def fingerprint(named: Iterable[tuple[str, Tensor]]) -> str:
    """BLAKE2b (32 hex digits) of names, shapes and values; their order does not matter.

    Floating values of at most 32 bits count as the float32 (little-endian) that they are equal to,
    so a bfloat16 checkpoint has one fingerprint whether it is loaded in bfloat16 or in float32;
    other tensors count by their dtype and their own bytes. -0 is not 0.

    `named`: as of `model.named_parameters()`, or a generator that reads a checkpoint: one tensor is
    held at a time, and beside it at most 64 MiB, however large it is.
    """
    digests = []
    for name, tensor in named:
        digests.append((name, _hash(name, tensor.detach())))
        del tensor
    digest = hashlib.blake2b(digest_size=FINGERPRINT_BYTES)
    for _, one in sorted(digests):
        digest.update(one)
    return digest.hexdigest()


def _hash(name: str, tensor: Tensor) -> bytes:
    """BLAKE2b of one tensor and of what it is called."""
    narrow = tensor.is_floating_point() and tensor.dtype.itemsize <= 4
    narrow = narrow and str(tensor.dtype) not in PACKED
    what = [name, "float" if narrow else str(tensor.dtype), list(tensor.shape)]
    digest = hashlib.blake2b(json.dumps(what).encode(), digest_size=FINGERPRINT_BYTES)
    for piece in _pieces(tensor):
        digest.update(raw(piece.to("cpu", torch.float32) if narrow else piece))
    return digest.digest()


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """Views of at most PIECE elements that make up the tensor in row-major order."""
    if tensor.numel() <= PIECE:
        yield tensor
        return
    rows = max(1, PIECE * len(tensor) // tensor.numel())
    for part in tensor.split(rows):
        if part.numel() <= PIECE:
            yield part
        else:
            yield from _pieces(part[0])
