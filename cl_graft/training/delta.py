"""Tuned minus start, read from a finished stage one tensor at a time: a model's delta is never whole in memory."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from cl_graft.skillpack.folders.checkpoint import Checkpoint


class Delta(Mapping[str, Tensor]):
    """{parameter name: float32 tensor on `device`}, made anew each time it is asked for.

    tuned: folder of a stage. start: what its training started from, by the same names. frozen: names that are left out.
    """

    def __init__(
        self,
        tuned: Path,
        start: Mapping[str, Tensor],
        device: torch.device | str,
        frozen: Collection[str] = (),
    ):
        self.tuned, self.start, self.device = Checkpoint(tuned), start, device
        self.names = dict.fromkeys(name for name in start if name not in frozen)  # in order

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.names:
            raise KeyError(name)
        return self.tuned.read(name).float().to(self.device) - self.start[name].float()

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)
