"""How long merging one pack takes, beside copying the same weights: `python -m cl_graft.bench.merge`.

The weights are those of one decoder layer: four 2048 x 2048 and three 2048 x 5632 matrices. The pack has
quantised low-rank factors in groups of 8, 4, 3 and 2 bits, ranks chosen so that its file is the given
share of the weights' bytes in bfloat16. Random numbers: the time does not depend on them.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from cl_graft.skillpack import codecs
from cl_graft.skillpack.codecs import Encoded
from cl_graft.skillpack.codecs.quant import Quantized, groups_in
from cl_graft.skillpack.format.file import SkillPack, fingerprint
from cl_graft.skillpack.live.decode import factors
from cl_graft.skillpack.live.grafted import Grafted

SHAPES = ((2048, 2048),) * 4 + ((5632, 2048),) * 2 + ((2048, 5632),)
MIX = {8: 0.05, 4: 0.2, 3: 0.35, 2: 0.4}  # share of the ranks at each precision
GROUP = 128
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def bench_merge(
    share: float = 0.05,
    dtype: str = "bfloat16",
    shapes: Sequence[tuple[int, int]] = SHAPES,
    repeats: int = 9,
    threads: int = 1,
) -> dict[str, Any]:
    """Medians in milliseconds of `repeats` interleaved runs, and their ratios to the copy.

    copy: `copy_` into all weights. merge: `Grafted.activate([pack])` on the base, with the copies that
    bring it back. switch: the same while another pack is active. unload. product: the bare matrix
    products of decoded factors. decode: packed factors to matrices. share: pack bytes over the bytes of the
    weights in bfloat16. Raises KeyError for a dtype other than float32 and bfloat16.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        model = _layer(shapes, DTYPES[dtype])
        packs = [_pack(model, share, seed) for seed in (0, 1)]
        times = _times(_actions(model, packs), repeats)
    finally:
        torch.set_num_threads(before)
    numel = sum(p.numel() for p in model.parameters())
    ranks = [
        {bits: rank for rank, bits, *_ in encoded.meta["groups"]}
        for encoded in packs[0].tensors.values()
    ]
    over = {f"{name}_over_copy": ms / times["copy"] for name, ms in times.items() if name != "copy"}
    return {
        **over,
        **{f"{name}_ms": ms for name, ms in times.items()},
        "share": packs[0].nbytes / (2 * numel),
        "pack_bytes": packs[0].nbytes,
        "parameters": numel,
        "dtype": dtype,
        "shapes": [list(shape) for shape in shapes],
        "ranks": ranks,
        "group_size": GROUP,
        "threads": threads,
        "repeats": repeats,
        "torch": torch.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }


def _layer(shapes: Sequence[tuple[int, int]], dtype: torch.dtype) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=generator) * 0.02 for shape in shapes]
    return nn.ParameterList([nn.Parameter(w.to(dtype), requires_grad=False) for w in weights])


def _pack(model: nn.Module, share: float, seed: int) -> SkillPack:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: _low_rank((p.shape[0], p.shape[1]), share, generator)
        for name, p in model.named_parameters()
    }
    base = fingerprint(model.named_parameters())
    return SkillPack(tensors, f"task {seed}", "bench", {}, base)


def _low_rank(shape: tuple[int, int], share: float, generator: torch.Generator) -> Encoded:
    """A random delta of about 5 % of the weights' size, in `share` of the matrix's bfloat16 bytes."""
    scales = sum(groups_in(size, GROUP) for size in shape)
    of_rank = sum(part * (bits * sum(shape) + (16 + bits) * scales) for bits, part in MIX.items())
    ranks = share * 16 * shape[0] * shape[1] / of_rank
    pairs = []
    for bits, part in MIX.items():
        count = max(1, round(part * ranks))
        left, right = (_random(count, size, bits, ranks, generator) for size in shape)
        pairs.append((left, right))
    return codecs.quantized_low_rank(pairs, shape)


def _random(rows: int, cols: int, bits: int, ranks: float, generator: torch.Generator) -> Quantized:
    groups = (rows, groups_in(cols, GROUP))
    codes = torch.randint(0, 2**bits, (rows, cols), dtype=torch.uint8, generator=generator)
    scale = (0.1 / ranks**0.5 / 2**bits) ** 0.5 * (1 + torch.rand(groups, generator=generator))
    zero = torch.full(groups, 2 ** (bits - 1), dtype=torch.uint8)
    return Quantized(codes, scale.half(), zero, bits, min(GROUP, cols))


def _actions(model: nn.Module, packs: list[SkillPack]) -> dict[str, Callable[[], object]]:
    """The steps of one round, in their order: each finds the model as the one before left it."""
    grafted = Grafted(model)
    weights = dict(model.named_parameters())
    dtype = next(iter(weights.values())).dtype
    copies = {name: p.detach().clone() for name, p in weights.items()}
    decoded = {name: factors([encoded], dtype) for name, encoded in packs[0].tensors.items()}
    largest = max(p.numel() for p in weights.values())
    room = torch.empty(largest, dtype=dtype)

    def product(left: Tensor, right: Tensor) -> Tensor:
        shape = len(left), right.shape[1]
        return torch.mm(left, right, out=room[: shape[0] * shape[1]].view(shape))

    assert grafted.base == packs[0].base
    return {
        "copy": lambda: [p.copy_(copies[name]) for name, p in weights.items()],
        "merge": lambda: grafted.activate(packs[:1]),
        "switch": lambda: grafted.activate(packs[1:]),
        "unload": grafted.unload,
        "product": lambda: [product(*pair) for pair in decoded.values()],
        "decode": lambda: [factors([e], dtype) for e in packs[0].tensors.values()],
    }


def _times(actions: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median milliseconds of each; the first round, which warms up, is not counted."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(repeats + 1):
        for name, action in actions.items():
            begun = perf_counter()
            action()
            times[name].append(1e3 * (perf_counter() - begun))
    return {name: statistics.median(seconds[1:]) for name, seconds in times.items()}


if __name__ == "__main__":
    for dtype in DTYPES:
        for share in (0.05, 0.1):
            print(json.dumps(bench_merge(share, dtype)))
