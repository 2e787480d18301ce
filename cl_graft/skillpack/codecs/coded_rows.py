"""Rows of whole numbers in one of two layouts: entropy-coded ("small") or at aligned widths ("fast").

Both hold the same numbers, so a tensor goes from one to the other and back without a bit of difference. In either
there is a byte a row: its class (entropy.py), or its width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from cl_graft.skillpack.codecs import entropy
from cl_graft.skillpack.codecs.encoded import Layout, Meta, whole

CodeLayout = Literal["small", "fast"]
LAYOUTS = get_args(CodeLayout)
WIDTHS = (0, 2, 4, 8, 16)  # bits of a code in the layout "fast"
Sizes = Sequence[tuple[int, int]]


def write(matrices: Sequence[Tensor], layout: CodeLayout) -> tuple[dict[str, Tensor], Meta]:
    """Parts `kinds` and `codes` of matrices of codes, int16 (rows, n) each, and what the meta says of them.

    Raises ValueError for a code beyond entropy.TOP.
    """
    top = max((int(m.abs().max()) for m in matrices if m.numel()), default=0)
    whole(top, "a code", 0, entropy.TOP)
    if layout == "fast":
        widths = [_widths(m) for m in matrices]
        codes = [_packed(m, w) for m, w in zip(matrices, widths, strict=True)]
        parts = {"kinds": torch.cat(widths), "codes": torch.cat(codes)}
        return parts, {"layout": layout, "bytes": len(parts["codes"])}
    kinds = [entropy.classes_of(m, top)[0] for m in matrices]
    parts = {"kinds": torch.cat(kinds), "codes": entropy.encode(matrices, kinds, top)}
    return parts, {"layout": layout, "bytes": len(parts["codes"]), "top": top}


def layout_of(sizes: Sizes, meta: Meta) -> Layout:
    """The parts of matrices of these sizes. Raises ValueError on nonsense."""
    if meta["layout"] not in LAYOUTS:
        raise ValueError(
            f"layout is {str(meta['layout'])[:40]!r}, not one of {', '.join(LAYOUTS)}."
        )
    rows, codes = sum(size[0] for size in sizes), sum(size[0] * size[1] for size in sizes)
    # a code takes at most 24 bits, and the stack two words
    used = whole(meta["bytes"], "bytes", 0, 3 * codes + 8)
    if meta["layout"] == "small":
        whole(meta["top"], "top", 0, entropy.TOP)
        if used % 4:
            raise ValueError(f"{used} bytes of coded words are no whole number of words.")
    return {"kinds": (torch.uint8, (rows,)), "codes": (torch.uint8, (used,))}


def fields_of(meta: Meta) -> list[str]:
    """The names of the meta's fields that say how rows are laid out."""
    return ["layout", "bytes", *(["top"] if meta.get("layout") == "small" else [])]


def read(parts: dict[str, Tensor], sizes: Sizes, meta: Meta) -> list[Tensor]:
    """The matrices of codes, int16. Raises ValueError where the parts hold too little or too much for them."""
    kinds = parts["kinds"].split([size[0] for size in sizes])
    if meta["layout"] == "small":
        _check_classes(parts["kinds"])
        matrices = entropy.decode(parts["codes"], sizes, kinds, meta["top"])
        if max((int(m.abs().max()) for m in matrices if m.numel()), default=0) != meta["top"]:
            raise ValueError(f"no code has the magnitude {meta['top']} that the meta says.")
        return matrices
    matrices = [torch.zeros(size, dtype=torch.int16) for size in sizes]
    for codes, where, packed, width in _runs(parts["codes"], matrices, kinds):
        codes[where] = unpacked(packed, codes.shape[1], width).to(torch.int16)
    return matrices


def check(parts: dict[str, Tensor], sizes: Sizes, meta: Meta) -> None:
    """Raise ValueError where a class is unknown, rows are not as narrow as they can be, or a bit is set after a row's
    last code.

    What an entropy-coded stream holds is found out when it is read.
    """
    if meta["layout"] == "small":
        return _check_classes(parts["kinds"])
    matrices = read(parts, sizes, meta)
    kinds = parts["kinds"].split([size[0] for size in sizes])
    if any(not torch.equal(_widths(m), w) for m, w in zip(matrices, kinds, strict=True)):
        raise ValueError("a row is wider than its codes.")
    again = [_packed(m, w) for m, w in zip(matrices, kinds, strict=True)]
    if not torch.equal(torch.cat(again), parts["codes"]):
        raise ValueError("a bit after the last code of a row is not zero.")
    return None


def _check_classes(kinds: Tensor) -> None:
    if kinds.numel() and int(kinds.max()) >= entropy.CLASSES:
        raise ValueError(f"a row's class is not below {entropy.CLASSES}.")


def _runs(
    rest: Tensor, matrices: Sequence[Tensor], kinds: Sequence[Tensor]
) -> Iterator[tuple[Tensor, Tensor, Tensor, int]]:
    """(matrix, where its rows of one width are, their bytes (rows, bytes), the width), in the order of the file."""
    for codes, widths in zip(matrices, kinds, strict=True):
        for width in WIDTHS[1:]:
            where = (widths == width).nonzero().reshape(-1)
            used = len(where) * _row_bytes(codes.shape[1], width)
            if len(rest) < used:
                raise ValueError("there are fewer bytes than the widths of the rows ask for.")
            if used:
                yield codes, where, rest[:used].view(len(where), -1), width
            rest = rest[used:]
    if len(rest):
        raise ValueError("there are more bytes than the widths of the rows ask for.")


def _widths(codes: Tensor) -> Tensor:
    """The least width of each row, two's complement: uint8 (rows,)."""
    widths = torch.zeros(len(codes), dtype=torch.uint8)
    if not codes.numel():  # a row of nothing has no least code
        return widths
    low, high = codes.amin(1), codes.amax(1)
    for below, width in zip(WIDTHS, WIDTHS[1:], strict=False):
        bound = 1 << (below - 1) if below else 0
        wider = (high >= bound) & (high > 0) | (low < -bound)
        widths[wider] = width
    return widths


def _row_bytes(n: int, width: int) -> int:
    return -(-n * width // 8)


def _packed(codes: Tensor, widths: Tensor) -> Tensor:
    """uint8 (bytes,): the rows of 2 bits, then those of 4, 8 and 16.

    A row of 4 bits has its first half in the low halves of its bytes and the rest in the high ones; one of 2 bits is
    in quarters: so it is unpacked by whole vectors.
    """
    parts = [torch.empty(0, dtype=torch.uint8)]
    for width in WIDTHS[1:]:
        rows = codes[widths == width]
        if not len(rows):
            continue
        if width >= 8:
            wide = rows if width == 16 else rows.to(torch.int8)
            parts.append(wide.contiguous().reshape(-1).view(torch.uint8))
            continue
        per, size = 8 // width, _row_bytes(rows.shape[1], width)
        room = torch.zeros(len(rows), per * size, dtype=torch.uint8)
        room[:, : rows.shape[1]] = rows.to(torch.uint8) & ((1 << width) - 1)
        packed = torch.zeros(len(rows), size, dtype=torch.uint8)
        for i in range(per):
            packed |= room[:, i * size : (i + 1) * size] << (i * width)
        parts.append(packed.reshape(-1))
    return torch.cat(parts)


def unpacked(packed: Tensor, n: int, width: int) -> Tensor:
    """int16 or int8 (rows, n) of rows packed at one width, uint8 (rows, bytes)."""
    if width == 16:
        return packed.clone().view(torch.int16)  # views of wider numbers must begin on their size
    if width == 8:
        return packed.view(torch.int8)
    per, size = 8 // width, packed.shape[1]
    signed, codes = packed.view(torch.int8), torch.empty(len(packed), per * size, dtype=torch.int8)
    for i in range(per):
        # up to the sign bit and down again, which fills in the sign
        torch.bitwise_left_shift(
            signed, 8 - (i + 1) * width, out=codes[:, i * size : (i + 1) * size]
        )
    return codes.bitwise_right_shift_(8 - width)[:, :n]
