"""tracking/tensorboard: scalars and figures under W&B's names."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from cl_graft.config import RunConfig
from cl_graft.tracking import along, figures, of_experience, of_point, of_result


def tracker(config: RunConfig, folder: Path, identity: dict[str, Any]) -> TensorBoard:
    return TensorBoard(folder / "tracking")


class TensorBoard:
    """Scores are over experiences; training curves over steps, counted through all experiences."""

    name = "TensorBoard"

    def __init__(self, folder: Path):
        self.folder = folder / "tensorboard"
        self.steps = self.experiences = 0

    @cached_property
    def writer(self) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        # TensorBoard shows nothing that was written before this: a continued cell tells all of it again
        return SummaryWriter(str(self.folder), purge_step=0)

    def experience(self, record: dict[str, Any]) -> None:
        for step, point in along(record["losses"], self.steps):
            self._scalars(of_point(point), step)
            self.steps = step
        self.experiences = record["experience"]
        self._scalars(of_experience(record), self.experiences)
        self.writer.flush()

    def finish(self, result: dict[str, Any]) -> None:
        import numpy as np

        self._scalars(of_result(result), self.experiences)
        for name, image in figures(result).items():
            pixels = np.asarray(image.convert("RGB"))
            self.writer.add_image(name, pixels, self.experiences, dataformats="HWC")
        self.writer.close()

    def abandon(self, error: BaseException) -> None:
        if "writer" in self.__dict__:
            self.writer.close()

    def _scalars(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
