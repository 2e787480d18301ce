"""Values that somewhere in a header may mean something, or nothing."""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

from cl_graft.skillpack import codecs
from cl_graft.skillpack.codecs.coded_rows import LAYOUTS

NUMBERS = [-1, 0, 1, 2, 3, 5, 7, 8, 64, 65, 1 << 16, 1 << 31, 1 << 47, 1 << 48, 1 << 63, 10**30]
WORDS = ["", "F16", "BF16", "F32", "F64", "I8", *codecs.CODECS, *LAYOUTS, "zip"]
WORDS += ["a.weight", "b.bias", "\u0000", "\ud800", "e\u0301"]
OTHERS = [None, True, False, 0.5, 1e308, -0.0, float("nan"), float("inf"), {}, [], [[]], "x" * 5000]
BOMB = zlib.compress(bytes(100 << 20), 9)  # 100 KiB
FILE_NAMES = [
    *("config.json", "tokenizer_config.json", "tokenizer.json", "vocab.txt", "chat_template.jinja"),
    *("generation_config.json", "additional_chat_templates/x.jinja", "../config.json", "x.py", ""),
]
CONTENTS = [
    *(b"", b"{}", b'{"a":[1,{"b":null}]}', b'{"a":{"auto_map":0}}', b"{{ x }}" * 999, bytes(9999)),
    *(b"[" * 9999 + b"]" * 9999, b'{"":' * 9999, b'{"a":' + b"9" * 9999 + b"}", b'{"a":"\xff"}'),
    b'{"a":[' + b"[]," * 9_999 + b"[]]}",
]
SIZES = [0, 0, 1, 2, 6, 8, 1 << 10, 1 << 22, 1 << 24, 1 << 40, 1 << 48]
COUNTS = [0, 0, 1, 2, 3, 8, 1 << 20, 1 << 48]


def anything(rng: random.Random, depth: int = 0) -> Any:
    """Any JSON value, and some that JSON does not have."""
    pick = rng.random()
    if pick < 0.3:
        return rng.choice(NUMBERS)
    if pick < 0.5:
        return rng.choice(WORDS)
    if pick < 0.6 or depth > 2:
        return rng.choice(OTHERS)
    if pick < 0.7:
        return json.loads("[" * 100 + "]" * 100)
    if pick < 0.9:
        return [anything(rng, depth + 1) for _ in range(rng.choice([1, 2, 2, 4, 9]))]
    return {str(anything(rng, 3)): anything(rng, depth + 1) for _ in range(rng.randint(1, 3))}


def places(value: Any, where: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path to everything inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        yield (*where, key)
        if isinstance(inner, dict | list):
            yield from places(inner, (*where, key))


def inside(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def edited(about: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """Another value in one to three places, or a field more, less or under another name."""
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        *path, last = rng.choice(list(places(about)))
        inner = inside(about, tuple(path))
        pick = rng.random()
        if pick < 0.1:
            del inner[last]
        elif pick < 0.2 and isinstance(inner, dict):
            inner[rng.choice(WORDS)] = inner.pop(last)
        elif pick < 0.3:
            items = list(inner.items()) if isinstance(inner, dict) else list(inner)
            rng.shuffle(items)
            inner.clear()
            inner.update(items) if isinstance(inner, dict) else inner.extend(items)
        elif pick < 0.5 and type(inner[last]) is int:
            inner[last] += rng.choice([-1, 1, 8, 1 << 40])
        else:
            inner[last] = deepcopy(anything(rng))  # which later edits may reach into
        if not about:
            break
    return about


def strange_shape(rng: random.Random) -> list[int]:
    dims = rng.choice([2, 2, 2, rng.randint(0, 9)])
    sizes = [rng.choice(SIZES) for _ in range(dims)]
    return rng.choice([[6, 8], sizes, sizes, [0, 1 << 48, 1 << 48]])  # the last: strides overflow


def strange_spec(shape: list[int], rng: random.Random) -> list[Any]:
    """A tensor of any codec, many of them as small in bytes as they are large in elements."""
    group = [rng.choice(COUNTS), rng.choice([2, 8]), rng.choice(COUNTS) or 1, 1]
    lies = {"layout": rng.choice([*LAYOUTS, "zip"]), "bytes": rng.choice([0, 4, *COUNTS])}
    lies |= {"top": rng.choice([0, 1, 8191, 8192])} if lies["layout"] != "fast" else {}
    metas: dict[str, Any] = {
        "dense": {"dtype": rng.choice(["F32", "F16", "BF16"])},
        "exact": {"dtype": rng.choice([*codecs.STORABLE, "I8"])},
        "sparse": {"dtype": "BF16", "kept": rng.choice(COUNTS)},
        "low_rank": {"dtype": "F16", "rank": rng.choice(COUNTS)},
        "low_rank_stack": {"dtype": "F16", "rank": rng.choice(COUNTS)},
        "quantized": {"bits": rng.choice([2, 3, 4, 8]), "group_size": rng.choice(COUNTS) or 1},
        "quantized_low_rank": {"groups": [group] * rng.choice([0, 1, 3, 64, 65])},
        "sign_scale": {},
        "mask": {},
        "coded_low_rank": {"rank": rng.choice(COUNTS), **lies},
        "coded_low_rank_stack": {"ranks": [rng.choice(COUNTS)] * rng.choice([1, 2]), **lies},
        "coded_table": {"rank": rng.choice(COUNTS), "kept": rng.choice(COUNTS), **lies},
        "coded": {"kept": rng.choice(COUNTS), "columns": rng.choice([0, 1, 2]), **lies},
        "lossless": {
            "dtype": rng.choice(["F32", "F16", "BF16"]),
            "bytes": [rng.choice(COUNTS), rng.choice(COUNTS), 4 * rng.choice(COUNTS)],
        },
        "sign_scales": {"axis": rng.choice([0, 1, 2])},
        "sparse_codebook": {"bits": rng.choice([1, 8, 9]), "kept": rng.choice(COUNTS)},
        "seeded_sparse": {
            "dtype": "F16",
            "kept": rng.choice(COUNTS),
            "seed": rng.choice(COUNTS),
            "rate": rng.choice([1 << 41, 1 << 48]),
        },
        "sparse_low_rank": {
            "dtype": "F16",
            "rank": rng.choice(COUNTS),
            "left": [rng.choice(COUNTS)],
            "right": [0, rng.choice([1, 48]), rng.choice(COUNTS)],
        },
        "sign_low_rank": {"grid": group, "signs": [rng.choice(COUNTS), 1, 4]},
        "quantized_product": {"groups": [group] * rng.choice([0, 1, 64])},
        "dct_patches": {"patch": rng.choice([1, 256]), "bits": [[rng.choice([0, 8]), 1]]},
    }
    if rng.random() < 0.5:
        metas["lossless"] |= {"rows": rng.choice(COUNTS)}
    for codec in ("sparse", "coded", "coded_table"):
        gap = [rng.choice([1, 2, 9, 48, 49]), rng.choice(COUNTS)]
        metas[codec] |= rng.choice([{}, {"gap": gap}])
    codec = rng.choice(
        [*codecs.CODECS, "low_rank", "coded_low_rank", "coded_table", "coded", "lossless"]
    )
    return [codec, shape, metas[codec]]
