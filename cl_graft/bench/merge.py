"""How long merging one pack takes, beside the bare products of its factors: `python -m cl_graft.bench.merge`.

The weights are those of one decoder layer: four 2048 x 2048 and three 2048 x 5632 matrices; of two such layers, 103 M
parameters, where one pack is put in another's place. A pack holds `coded_low_rank`, its whole numbers of the spreads
that a planner gives them (large ones for the first singular vectors, below two for most), its ranks chosen so that in
its layout it is the given share of the weights' bytes in bfloat16. Random numbers: time depends on their sizes alone.
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
from cl_graft.skillpack.codecs import CodeLayout, Encoded
from cl_graft.skillpack.format.file import SkillPack, fingerprint
from cl_graft.skillpack.live.decode import factors
from cl_graft.skillpack.live.grafted import Grafted

SHAPES = ((2048, 2048),) * 4 + ((5632, 2048),) * 2 + ((2048, 5632),)
SPREADS = {
    8.0: 0.1,
    2.0: 0.3,
    1.0: 0.6,
}  # share of the ranks at each standard deviation of their codes
TRIAL = 100  # ranks of which the bytes of one are told
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def bench_merge(
    share: float = 0.05,
    dtype: str = "bfloat16",
    shapes: Sequence[tuple[int, int]] = SHAPES,
    repeats: int = 9,
    threads: int = 2,
    layout: CodeLayout = "fast",
) -> dict[str, Any]:
    """Medians in milliseconds of `repeats` interleaved runs, and their ratios.

    product: the bare matrix products of decoded factors. merge: `Grafted.activate([pack])` on the base, with the copies
    that bring it back. switch: the same while another pack is active. copy: `copy_` into all weights. unload. decode:
    packed factors to matrices. share: pack bytes over the bytes of the weights in bfloat16. small_decode_s_per_100mb:
    seconds in which a pack in layout "small" is decoded to factors, for 100 MB of weights in bfloat16. Raises
    KeyError for a dtype other than float32 and bfloat16.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        model = _layer(shapes, DTYPES[dtype])
        packs = [_pack(model, share, seed, layout) for seed in (0, 1)]
        times = _times(_actions(model, packs), repeats)
    finally:
        torch.set_num_threads(before)
    numel = sum(p.numel() for p in model.parameters())
    small = (
        {"small_decode_s_per_100mb": 1e-3 * times["decode"] * 5e7 / numel}
        if layout == "small"
        else {}
    )
    return {
        "merge_over_product": times["merge"] / times["product"],
        "switch_over_merge": times["switch"] / times["merge"],
        "merge_over_copy": times["merge"] / times["copy"],
        **small,
        **{f"{name}_ms": ms for name, ms in times.items()},
        "share": packs[0].nbytes / (2 * numel),
        "pack_bytes": packs[0].nbytes,
        "parameters": numel,
        "dtype": dtype,
        "layout": layout,
        "shapes": [list(shape) for shape in shapes],
        "ranks": [encoded.meta["rank"] for encoded in packs[0].tensors.values()],
        "threads": threads,
        "repeats": repeats,
        "torch": torch.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }


def _layer(shapes: Sequence[tuple[int, int]], dtype: torch.dtype) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=generator) * 0.02 for shape in shapes]
    return nn.ParameterList([nn.Parameter(w.to(dtype), requires_grad=False) for w in weights])


def _pack(model: nn.Module, share: float, seed: int, layout: CodeLayout) -> SkillPack:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: _low_rank((p.shape[0], p.shape[1]), share, layout, generator)
        for name, p in model.named_parameters()
    }
    base = fingerprint(model.named_parameters())
    return SkillPack(tensors, f"task {seed}", "bench", {}, base)


def _low_rank(
    shape: tuple[int, int], share: float, layout: CodeLayout, generator: torch.Generator
) -> Encoded:
    """A random delta of about 5 % of the weights' size, in `share` of the matrix's bfloat16 bytes."""
    ranks = min(TRIAL, *shape)
    of_rank = codecs.payload_bytes(*_random(shape, ranks, layout, generator).spec) / ranks
    wanted = round(share * 2 * shape[0] * shape[1] / of_rank)
    return _random(shape, min(max(1, wanted), *shape), layout, generator)


def _random(
    shape: tuple[int, int], rank: int, layout: CodeLayout, generator: torch.Generator
) -> Encoded:
    counts = [round(part * rank) for part in SPREADS.values()]
    spreads = torch.tensor([s for s, n in zip(SPREADS, counts, strict=True) for _ in range(n)])[
        :rank
    ]
    spreads = torch.cat([spreads, torch.ones(rank - len(spreads))])[:, None]
    left, right = (
        (torch.randn(rank, size, generator=generator) * spreads).round().to(torch.int16)
        for size in shape
    )
    scales = 0.001 / rank**0.5 / spreads.square().reshape(-1)
    return codecs.coded_low_rank(left, right, scales, shape, layout)


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
            print(json.dumps(bench_merge(share, dtype)), flush=True)
