"""What the tuned model reads, of a checkpoint folder: kept on disk while that is little, else made anew each time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Literal

from torch import Tensor

from cl_graft.models.experts import routed
from cl_graft.models.meta_model import MetaModel, Read
from cl_graft.skillpack.compress.calibrate import Batch, Use, diagonal_of
from cl_graft.skillpack.compress.stream import stream_moments
from cl_graft.skillpack.compress.work_store import Item, WorkStore
from cl_graft.skillpack.folders.pair import Pairing


@dataclass(frozen=True)
class Calibration:
    """Text that the tuned model reads. batches: input_ids, attention_mask, labels, each (sequences, length) int64.

    gradient_batches: how many of them, from the first, also go through the backward pass that tells what each
    matrix's output is worth. prefix: whether layers read what the tuned model feeds them, or what the compressed
    one does (then everything is done twice, the second time behind the first result).
    """

    batches: Sequence[Batch]
    gradient_batches: int = 1
    prefix: Literal["tuned", "compressed"] = "tuned"


class Calibrated:
    """Moments by the names of the checkpoint's tensors; see `directions.Known`.

    Each visit loads and runs the model layer by layer, on the same text in the same order, so that moments have the
    same bits every time. Gradients, diagonals and what reads what are small, and go into the work store; so do the
    moments themselves where `keep` says that they are, and then the model is run once.
    """

    def __init__(
        self,
        pairing: Pairing,
        meta: MetaModel,
        calibration: Calibration,
        store: WorkStore,
        weights: Read | None,
        device: str,
        progress: Callable[[str, float], None],
        seconds: dict[str, float],
        keep: bool,
    ):
        self.store, self.progress, self.seconds, self.keep = store, progress, seconds, keep
        self.batches, self.routed = calibration.batches, routed(meta.model)
        self.parameters = [name for name, _ in meta.model.named_parameters()]
        self.stream = partial(stream_moments, pairing.tuned, meta, device=device, weights=weights)
        self.keys: dict[
            str, list[str]
        ] = {}  # parameter -> the tensors of the checkpoint that it is made of
        self.experts: dict[str, int] = {}  # tensor -> the expert whose matrix it is
        for change in pairing.changes:
            name = meta.parameter_of(change.source)
            if name is None or (meta.stacked_as(change.source) and meta.key_of(name) is None):
                continue  # a stack that transformers turns round on loading reads nobody knows what
            self.keys.setdefault(name, []).append(change.name)
            if (expert := meta.expert_of(change.source)) is not None:
                self.experts[change.name] = expert
        self.reads: dict[str, str] = {}
        for key in store:
            if key.startswith("diagonal/"):
                self._learn(key.removeprefix("diagonal/"), store[key].about["readers"])
        self.outputs = self._by_key(self._gradients(calibration), meta)

    def visit(self, use: Use, wanted: Callable[[str], bool]) -> None:
        """Run the model for the groups that are wanted; a first time for all that it reads."""
        if "visited" in self.store:
            groups = [group for group in self._groups() if wanted(group)]
            if all(f"moment/{group}" in self.store for group in groups):
                for group in groups:
                    use(group, self.store[f"moment/{group}"].tensors["moment"])
                return
        used = 0.0

        def reached(group: str, moment: Tensor, readers: list[str]) -> None:
            nonlocal used
            begun = perf_counter()
            self._learn(group, readers)
            if f"diagonal/{group}" not in self.store:
                about = {"readers": readers}
                self.store[f"diagonal/{group}"] = Item({"mean": diagonal_of(moment)}, about)
                if self.keep:
                    self.store[f"moment/{group}"] = Item({"moment": moment}, {})
            use(group, moment)
            used += perf_counter() - begun

        begun = perf_counter()
        self.stream(self.batches, sink=reached, wanted=wanted)
        if "visited" not in self.store:
            self.store["visited"] = Item({}, {})
        spent = perf_counter() - begun - used
        for kind, more in (
            ("calibrate", spent),
            ("compress", -spent),
        ):  # within which this is called
            self.seconds[kind] = self.seconds.get(kind, 0.0) + more

    def diagonal(self, name: str) -> Tensor | None:
        """Mean square of each input: see Moments."""
        group = self.reads.get(name)
        return None if group is None else self.store[f"diagonal/{group}"].tensors["mean"]

    def _groups(self) -> list[str]:
        """All that was visited, by the order of the parameters that read it: the same in a run that goes on."""
        first = [self.reads[name] for name in self.parameters if name in self.reads]
        return list(dict.fromkeys([*first, *sorted(set(self.reads.values()))]))

    def _learn(self, group: str, readers: Sequence[str]) -> None:
        for parameter in readers:
            self.reads |= {name: group for name in (parameter, *self.keys.get(parameter, ()))}

    def _gradients(self, calibration: Calibration) -> Mapping[str, Tensor]:
        if "gradients" not in self.store:
            measured = self.stream(
                [],
                gradient_batches=calibration.batches[: calibration.gradient_batches],
                progress=partial(self.progress, "calibrating"),
            )
            self.store["gradients"] = Item(measured.outputs, {})
        return self.store["gradients"].tensors

    def _by_key(self, outputs: Mapping[str, Tensor], meta: MetaModel) -> dict[str, Tensor]:
        """Gradients by parameter and by the checkpoint's tensors, but for those that are a part of a parameter; of a
        tensor of one expert those of all that its expert writes there."""
        named = {}
        for name, keys in self.keys.items():
            for key in keys if name in outputs else ():
                if key in self.experts:
                    named[key] = outputs[name][self.experts[key]]
                elif meta.key_of(name) is not None:
                    named[key] = outputs[name]
        return {**outputs, **named}

    @property
    def notes(self) -> list[str]:
        """A sentence about experts that no token of the text was routed to."""
        idle = []
        for key in sorted(self.store):
            name = key.removeprefix("diagonal/")
            if key != name and name in self.routed:
                counts = self.store[key].tensors["mean"]
                if none := int((counts == 0).sum()):
                    idle.append(f"{none} of {len(counts)} in {name}")
        return [_told(idle)] if idle else []


def _told(idle: Sequence[str]) -> str:
    return (
        f"No token of the calibration text reached some experts ({', '.join(idle)}): they are factorised as without "
        "calibration; give more text to calibrate on."
    )


@contextmanager
def timed(seconds: dict[str, float], kind: str) -> Iterator[None]:
    """Add the seconds of a block to one kind of work."""
    begun = perf_counter()
    try:
        yield
    finally:
        seconds[kind] = seconds.get(kind, 0.0) + perf_counter() - begun
