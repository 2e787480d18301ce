"""PCB-Merging: weigh each entry within its task and among the tasks, drop, rescale (Du et al. 2024, arXiv 2410.02396).

Of T tasks with deltas D_t, over the entries of all parameters together, as in duguodong7/pcb-merging (pcb-merging.py):
C_t = D_t with magnitudes clipped at the 0.01 % smallest and largest; intra-balancing exp(T m(|C_t|)^2), where m goes
from the least to the largest, 0 to 1; inter-balancing tanh(D_t sum D); of their product the largest share stays, and
goes from the last that is dropped to the largest, 0 to 1: w_t. The delta is sum w_t C_t / sum w_t, scaled. The paper
writes softmax for both; the divisor of the first is one number a task, which "0 to 1" takes out again.

The delta, unscaled, is the shared artefact `vector`, bf16, made anew after each task from every task's delta in bf16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Annotated

import torch
from torch import Tensor

from cl_graft.ranges import Part, Positive, Strength
from cl_graft.skillpack.codecs import decode, dense
from cl_graft.strategy import Kept, Strategy
from cl_graft.strategy.choose import composed_scaled, kept_scaled
from cl_graft.strategy.context import Context
from cl_graft.strategy.kept import Tensors
from cl_graft.task import Task

GRID = (0.8, 0.9, 1.0, 1.1, 1.2, 1.3)
TAIL = 1e-4
# entries at a time, of which several copies a task are held
PART = 1 << 20
HALF = 1 << 15

Blocks = Callable[[], Iterator[Tensor]]


class pcb(Strategy):
    """density: share of each task's entries that is not dropped, over all parameters; the released code
    has 0.1 and, for vision, 0.05.

    scale: factor on the result; None chooses it among 0.8, 0.9, ..., 1.3, where the released code searches one factor a
    task, by the loss on the validation data of all tasks seen, anew after each task; its fixed one is 1.2. One task
    alone is itself.
    """

    keeps = "merged"
    budgeted = False

    def learn(
        self,
        task: Task,
        context: Context,
        *,
        density: Annotated[Part, Strength(0.02, 0.05, 0.1, 0.2, 0.5)] = 0.1,
        scale: Positive | None = None,
    ) -> Kept:
        own = context.dense(self.fine_tune(task, context))
        if not self.packs:
            return Kept(own)
        merged = balanced([*(pack.tensors for pack in self.packs), own], density)
        vector = {name: dense(delta) for name, delta in merged}
        return kept_scaled(self, task, own, vector, GRID, scale)

    # by the recipe alone, so that its stages are those of all methods that train from the base
    learn.pure = True

    def compose(self, task):
        return composed_scaled(self)


def balanced(deltas: Sequence[Tensors], density: float) -> Iterator[tuple[str, Tensor]]:
    """(parameter, its merged delta, float32, unscaled), from the tasks' deltas {parameter: encoded}.

    One parameter's are decoded at a time: twice for the magnitudes to clip at, twice for what is dropped, and once to
    merge.
    """
    names = list(deltas[0])
    count = sum(decode(deltas[0][name]).numel() for name in names)

    def blocks() -> Iterator[Tensor]:
        for name in names:
            parts = [decode(tensors[name]).flatten().split(PART) for tensors in deltas]
            yield from map(torch.stack, zip(*parts, strict=True))

    ends = [int(count * TAIL), int(count * (1 - TAIL) - 1)]
    low, high = ranked(lambda: (block.abs() for block in blocks()), ends).split(1, dim=1)

    def balances() -> Iterator[Tensor]:
        for block in blocks():
            intra = spread(block.abs(), low, high).square_().mul_(len(deltas)).exp_()
            yield intra.mul_((block * block.sum(0)).tanh_())

    last = [int(count * (1 - density)), count - 1]
    least, most = ranked(balances, last).split(1, dim=1)
    pairs = zip(blocks(), balances(), strict=True)
    for name in names:
        merged = torch.empty_like(decode(deltas[0][name]))
        for to in merged.view(-1).split(PART):
            block, balance = next(pairs)
            weight = spread(balance, least, most)
            clipped = block.abs().clamp_(low, high).mul_(block.sign())
            to.copy_((clipped * weight).sum(0) / weight.sum(0).clamp_min_(1e-12))
        yield name, merged


def spread(x: Tensor, least: Tensor, most: Tensor) -> Tensor:
    """x (T, n), clipped, from 0 at `least` to 1 at `most`, each (T, 1); where these are one, 0."""
    width = most - least
    return (x.clamp(least, most) - least) / torch.where(width > 0, width, 1.0)


def ranked(blocks: Blocks, ranks: Sequence[int]) -> Tensor:
    """float32 (T, ranks): of each row, over blocks (T, n), the entries of these ranks from the smallest on, exactly.

    Two counts, of the upper and of the lower 16 bits, find them without ever sorting or holding all.
    """
    upper = sum(
        torch.stack([torch.bincount((row >> 16) + HALF, minlength=2 * HALF) for row in keys(block)])
        for block in blocks()
    )
    above = upper.cumsum(1)
    wanted = torch.tensor(ranks).expand(len(above), -1).contiguous()
    place = torch.searchsorted(above, wanted, right=True)
    before = (above - upper).gather(1, place)
    lower = torch.zeros(*place.shape, 2 * HALF, dtype=torch.int64)
    for block in blocks():
        for row, places, counts in zip(keys(block), place - HALF, lower, strict=True):
            for at, into in zip(places, counts, strict=True):
                into += torch.bincount(row[(row >> 16) == at] & 0xFFFF, minlength=2 * HALF)
    rest = (wanted - before).unsqueeze(2)
    low = torch.searchsorted(lower.cumsum(2), rest, right=True).squeeze(2)
    return keys(((place - HALF) * 2 * HALF + low).to(torch.int32).view(torch.float32)).view(
        torch.float32
    )


def keys(x: Tensor) -> Tensor:
    """int32, in the order of these float32; of keys, as float32, the numbers."""
    bits = x.contiguous().view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)
