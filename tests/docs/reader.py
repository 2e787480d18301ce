"""A reader of SkillPack files, written from docs/pack-format.md alone: NumPy and the standard library."""

from __future__ import annotations

import bisect
import hashlib
import json
import math
import re
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

MAGIC = b'{"__metadata__":{"skillpack":"'
DTYPES = {
    "I64": ("<i8", 8),
    "F64": ("<f8", 8),
    "F32": ("<f4", 4),
    "I32": ("<i4", 4),
    "BF16": ("<u2", 2),
    "F16": ("<f2", 2),
    "U8": ("u1", 1),
}
ORDER = list(DTYPES)
MOST = 1 << 48
# the others store matrices
ANY_SHAPE = ("dense", "exact", "mask", "sparse", "sign_scale", "coded", "lossless")
ANY_SHAPE += ("sparse_codebook", "seeded_sparse")
MANTISSA = {"F32": 23, "BF16": 7, "F16": 10}
STACKS = ("low_rank_stack", "coded_low_rank_stack")  # of matrices
JSON = ["config.json", "generation_config.json", "tokenizer_config.json"]
JSON += ["special_tokens_map.json", "chat_template.json"]
FILES = [*JSON, "chat_template.jinja", "tokenizer.json", "added_tokens.json", "vocab.json"]
FILES += ["vocab.txt", "merges.txt", "tokenizer.model", "spiece.model"]
CODE = {"auto_map", "custom_pipelines", "custom_generate", "trust_remote_code"}
Array = np.ndarray


class Refused(Exception):
    """Not a SkillPack, or a damaged one."""


def read(
    path: Path, base: dict[str, Array] | None = None
) -> tuple[dict[str, Any], dict[str, Array]]:
    """(the text and the digest, {tensor: its delta in F32, or the bits of the tuned one}). base: values in F32."""
    data = path.read_bytes()
    text, sums, start, end = told(data)
    tensors = text["tensors"]
    try:
        parts = {name: layout(*said) for name, said in tensors.items()}
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise Refused(f"layout: {error}") from error
    found, place = {}, start
    for name, part, dtype, shape in placed(parts, text["files"]):
        begin, place = place, place + size(dtype, shape)
        found[name, part] = data[begin:place]
    must(place == end and len(sums) == 8 * len(tensors) + 40, "lengths")
    for name, said in text["files"].items():
        unpacked(name, *said, found[None, name])
    deltas = {}
    for i, (name, (codec, shape, meta)) in enumerate(tensors.items()):
        mine = {part: found[name, part] for part in parts[name]}
        must(blake(b"".join(mine.values()), 8) == sums[8 * i :][:8].hex(), f"checksum of {name}")
        values = {part: array(mine[part], *parts[name][part]) for part in mine}
        if codec == "lossless":
            deltas[name] = tuned(shape, meta, values["code"], (base or {}).get(name))
            must(all_finite(deltas[name], meta["dtype"]), f"{name} is not finite")
            continue
        deltas[name] = decode(codec, shape, meta, values)
        must(bool(np.isfinite(deltas[name]).all()), f"{name} is not finite")
    return text | {"base": sums[-32:-16].hex(), "digest": sums[-16:].hex()}, deltas


def told(data: bytes) -> tuple[dict[str, Any], bytes, int, int]:
    """(the text, the digests, where the payload begins, where it ends)."""
    must(data[8 : 8 + len(MAGIC)] == MAGIC, "magic")
    start = 8 + int.from_bytes(data[:8], "little")
    must(start <= 8 + 512 and len(data) >= start, "length")
    try:
        entries = json.loads(data[8:start])
        sizes = [entries[name]["shape"][0] for name in ("payload", "text", "digests")]
        must(head(*map(whole, sizes)) == data[:start], "head")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise Refused(f"head: {error}") from error
    must(len(data) == start + sum(sizes) and max(sizes[1:]) <= 32 << 20, "length of the file")
    end = start + sizes[0]
    stored, sums = data[end : end + sizes[1]], data[end + sizes[1] :]
    text = stated(stored)
    must(blake(stored, 8) == sums[-40:-32].hex(), "checksum of the text")
    must(blake(text + sums[:-40] + sums[-32:-16], 16) == sums[-16:].hex(), "digest")
    try:
        about = json.loads(text)
        fields = ["version", "task", "method", "options", "versions", "added", "grown"]
        must(list(about) == [*fields, "files", "tensors"] and about["version"] == 3, "fields")
        check_sizes(about["files"])
        must(compact(ordered(about)).encode() == text, "order")
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise Refused(f"text: {error}") from error
    return about, sums, start, end


def stated(stored: bytes) -> bytes:
    """The text, of what is stored."""
    stream = zlib.decompressobj()
    try:
        text = stream.decompress(stored, (32 << 20) + 1)
    except zlib.error as error:
        raise Refused(f"text: {error}") from error
    must(stream.eof and not stream.unused_data and stored[:2] == b"\x78\xda", "stream of the text")
    must(len(text) <= 32 << 20, "length of the text")
    must(sum(map(text.count, (b"[", b"{", b","))) <= 4 << 20, "too many values")
    return text


def must(right: bool, what: str) -> None:
    if not right:
        raise Refused(what)


# --- header ---


def head(*sizes: int) -> bytes:
    """What stands before the payload of these bytes, its text and its digests."""
    entries: dict[str, Any] = {"__metadata__": {"skillpack": "3"}}
    end = 0
    for name, length in zip(("payload", "text", "digests"), sizes, strict=True):
        start, end = end, end + length
        entries[name] = {"dtype": "U8", "shape": [length], "data_offsets": [start, end]}
    data = compact(entries).encode()
    data += b" " * (-len(data) % 8)
    return len(data).to_bytes(8, "little") + data


def ordered(text: dict[str, Any]) -> dict[str, Any]:
    """A text in the order that it must have."""
    said = {**text, "added": sorted(text["added"])}
    return said | {name: dict(sorted(text[name].items())) for name in ("grown", "files", "tensors")}


def compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def blake(data: bytes, length: int) -> str:
    return hashlib.blake2b(data, digest_size=length).hexdigest()


def size(dtype: str, shape: list[int]) -> int:
    return math.prod(shape) * DTYPES[dtype][1]


def placed(parts: dict[str, Any], files: dict[str, Any]) -> list[tuple[Any, str, str, list[int]]]:
    """Every part in the order of the payload; a file's under None and its own name."""
    rows = [(n, p, dtype, shape) for n, own in parts.items() for p, (dtype, shape) in own.items()]
    rows += [(None, name, "U8", [said[1]]) for name, said in files.items()]
    return sorted(rows, key=lambda row: (ORDER.index(row[2]), key(*row[:2])))


def key(tensor: str | None, part: str) -> str:
    return f"{'files' if tensor is None else tensor}:{part}"


# --- files ---


def check_sizes(files: dict[str, Any]) -> None:
    must(len(files) <= 64, "number of files")
    for name, (whole_size, stored, _) in files.items():
        known = name in FILES
        known |= bool(re.fullmatch(r"additional_chat_templates/[A-Za-z0-9_-]{1,64}\.jinja", name))
        must(known, f"{name!r:.50} is no file of a pack")
        whole(stored, 0, whole(whole_size, 0, (8 if name in JSON else 64) << 20))
    must(sum(said[0] for said in files.values()) <= 128 << 20, "bytes of files")


def unpacked(name: str, length: int, stored: int, checksum: str, data: bytes) -> bytes:
    """The content of a file."""
    must(blake(data, 8) == checksum, f"checksum of {name}")
    content = data
    if stored < length:
        try:
            stream = zlib.decompressobj()
            content = stream.decompress(data, length + 1)
        except zlib.error as error:
            raise Refused(f"{name}: {error}") from error
        must(len(content) == length and stream.eof and not stream.unused_data, f"{name}: stream")
    if content and name in JSON:
        must(sum(map(content.count, (b"[", b"{", b","))) <= 1 << 20, f"{name}: too many values")
        try:
            said = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise Refused(f"{name}: {error}") from error
        must(isinstance(said, dict) and not asks(said), f"{name} is no object, or asks for code")
    return content


def asks(value: Any) -> bool:
    """Whether a value has a key that asks for code."""
    if isinstance(value, dict):
        return bool(CODE & value.keys()) or any(map(asks, value.values()))
    return isinstance(value, list) and any(map(asks, value))


# --- codecs ---


def whole(value: Any, low: int = 0, high: int = MOST) -> int:
    must(type(value) is int and low <= value <= high, f"{value!r:.50} is out of range")
    return value


def layout(codec: str, shape: list[int], meta: dict[str, Any]) -> dict[str, tuple[str, list[int]]]:
    """{part: (dtype, shape)}, in the order of the checksum."""
    numel = math.prod(whole(n) for n in shape)
    must(len(shape) <= 8 and math.prod(max(1, n) for n in shape) <= MOST, "shape")
    dtype = meta.get("dtype", "F32")
    must(dtype in (ORDER if codec == "exact" else ("F32", "BF16", "F16")), "dtype")
    lies = {"layout", "bytes"} | ({"top"} if meta.get("layout") == "small" else set())
    wanted = {
        "coded": {"kept", "columns"} | ({"gap"} & set(meta)) | lies,
        "coded_low_rank": {"rank"} | lies,
        "coded_low_rank_stack": {"ranks"} | lies,
        "coded_table": {"rank", "kept"} | ({"gap"} & set(meta)) | lies,
        "dense": {"dtype"},
        "exact": {"dtype"},
        "sparse": {"dtype", "kept"} | ({"gap"} & set(meta)),
        "low_rank": {"dtype", "rank"},
        "low_rank_stack": {"dtype", "rank"},
        "quantized": {"bits", "group_size"},
        "quantized_low_rank": {"groups"},
        "sign_scale": set(),
        "mask": set(),
        "lossless": {"dtype", "bytes"} | ({"rows", "gap"} & set(meta)),
        "sign_scales": {"axis"},
        "sparse_codebook": {"bits", "kept"} | ({"gap"} & set(meta)),
        "seeded_sparse": {"dtype", "kept", "seed", "rate"},
        "sparse_low_rank": {"dtype", "rank", "left", "right"},
        "sign_low_rank": {"grid", "signs"},
        "quantized_product": {"groups"},
        "dct_patches": {"patch", "bits"},
    }
    must(codec in wanted and set(meta) == wanted[codec], "codec or meta")
    must(len(shape) == (3 if codec in STACKS else 2) or codec in ANY_SHAPE, "no matrix")
    if codec in ("dense", "exact"):
        return {"values": (dtype, shape)}
    if codec == "sparse":
        index = index_bytes(meta.get("gap"), numel)
        return {"values": (dtype, [whole(meta["kept"], 0, numel)]), "index": ("U8", [index])}
    if codec == "sparse_codebook":
        bits, kept = whole(meta["bits"], 1, 8), whole(meta["kept"], 0, numel)
        index = index_bytes(meta.get("gap"), numel)
        codes = stream_bytes(kept, bits)
        return {"levels": ("F32", [1 << bits]), "codes": ("U8", [codes]), "index": ("U8", [index])}
    if codec == "seeded_sparse":
        whole(meta["seed"])
        mean = numel * whole(meta["rate"], 1 << 41) / (1 << 48)
        kept = whole(meta["kept"], 0, numel)
        must(abs(kept - mean) <= 8 * math.sqrt(mean) + 8, "kept")
        return {"values": (dtype, [kept])}
    if codec == "sign_scales":
        scales = shape[whole(meta["axis"], 0, 1)]
        return {"signs": ("U8", [stream_bytes(numel, 1)]), "scales": ("BF16", [scales])}
    if codec == "sparse_low_rank":
        parts = {}
        rank = whole(meta["rank"], 0, max(shape))
        for side, cols in zip(("left", "right"), shape, strict=True):
            kept, *gap = meta[side]
            must(len(gap) in (0, 2), "gap")
            parts[side] = (dtype, [whole(kept, 0, rank * cols)])
            parts[f"{side}_index"] = ("U8", [index_bytes(gap or None, rank * cols)])
        return parts
    if codec == "dct_patches":
        side, kinds = whole(meta["patch"], 1, 256), meta["bits"]
        patches = -(-shape[0] // side) * -(-shape[1] // side)
        must(1 <= len(kinds) <= 8 and sum(whole(n) for _, n in kinds) == patches, "patches")
        codes = [stream_bytes(n * side * side, whole(k, 0, 8)) for k, n in kinds]
        return {
            "kinds": ("U8", [stream_bytes(patches, kind_bits(kinds))]),
            "codes": ("U8", [sum(codes)]),
            "scales": ("BF16", [sum(n for k, n in kinds if k)]),
        }
    if codec in ("low_rank", "low_rank_stack"):
        *stack, rows, cols = shape
        rank = whole(meta["rank"])
        return {"left": (dtype, [*stack, rows, rank]), "right": (dtype, [*stack, rank, cols])}
    if codec in ("coded", "coded_low_rank", "coded_low_rank_stack", "coded_table"):
        sizes = coded_sizes(codec, shape, meta)
        codes = {
            "kinds": ("U8", [sum(rows for rows, _ in sizes)]),
            "codes": ("U8", [whole(meta["bytes"])]),
        }
        most = 3 * sum(rows * cols for rows, cols in sizes) + 8 if numel else 0
        must(meta["layout"] in ("small", "fast") and whole(meta["bytes"]) <= most, "bytes of rows")
        must(whole(meta.get("top", 0)) <= (8191 if numel else 0), "top")
        if codec == "coded_low_rank":
            return {"scales": ("BF16", [whole(meta["rank"], 0, min(shape))]), **codes}
        if codec == "coded_low_rank_stack":
            ranks = [whole(rank, 0, min(shape[1:])) for rank in meta["ranks"]]
            must(len(ranks) == shape[0], "ranks")
            return {"scales": ("BF16", [sum(ranks)]), **codes}
        if codec == "coded_table":
            scales = ("BF16", [whole(meta["rank"], 0, min(shape)) + 1])
            whole(meta["kept"], 0, shape[0] if shape[1] else 0)
            index = index_bytes(meta.get("gap"), shape[0])
            return {"scales": scales, "index": ("U8", [index]), **codes}
        rows = shape[0] if len(shape) > 1 else 1
        width, count = meta.get("gap", [1, rows])
        index = stream_bytes(whole(count, 0, rows), whole(width, 1, 48))
        columns = sizes[0][1] * whole(meta["columns"], 0, 1)
        steps = ("BF16", [whole(meta["kept"], 0, rows)])
        return {"steps": steps, "columns": ("BF16", [columns]), "index": ("U8", [index]), **codes}
    if codec == "mask":
        return {"bits": ("U8", [stream_bytes(numel, 1)])}
    if codec == "lossless":
        rows = shape[0] if shape else 1
        index = stream_bytes(rows, 1) if "rows" in meta else 0
        if "gap" in meta:
            must("rows" in meta, "gap without rows")
            width, count = meta["gap"]
            index = stream_bytes(whole(count, 0, rows), whole(width, 1, 48))
        must("rows" not in meta or whole(meta["rows"], 0, rows) >= 0, "rows")
        tables, low, words = map(whole, meta["bytes"])
        must(words % 4 == 0 and (numel > 0 or tables + low + words == 0), "words")
        return {"code": ("U8", [index + tables + low + words])}
    if codec == "sign_scale":
        return {"signs": ("U8", [stream_bytes(numel, 1)]), "scale": ("F32", [1])}
    grids = grids_of(codec, shape, meta)
    codes = sum(1 + stream_bytes(r * c + r * -(-c // s), k) for r, c, k, s in grids)
    scales = sum(r * -(-c // s) for r, c, _, s in grids)
    parts = {"codes": ("U8", [codes]), "scales": ("F16", [scales])}
    if codec == "sign_low_rank":
        rank, *sizes = meta["signs"]
        groups = [-(-n // whole(size, 1)) for n, size in zip(shape, sizes, strict=True)]
        parts["signs"] = ("U8", [stream_bytes(whole(rank) * sum(shape), 1)])
        parts["sizes"] = ("BF16", [rank * sum(groups)])
    return parts


def grids_of(codec: str, shape: list[int], meta: dict[str, Any]) -> list[tuple[int, ...]]:
    """(rows, cols, bits, group size) of each grid."""
    rows, cols = shape
    if codec == "quantized":
        grids = [(rows, cols, meta["bits"], meta["group_size"])]
    else:
        groups = [meta["grid"]] if codec == "sign_low_rank" else meta["groups"]
        must(len(groups) <= 64, "rank groups")
        grids = []
        for rank, bits, left, right in groups:
            turned = codec == "quantized_product"
            sizes = (rows, whole(rank)) if turned else (whole(rank), rows)
            grids += [(*sizes, bits, left), (rank, cols, bits, right)]
    for _, _, bits, group in grids:
        must(type(bits) is int and bits in (2, 3, 4, 5, 6, 8), "bits")
        whole(group, 1)
    return grids


def decode(codec: str, shape: list[int], meta: dict[str, Any], parts: dict[str, Array]) -> Array:
    """The delta, F32."""
    numel = math.prod(shape)
    if codec in ("dense", "exact"):
        return parts["values"].astype("<f4")
    if codec == "sparse":
        places = positions(parts["index"], meta.get("gap"), numel)
        must(len(places) == meta["kept"], "kept")
        flat = np.zeros(numel, np.float32)
        flat[places] = parts["values"]
        return flat.reshape(shape)
    if codec in ("low_rank", "low_rank_stack"):
        return product(parts["left"], parts["right"], shape)
    if codec == "coded_low_rank":
        found = rows_of_codes(parts, coded_sizes(codec, shape, meta), meta)
        must(all(abs(shift).max(initial=0) <= 30 for shift in found[:2]), "a shift")
        right, left = (x * 2.0**-shift for x, shift in zip(found[2:], found[:2], strict=True))
        return product((left.T * parts["scales"]).astype("<f4"), right.astype("<f4"), shape)
    if codec == "coded_low_rank_stack":
        found, ends = (
            rows_of_codes(parts, coded_sizes(codec, shape, meta), meta),
            np.cumsum(meta["ranks"]),
        )
        must(all(abs(shift).max(initial=0) <= 30 for shift in found[:2]), "a shift")
        delta = np.zeros(shape, np.float32)
        for i, (end, rank) in enumerate(zip(ends, meta["ranks"], strict=True)):
            of_right, of_left = found[0][i], found[1][i]
            right, left = found[2][end - rank : end], found[3][end - rank : end]
            left = (left * 2.0**-of_left).T * parts["scales"][end - rank : end]
            right = right * 2.0**-of_right
            delta[i] = product(left.astype("<f4"), right.astype("<f4"), shape[1:])
        return delta
    if codec == "coded_table":
        of_cols, of_rows, right, left, own = rows_of_codes(
            parts, coded_sizes(codec, shape, meta), meta
        )
        must(all(abs(shift).max(initial=0) <= 30 for shift in (of_cols, of_rows)), "a shift")
        places = positions(parts["index"], meta.get("gap"), shape[0])
        must(len(places) == meta["kept"] and bool(own.any(1).all()), "kept")
        left = (left * 2.0**-of_rows).T * parts["scales"][:-1]
        right = right * 2.0**-of_cols
        delta = product(left.astype("<f4"), right.astype("<f4"), shape)
        sizes = 2.0 ** -(of_rows[0, places][:, None] + of_cols)
        delta[places] += own.astype("<f4") * parts["scales"][-1] * sizes.astype("<f4")
        return delta
    if codec == "coded":
        sizes = coded_sizes(codec, shape, meta)
        step = parts["steps"][:, None]
        step = step * parts["columns"] if meta["columns"] else step
        places = positions(parts["index"], meta.get("gap"), shape[0] if len(shape) > 1 else 1)
        must(len(places) == meta["kept"], "kept")
        found = np.zeros((shape[0] if len(shape) > 1 else 1, sizes[0][1]), np.float32)
        found[places] = rows_of_codes(parts, sizes, meta)[0].astype("<f4") * step
        return found.reshape(shape)
    if codec == "mask":
        return unpack(parts["bits"], numel, 1).astype("<f4").reshape(shape)
    if codec == "sparse_codebook":
        places = positions(parts["index"], meta.get("gap"), numel)
        must(len(places) == meta["kept"], "kept")
        flat = np.zeros(numel, np.float32)
        flat[places] = parts["levels"][unpack(parts["codes"], meta["kept"], meta["bits"])]
        return flat.reshape(shape)
    if codec == "seeded_sparse":
        places = seeded(meta["seed"], meta["rate"], numel)
        must(len(places) == meta["kept"], "kept")
        flat = np.zeros(numel, np.float32)
        flat[places] = parts["values"]
        return flat.reshape(shape)
    if codec == "sign_scales":
        signs = unpack(parts["signs"], numel, 1).astype(bool).reshape(shape)
        scales = np.expand_dims(parts["scales"], 1 - meta["axis"])
        return np.where(signs, scales, -scales)
    if codec == "sparse_low_rank":
        factors = []
        for side, cols in zip(("left", "right"), shape, strict=True):
            kept, *gap = meta[side]
            places = positions(parts[f"{side}_index"], gap or None, meta["rank"] * cols)
            must(len(places) == kept, "kept")
            flat = np.zeros(meta["rank"] * cols, np.float32)
            flat[places] = parts[side]
            factors.append(flat.reshape(meta["rank"], cols))
        return product(factors[0].T, factors[1], shape)
    if codec == "dct_patches":
        return patches(shape, meta, parts)
    if codec == "sign_scale":
        signs = unpack(parts["signs"], numel, 1).astype(bool)
        return np.where(signs, parts["scale"], -parts["scale"]).reshape(shape)
    grids = dequantized(parts["codes"], parts["scales"], grids_of(codec, shape, meta))
    if codec == "quantized":
        return grids[0]
    if codec == "quantized_product":
        grids[::2] = [left.T for left in grids[::2]]
    if codec == "sign_low_rank":
        grids += signed(parts["signs"], parts["sizes"], shape, meta["signs"])
    pairs = zip(grids[::2], grids[1::2], strict=True)
    return sum((product(left.T, right, shape) for left, right in pairs), np.zeros(shape, "f4"))


def coded_sizes(codec: str, shape: list[int], meta: dict[str, Any]) -> list[tuple[int, int]]:
    """Rows and columns of each matrix of codes."""
    if codec == "coded_low_rank":
        rows, cols = shape
        return [(1, cols), (1, rows), (meta["rank"], cols), (meta["rank"], rows)]
    if codec == "coded_table":
        rows, cols = shape
        rank = meta["rank"]
        return [(1, cols), (1, rows), (rank, cols), (rank, rows), (meta["kept"], cols)]
    if codec == "coded_low_rank_stack":
        stack, rows, cols = shape
        ranks = sum(meta["ranks"])
        return [(stack, cols), (stack, rows), (ranks, cols), (ranks, rows)]
    return [(meta["kept"], math.prod(shape[1:] if len(shape) > 1 else shape))]


def rows_of_codes(
    parts: dict[str, Array], sizes: list[tuple[int, int]], meta: dict[str, Any]
) -> list[Array]:
    kinds = np.split(parts["kinds"], np.cumsum([rows for rows, _ in sizes])[:-1])
    found = [np.zeros(size, "i8") for size in sizes]
    if meta["layout"] == "fast":
        data = parts["codes"]
        for matrix, widths in zip(found, kinds, strict=True):
            must(set(widths.tolist()) <= {0, 2, 4, 8, 16}, "width")
            for width in (2, 4, 8, 16):
                for row in np.flatnonzero(widths == width):
                    size = stream_bytes(matrix.shape[1], width)
                    matrix[row] = planar(data[:size], matrix.shape[1], width)
                    data = data[size:]
            for row, width in zip(matrix, widths, strict=True):
                bits = (
                    [int(max(row.max(), -1 - row.min(), 0)).bit_length() + 1] if row.any() else [0]
                )
                must(width == min(w for w in (0, 2, 4, 8, 16) if w >= bits[0]), "a wider row")
        must(not len(data), "bytes after the last row")
        must(all(int(abs(m).max()) <= 8191 for m in found if m.size), "a code beyond 8191")
        return found
    words = parts["codes"].tobytes()
    stack = [int.from_bytes(words[i : i + 4], "little") for i in range(0, len(words), 4)]
    must(not stack or stack[-1] > 0, "a last word of 0")
    state, top = 0, meta["top"]
    while state < 1 << 32 and stack:
        state = state << 32 | stack.pop()
    for kind in sorted({int(k) for each in kinds for k in each} - {0}):
        table = frequencies(kind, top)
        below = np.concatenate([[0], np.cumsum(table)])
        for matrix, each in zip(found, kinds, strict=True):
            for row in np.flatnonzero(each == kind):
                for j in range(matrix.shape[1]):
                    place = state % (1 << 24)
                    code = int(np.searchsorted(below, place, side="right")) - 1
                    state = int(table[code]) * (state >> 24) + place - int(below[code])
                    if state < 1 << 32 and stack:
                        state = state << 32 | stack.pop()
                    matrix[row, j] = code - top
    must(not state and not stack, "the stream goes on")
    must(max((int(abs(m).max()) for m in found if m.size), default=0) == top, "top")
    return found


def planar(data: Array, count: int, width: int) -> Array:
    if width >= 8:
        return data.view("i1" if width == 8 else "<i2").astype("i8")
    size = len(data)
    places = np.arange(size * (8 // width))
    codes = (data[places % size] >> (width * (places // size))) & ((1 << width) - 1)
    must(not codes[count:].any(), "a bit after the last code")
    codes = codes[:count].astype("i8")
    return np.where(codes >= 1 << (width - 1), codes - (1 << width), codes)


@cache
def frequencies(kind: int, top: int) -> list[int]:
    must(1 <= kind <= 120 and top > 0, "class")
    a, b = divmod(kind - 1, 40)
    m = 2.0 ** (b // 2 - 7) * (math.sqrt(2) if b % 2 else 1.0)
    q = (math.sqrt(1 + m * m) - 1) / m
    v = 3.14 * m * m + 0.5 * m
    g = v / (1 + v)
    one, two, r = [1.0], [1.0], g
    for _ in range(top):
        one.append(one[-1] * q)
        two.append(two[-1] * r)
        r = r * (g * g)
    sums = [math.fsum([ws[0]] + 2 * ws[1:]) for ws in (one, two)]
    both = [[w / s for w in ws] for ws, s in zip((one, two), sums, strict=True)]
    weights = both[a] if a < 2 else [(x + y) / 2 for x, y in zip(*both, strict=True)]
    tail = [1 + math.floor(w * (2**24 - 2 * top - 1)) for w in weights[1:]]
    return [*reversed(tail), 2**24 - 2 * sum(tail), *tail]


# --- lossless ---


def tuned(shape: list[int], meta: dict[str, Any], code: Array, base: Array | None) -> Array:
    """The bits of the tuned tensor, U16 or U32. base: values in F32."""
    rows, numel = shape[0] if shape else 1, math.prod(shape)
    dtype, (tables, low, words) = meta["dtype"], meta["bytes"]
    values = np.zeros(numel, "f4")
    if base is not None:
        values[: min(numel, base.size)] = base.reshape(-1)[:numel]
    found = patterns(values, dtype)
    parts = np.split(code, np.cumsum([len(code) - tables - low - words, tables, low]))
    chosen = np.arange(rows)
    if "rows" in meta:
        chosen = positions(parts[0], meta.get("gap"), rows)
        must(len(chosen) == meta["rows"], "rows")
    if not numel:
        return found.reshape(shape)
    table = found.reshape(rows, -1)
    before = table[chosen].reshape(-1)
    top, ones = 1 << 8 * found.itemsize - 1, (1 << 8 * found.itemsize) - 1
    exponents = before.astype("i8") >> MANTISSA[dtype] & (top >> MANTISSA[dtype]) - 1
    after = []
    for old, z in zip(before.tolist(), steps(exponents, *parts[1:]), strict=True):
        place = (old ^ ones if old & top else old ^ top) + (-(z + 1) // 2 if z % 2 else z // 2)
        place &= ones
        after.append(place ^ top if place & top else place ^ ones)
    table[chosen] = np.array(after, found.dtype).reshape(table[chosen].shape)
    return found.reshape(shape)


def all_finite(bits: Array, dtype: str) -> bool:
    """Whether no exponent is all ones."""
    ones = (1 << 8 * bits.itemsize - 1) - (1 << MANTISSA[dtype])
    return bool(((bits & ones) != ones).all())


def patterns(values: Array, dtype: str) -> Array:
    """The bits of values in F32 once they are rounded to the nearest of a dtype, halves to even."""
    if dtype == "F16":
        return values.astype("<f2").view("<u2")
    bits = values.view("<u4")
    if dtype == "F32":
        return bits.copy()
    return (bits + 0x7FFF + (bits >> 16 & 1) >> 16).astype("<u2")


def steps(exponents: Array, tables: Array, low: Array, words: Array) -> list[int]:
    """The numbers of a stream, in the order of the elements."""
    known = tables_of(tables.tolist())
    stack, state, found = words.view("<u4").tolist(), 0, []
    must(not stack or stack[-1] != 0, "last word")

    def refill() -> None:
        nonlocal state
        while state < 1 << 32 and stack:
            state = state << 32 | stack.pop()

    refill()
    for start in range(0, len(exponents), 1 << 18):
        block = exponents[start : start + (1 << 18)]
        mine = np.searchsorted([first for first, _ in known], block, side="right") - 1
        order = np.argsort(mine, kind="stable")
        tokens = []
        for element in order:
            quantile, (token, ends) = state % (1 << 24), known[mine[element]][1]
            place = bisect.bisect_right(ends, quantile) - 1
            state = (state >> 24) * (ends[place + 1] - ends[place]) + quantile - ends[place]
            refill()
            tokens.append(token + place)
        widths = np.array([max(0, token // 4 - 1) for token in tokens], "i8")
        rest = np.zeros(len(block), "i8")
        for width in range(1, int(widths.max(initial=0)) + 1):
            where = np.flatnonzero(widths == width)
            size = stream_bytes(len(where), width)
            rest[where], low = unpack(low[:size], len(where), width), low[size:]
        numbers = np.zeros(len(block), "i8")
        heads = np.array(tokens, "i8") - 4 * widths
        numbers[order] = (heads << widths) + rest
        found += numbers.tolist()
    must(not stack and state == 0 and not len(low), "the stream goes on")
    return found


def tables_of(data: list[int]) -> list[tuple[int, tuple[int, list[int]]]]:
    """(first exponent, (first token, sums of the frequencies before each token and in all)) of each table."""
    tables = []
    while data:
        (first, token, count), weights = data[:3], data[3 : 3 + data[2]]
        must(len(weights) == count > 0 and weights[0] > 0 < weights[-1], "table")
        must(first > tables[-1][0] if tables else first == 0, "contexts")
        worths = [w if w < 16 else (8 + w % 8) << (w // 8 - 1) for w in weights]
        shares = [max(1, (w << 24) // sum(worths)) if w else 0 for w in worths]
        shares[shares.index(max(shares))] += (1 << 24) - sum(shares)
        tables.append((first, (token, np.cumsum([0, *shares]).tolist())))
        data = data[3 + count :]
    return tables


def seeded(seed: int, rate: int, numel: int) -> Array:
    """The positions that a seed keeps."""
    x = np.arange(1, numel + 1, dtype="u8") * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed)
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return np.flatnonzero((x ^ x >> np.uint64(31)) >> np.uint64(16) < np.uint64(rate))


def signed(signs: Array, sizes: Array, shape: list[int], said: list[int]) -> list[Array]:
    """Factors (rank, out) and (rank, in) kept by signs."""
    rank, *groups = said
    bits, found = unpack(signs, rank * sum(shape), 1), []
    for cols, group in zip(shape, groups, strict=True):
        count = rank * -(-cols // group)
        scale = sizes[:count].reshape(rank, -(-cols // group))[:, np.arange(cols) // group]
        found.append(np.where(bits[: rank * cols].reshape(rank, cols) == 1, scale, -scale))
        bits, sizes = bits[rank * cols :], sizes[count:]
    return found


def kind_bits(kinds: list[Any]) -> int:
    return max(1, (len(kinds) - 1).bit_length())


def patches(shape: list[int], meta: dict[str, Any], parts: dict[str, Array]) -> Array:
    """The matrix of patches that are kept by their cosine transforms."""
    side, said = meta["patch"], meta["bits"]
    down, across = (-(-n // side) for n in shape)
    kinds = unpack(parts["kinds"], down * across, kind_bits(said))
    place = np.arange(side)
    cosines = np.cos(np.pi / side * (place[None] + 0.5) * place[:, None]) * np.sqrt(2 / side)
    cosines[0] = np.sqrt(1 / side)
    found = np.zeros((down * across, side, side))
    codes, scales = parts["codes"], parts["scales"]
    for kind, (bits, count) in enumerate(said):
        must(int((kinds == kind).sum()) == count, "patches of a kind")
        if bits:
            size = stream_bytes(count * side * side, bits)
            steps = unpack(codes[:size], count * side * side, bits) - (2**bits - 1) / 2
            found[kinds == kind] = scales[:count, None, None] * steps.reshape(-1, side, side)
            codes, scales = codes[size:], scales[count:]
    found = cosines.T @ found @ cosines
    whole = found.reshape(down, across, side, side).swapaxes(1, 2)
    return whole.reshape(down * side, across * side)[: shape[0], : shape[1]].astype("<f4")


def index_bytes(gap: list[int] | None, numel: int) -> int:
    width, count = gap or (1, numel)
    return stream_bytes(whole(count, 0, numel), whole(width, 1, 48))


def product(left: Array, right: Array, shape: list[int]) -> Array:
    return left @ right if math.prod(shape) else np.zeros(shape, np.float32)


def dequantized(codes: Array, scales: Array, grids: list[tuple[int, ...]]) -> list[Array]:
    found = []
    for rows, cols, bits, group in grids:
        groups = -(-cols // group)
        count = rows * cols + rows * groups
        exponent = int(codes[0].view(np.int8))
        must(-126 <= exponent <= 117, "exponent")
        end = 1 + stream_bytes(count, bits)
        if not rows:  # of which there may be any number of columns
            found.append(np.zeros((0, cols), np.float32))
            codes, scales = codes[end:], scales[rows * groups :]
            continue
        stream = unpack(codes[1:end], count, bits).astype(np.float32)
        column = np.arange(cols) // group
        zero = stream[rows * cols :].reshape(rows, groups)[:, column]
        scale = scales[: rows * groups].reshape(rows, groups)[:, column]
        steps = stream[: rows * cols].reshape(rows, cols) - zero
        found.append(scale * steps * np.float32(2.0**exponent))
        codes, scales = codes[end:], scales[rows * groups :]
    return found


def fingerprint(parameters: dict[str, Array]) -> str:
    """Of a base whose parameters are all F32."""
    digests = []
    for name in sorted(parameters):
        about = json.dumps([name, "float", list(parameters[name].shape)]).encode()
        values = np.ascontiguousarray(parameters[name], "<f4").tobytes()
        digests.append(hashlib.blake2b(about + values, digest_size=16).digest())
    return blake(b"".join(digests), 16)


# --- bits ---


def stream_bytes(count: int, width: int) -> int:
    return -(-count * width // 8)


def unpack(data: Array, count: int, width: int) -> Array:
    """The values of a stream, int64."""
    if width > 8:
        return data[:count].astype("i8") | unpack(data[count:], count, width - 8) << 8
    bits = np.unpackbits(data, bitorder="little").astype("i8")
    must(len(data) == stream_bytes(count, width) and not bits[count * width :].any(), "stream")
    return bits[: count * width].reshape(count, width) @ (1 << np.arange(width))


def positions(index: Array, gap: list[int] | None, numel: int) -> Array:
    if gap is None:
        return np.flatnonzero(unpack(index, numel, 1))
    width, count = gap
    place, found, keeps = -1, [], True
    for token in unpack(index, count, width).tolist():
        keeps = token != (1 << width) - 1
        place += token + keeps
        must(place < numel, "a position past the end")
        if keeps:
            found.append(place)
    must(keeps, "a skip at the end")
    return np.array(found, dtype="i8")


def array(data: bytes, dtype: str, shape: list[int]) -> Array:
    """A part, its values finite; narrow floats as F32."""
    raw = np.frombuffer(data, DTYPES[dtype][0]).reshape(shape)
    if dtype == "BF16":
        raw = (raw.astype("<u4") << 16).view("<f4")
    elif dtype == "F16":
        raw = raw.astype("f4")
    must(bool(np.isfinite(raw).all()), "a value is not finite")
    return raw
