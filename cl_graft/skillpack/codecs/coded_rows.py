"""Rows of whole numbers in one of two layouts: entropy-coded ("small") or at aligned widths ("fast").

Both hold the same numbers, so a tensor goes from one to the other and back without a bit of difference. In either
there is a byte a row: its class (entropy.py), or its width.
"""

from __future__ import annotations

from collections.abc import Sequence
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


def bits(codes: Tensor, layout: CodeLayout) -> Tensor:
    """Bits that each row takes, float64 (rows,), without its byte. codes: int16 (rows, n)."""
    if layout == "fast":
        sizes = [8 * _row_bytes(codes.shape[1], width) for width in _widths(codes).tolist()]
        return torch.tensor(sizes, dtype=torch.float64)
    return entropy.classes_of(codes, int(codes.abs().max()) if codes.numel() else 0)[1]


def layout_of(sizes: Sizes, meta: Meta, empty: bool) -> Layout:
    """The parts of matrices of these sizes; empty: whether they stand for no element. Raises ValueError on nonsense."""
    if meta["layout"] not in LAYOUTS:
        raise ValueError(
            f"layout is {str(meta['layout'])[:40]!r}, not one of {', '.join(LAYOUTS)}."
        )
    rows, codes = sum(size[0] for size in sizes), sum(size[0] * size[1] for size in sizes)
    # a code takes at most 24 bits, and the stack two words; what is never read must not be there
    used = whole(meta["bytes"], "bytes", 0, 0 if empty else 3 * codes + 8)
    if meta["layout"] == "small":
        whole(meta["top"], "top", 0, 0 if empty else entropy.TOP)
        if used % 4:
            raise ValueError(f"{used} bytes of coded words are no whole number of words.")
    return {"kinds": (torch.uint8, (rows,)), "codes": (torch.uint8, (used,))}


def fields_of(meta: Meta) -> list[str]:
    """The names of the meta's fields that say how rows are laid out."""
    return ["layout", "bytes", *(["top"] if meta.get("layout") == "small" else [])]


def read(parts: dict[str, Tensor], sizes: Sizes, meta: Meta) -> list[Tensor]:
    """The matrices of codes, int16. Raises ValueError where the parts hold too little or too much for them, or what
    `check` refuses."""
    matrices = [torch.zeros(size, dtype=torch.int16) for size in sizes]
    for matrix, runs in zip(matrices, _runs(parts, sizes, meta), strict=True):
        for where, codes in runs:
            matrix[where] = codes.to(torch.int16)
    return matrices


def write_floats(
    parts: dict[str, Tensor],
    sizes: Sizes,
    meta: Meta,
    scales: Sequence[Tensor | None],
    outs: Sequence[Tensor],
) -> None:
    """Fill matrices of a float dtype, of any strides, with their codes, each row times its scale, bfloat16 (rows,).

    Every entry is computed in float32 and rounded once. Raises ValueError as `read` does.
    """
    for out, scale, runs in zip(outs, scales, _runs(parts, sizes, meta), strict=True):
        whole_run = len(runs) == 1 and len(runs[0][0]) == len(out)
        # runs are written one after the other and then gathered, which is quicker than to scatter them
        room = out if whole_run else torch.empty(out.shape, dtype=out.dtype)
        order, first = torch.full((len(out),), len(out) - 1), 0
        for where, codes in runs:
            rows = room[first : first + len(where)]
            _fill(rows, codes, None if scale is None else scale[where], meta)
            order[where] = torch.arange(first, first + len(where))
            first += len(where)
        if whole_run:
            continue
        # rows of zeros, which are in no run, are the last of the room
        room[first:] = 0
        if out.is_contiguous():
            torch.index_select(room, 0, order, out=out)
        else:
            out.copy_(room[order])


def _fill(rows: Tensor, codes: Tensor, scale: Tensor | None, meta: Meta) -> None:
    """rows = codes, times scale where there is one: bfloat16 (rows,)."""
    if scale is None:
        rows.copy_(codes)
        return
    # whole numbers up to 256 are exact in every float dtype, and so is the scale but in float16
    small = codes.dtype == torch.int8 or meta.get("top", entropy.TOP) <= 256
    if rows.dtype == torch.float32 or (rows.dtype == torch.bfloat16 and small):
        rows.copy_(codes).mul_(scale.to(rows.dtype)[:, None])
    else:
        torch.mul(codes, scale.float()[:, None], out=rows)


def check(parts: dict[str, Tensor], sizes: Sizes, meta: Meta) -> list[list[Tensor]]:
    """Raise ValueError where a class is unknown, rows are not as narrow as they can be, or a bit is set after a row's
    last code.

    Returns the codes of each matrix as far as they were read, int8 or int16 (rows, n) each: what an entropy-coded
    stream holds is found out when it is decoded.
    """
    if meta["layout"] == "small":
        _check_classes(parts["kinds"], meta["top"])
        return [[] for _ in sizes]
    return [[codes for _, codes in runs] for runs in _runs(parts, sizes, meta)]


def _check_classes(kinds: Tensor, top: int) -> None:
    most = entropy.CLASSES if top else 1
    if kinds.numel() and int(kinds.max()) >= most:
        raise ValueError(f"a row's class is not below {most}, with codes up to {top}.")


Runs = list[tuple[Tensor, Tensor]]


def _runs(parts: dict[str, Tensor], sizes: Sizes, meta: Meta) -> list[Runs]:
    """Runs of each matrix: where its rows of one kind of code are, int64; their codes, int8 or int16."""
    kinds = parts["kinds"].split([size[0] for size in sizes])
    if meta["layout"] == "small":
        _check_classes(parts["kinds"], meta["top"])
        matrices = entropy.decode(parts["codes"], sizes, kinds, meta["top"])
        if max((int(m.abs().max()) for m in matrices if m.numel()), default=0) != meta["top"]:
            raise ValueError(f"no code has the magnitude {meta['top']} that the meta says.")
        return [[(torch.arange(len(m)), m)] for m in matrices]
    there = set(parts["kinds"].unique().tolist())
    if not there <= set(WIDTHS):
        raise ValueError(f"a row's width is not one of {', '.join(map(str, WIDTHS))}.")
    rest, found = parts["codes"], list[Runs]()
    for (_, n), widths in zip(sizes, kinds, strict=True):
        found.append([])
        for width in sorted(there - {0}):
            where = (widths == width).nonzero().reshape(-1)
            used = len(where) * _row_bytes(n, width)
            if len(rest) < used:
                raise ValueError("there are fewer bytes than the widths of the rows ask for.")
            if len(where) and not n:
                raise ValueError("a row is wider than its codes.")
            if len(where):
                packed = rest[:used].view(len(where), _row_bytes(n, width))
                found[-1].append((where, _checked(unpacked(packed, width), n, width)))
            rest = rest[used:]
    if len(rest):
        raise ValueError("there are more bytes than the widths of the rows ask for.")
    return found


def _checked(codes: Tensor, n: int, width: int) -> Tensor:
    """The codes, of which n a row are meant, where they need this width."""
    if codes.shape[1] > n and codes[:, n:].any():
        raise ValueError("a bit after the last code of a row is not zero.")
    if not (_widths(codes) == width).all():
        raise ValueError("a row is wider than its codes.")
    if width == 16:
        least, most = codes.aminmax()
        if int(least) < -entropy.TOP or int(most) > entropy.TOP:
            raise ValueError(f"a code is not from -{entropy.TOP} to {entropy.TOP}.")
    return codes[:, :n]


def _widths(codes: Tensor) -> Tensor:
    """The least width of each row, two's complement: uint8 (rows,)."""
    widths = torch.zeros(len(codes), dtype=torch.uint8)
    if not codes.numel():  # a row of nothing has no least code
        return widths
    # in 16 bits, for a bound of 128 wraps around in int8
    low, high = codes.amin(1).short(), codes.amax(1).short()
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


def unpacked(packed: Tensor, width: int) -> Tensor:
    """int16 or int8 (rows, n) of rows packed at one width, uint8 (rows, bytes), n being as many as fill the bytes."""
    if width == 16:
        return packed.clone().view(torch.int16)  # views of wider numbers must begin on their size
    if width == 8:
        return packed.view(torch.int8)
    per, size = 8 // width, packed.shape[1]
    signed, codes = packed.view(torch.int8), torch.empty(len(packed), per * size, dtype=torch.int8)
    for i in range(per):
        # up to the sign bit and down again, which fills in the sign
        part = codes[:, i * size : (i + 1) * size]
        torch.bitwise_left_shift(signed, 8 - (i + 1) * width, out=part)
    return codes.bitwise_right_shift_(8 - width)
