"""Tuned minus start, read from a finished stage one tensor at a time: a model's delta is never whole in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from cl_graft.skillpack.folders.checkpoint import Checkpoint


class Delta(Mapping[str, Tensor]):
    """{parameter name: float32 tensor on `device`}, made anew each time it is asked for.

    tuned: folder of a stage. start: what its training started from, by the same names.
    """

    def __init__(self, tuned: Path, start: Mapping[str, Tensor], device: torch.device | str):
        self.tuned, self.start, self.device = Checkpoint(tuned), start, device

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.start:
            raise KeyError(name)
        return self.tuned.read(name).float().to(self.device) - self.start[name].float()

    def __iter__(self) -> Iterator[str]:
        return iter(self.start)

    def __len__(self) -> int:
        return len(self.start)
