"""Second moments of what base + pack reads, so that a folder of it can be rounded by what its layers compute."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from cl_graft.errors import CLGraftError
from cl_graft.models.experts import stacked
from cl_graft.models.meta_model import MetaModel, meta_model
from cl_graft.skillpack.compress.calibrate import Batch
from cl_graft.skillpack.compress.stream import stream_moments
from cl_graft.skillpack.compress.work_store import Folder, Item
from cl_graft.skillpack.folders.apply import summed
from cl_graft.skillpack.folders.checkpoint import Checkpoint
from cl_graft.skillpack.folders.form import Compensate
from cl_graft.skillpack.format.file import SkillPack
from cl_graft.skillpack.rounding import compensated


@contextmanager
def compensation(
    base: Checkpoint,
    pack: SkillPack,
    batches: Sequence[Batch],
    beside: Path,
    progress: Callable[[float], None] = lambda done: None,
) -> Iterator[Compensate]:
    """What `Form.compensate` wants: `rounding.compensated` under the inputs that base + pack reads on these texts.

    batches: input_ids and attention_mask, (sequences, length) int64. beside: the moments lie in a folder there
    meanwhile, 4 bytes times the square of each layer's input width. progress: called with the fraction done.

    Tensors that multiply no measured input (embeddings, norms, biases) have no such rounding, nor have experts, whose
    moments would take as much as the model. Raises CLGraftError where the disk has no room, and as `stream_moments`.
    """
    meta = meta_model(base.folder)
    experts = stacked(meta.model)

    def read(name: str) -> Tensor:
        same = name in pack.tensors and name not in pack.grown
        return summed(base, pack, name) if same else base.read(name)

    with TemporaryDirectory(dir=beside, prefix=".moments-") as folder:
        _check_disk(meta, Path(folder))
        store = Folder(Path(folder))

        def keep(group: str, moments: Tensor, readers: list[str]) -> None:
            store[group] = Item({"moments": moments}, {})

        found = stream_moments(
            base,
            meta,
            batches,
            sink=keep,
            wanted=lambda group: group not in experts,
            weights=read,
            progress=progress,
        )

        def rounded(name: str, x: Tensor, dtype: torch.dtype, seed: int) -> Tensor | None:
            group = found.reads.get(meta.parameter_of(name) or "")
            if x.ndim != 2 or group is None or group not in store:
                return None
            hessian, across = store[group].tensors["moments"], meta.is_transposed(name)
            x = x.T if across else x
            if hessian.shape != (x.shape[1],) * 2:
                return None
            made = compensated(x, dtype, hessian, seed)
            return made.T.contiguous() if across else made

        yield rounded


def _check_disk(meta: MetaModel, folder: Path) -> None:
    """Raise CLGraftError where the second moments of all layers' inputs will not fit into a folder."""
    widths = [p.shape[-1] for p in meta.model.parameters() if p.ndim == 2]
    needed, free = 4 * sum(w * w for w in widths) // 2, shutil.disk_usage(folder).free
    if free < needed:
        raise CLGraftError(
            f"second moments of the layers' inputs take about {needed / 1e9:.1f} GB for a while, and {folder} has "
            f"{free / 1e9:.1f} GB left; free some, or write the model elsewhere."
        )
