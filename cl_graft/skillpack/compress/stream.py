"""The moments of calibrate.py for a checkpoint folder, in the memory of one decoder layer.

The model runs by its own code; only its weights come and go. Each decoder layer, and each module outside the
layers that has weights of its own, is a unit: entering one drops the weights of the last and loads its own.
The micro-batches run in turns, each in a thread that waits before a unit until the others have come to
it, so that a unit is loaded once a pass however many micro-batches there are. Exactly one thread runs at any
time, in a fixed order. Between units only the micro-batches' hidden states and masks are held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

from cl_graft.errors import CLGraftError
from cl_graft.models.experts import routed
from cl_graft.models.meta_model import MetaModel, Read
from cl_graft.models.roles import decoder_layers
from cl_graft.skillpack.compress.calibrate import (
    Batch,
    Moments,
    backward,
    bfloat16_pays,
    forward,
    headless,
    linear_layers,
    moments,
    watched,
)
from cl_graft.skillpack.compress.round_robin import RoundRobin
from cl_graft.skillpack.compress.sums import Sums, mean, text_of
from cl_graft.skillpack.folders.checkpoint import Checkpoint

Sink = Callable[[str, Tensor, list[str]], None]  # a group, its moment, the parameters that read it


def stream_moments(
    checkpoint: Checkpoint,
    meta: MetaModel,
    batches: Iterable[Batch],
    *,
    gradient_batches: Iterable[Batch] = (),
    device: str | torch.device = "cpu",
    sink: Sink | None = None,
    wanted: Callable[[str], bool] = lambda group: True,
    weights: Read | None = None,
    progress: Callable[[float], None] | None = None,
) -> Moments:
    """Moments of the checkpoint's model on the batches, in float32 on the CPU and in bfloat16 elsewhere.

    batches: each with input_ids and attention_mask, (sequences, length) int64; every batch's hidden states are
    held. gradient_batches: each with labels too, one at a time, for `outputs`; layers are loaded once for
    the forward pass and once more for the backward pass, which runs them anew. sink: called with each group,
    its moment (on `device`) and the parameters that read it as soon as a unit is done with and its weights are
    dropped; `inputs` of the result is then empty. wanted: which groups are summed up at all. weights: gives a
    unit's weights by the checkpoint's keys instead of `checkpoint.read`. progress: called with the fraction done.

    Where `meta.plain` is False (`meta.note` says why) the whole model is loaded. Raises CLGraftError
    for a model that runs a layer several times a pass, and what the model's own code raises.
    """
    texts = [_moved(batch, device) for batch in batches]
    labelled = [_moved(batch, device) for batch in gradient_batches]
    inputs: dict[str, Tensor] = {}
    deliver = (lambda group, moment, _: inputs.update({group: moment})) if sink is None else sink
    report = progress or (lambda done: None)
    if meta.plain:
        read = checkpoint.read if weights is None else weights
        measured = _streamed(meta, read, texts, labelled, device, deliver, wanted, report)
    else:
        measured = _whole(meta, checkpoint, weights, texts, labelled, device, deliver, wanted)
    report(1.0)
    return Moments(inputs, measured.reads, measured.outputs)


def _streamed(
    meta: MetaModel,
    read: Read,
    texts: Sequence[Batch],
    labelled: Sequence[Batch],
    device: str | torch.device,
    deliver: Sink,
    wanted: Callable[[str], bool],
    progress: Callable[[float], None],
) -> Moments:
    model, sums = meta.model, Sums(wanted=wanted)
    units, resident = _units(meta)
    layers = sum(unit.layer for unit in units)
    loads = bool(texts) * len(units) + len(labelled) * (len(units) + layers)
    loader = _Loader(meta, read, device, progress, max(1, loads))
    with loader.ready(resident):
        if texts:
            _inputs(model, units, loader, texts, sums, deliver)
        for batch in labelled:
            sums.text = text_of(batch)
            with watched(model, sums, True, inputs=False), _reloading(units, loader):
                backward(model, batch)
    tokens = sum(text_of(batch).tokens for batch in labelled)
    return Moments({}, sums.reads, sums.mean_outputs(max(1, tokens)))


def _whole(
    meta: MetaModel,
    checkpoint: Checkpoint,
    weights: Read | None,
    texts: Sequence[Batch],
    labelled: Sequence[Batch],
    device: str | torch.device,
    deliver: Sink,
    wanted: Callable[[str], bool],
) -> Moments:
    """transformers loads what the meta does not know how to."""
    model = (
        type(meta.model)
        .from_pretrained(
            None,
            config=deepcopy(meta.model.config),
            state_dict={key: (weights or checkpoint.read)(key) for key in checkpoint.tensors},
            dtype=_dtype(device),
        )
        .to(device)
    )
    outputs = moments(model, labelled).outputs if labelled else {}
    if not texts:
        return Moments({}, {}, outputs)
    measured = moments(model, texts, gradients=False, wanted=wanted)
    del model
    for group, hessian in measured.inputs.items():
        deliver(group, hessian, [name for name, read in measured.reads.items() if read == group])
    return Moments({}, measured.reads, outputs)


def _dtype(device: str | torch.device) -> torch.dtype:
    return torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16


def _moved(batch: Batch, device: str | torch.device) -> dict[str, Tensor]:
    return {name: x.to(device) for name, x in batch.items()}


# --- weights that come and go ---


class Slot(NamedTuple):
    """A parameter or persistent buffer of a module, and its name in the model."""

    module: nn.Module
    attribute: str
    name: str


@dataclass
class Unit:
    """Modules that are loaded together. layer: whether it is one of the decoder layers."""

    name: str
    module: nn.Module
    slots: list[Slot]
    layer: bool


def _units(meta: MetaModel) -> tuple[list[Unit], list[Slot]]:
    """The units, and what belongs to none: weights of modules that hold others, loaded throughout."""
    model = meta.model
    prefix, layers = decoder_layers(model)
    units = [
        Unit(name := f"{prefix}.{i}", layer, list(_slots(layer, name, meta)), True)
        for i, layer in enumerate(layers)
    ]
    inside = {id(module) for layer in layers for module in layer.modules()}
    resident: list[Slot] = []
    for name, module in model.named_modules():
        if id(module) in inside:
            continue
        own = [s for s in _slots(module, name, meta) if s.module is module]
        if any(next(child.parameters(), None) is not None for child in module.children()):
            resident += own
        elif own:
            units.append(Unit(name, module, own, False))
    return units, resident


def _slots(module: nn.Module, prefix: str, meta: MetaModel) -> Iterator[Slot]:
    for inner, owner in module.named_modules(prefix=prefix):
        stored = [n for n, p in owner._parameters.items() if p is not None]
        stored += [
            n
            for n, b in owner._buffers.items()
            if b is not None and n not in owner._non_persistent_buffers_set
        ]
        yield from (Slot(owner, n, f"{inner}.{n}".lstrip(".")) for n in stored)


@dataclass
class _Loader:
    """Loads weights unit by unit: at most those of one are in memory, of `unit`."""

    meta: MetaModel
    read: Read
    device: str | torch.device
    progress: Callable[[float], None]
    expected: int  # loads in all
    unit: Unit | None = None
    left: Callable[[], None] = lambda: None  # called when a unit's weights have been dropped
    loads: int = 0
    empty: dict[tuple[int, str], Tensor] = field(default_factory=dict)  # what was there before

    @cached_property
    def linear(self) -> set[int]:
        """The modules that multiply by a matrix, by their ids."""
        model = self.meta.model
        return {id(module) for module in (linear_layers(model) | routed(model)).values()}

    @contextmanager
    def ready(self, resident: Sequence[Slot]) -> Iterator[None]:
        """Hold buffers on the device and the resident weights loaded within; afterwards all is as before."""
        buffers = [(m, n, b) for m in self.meta.model.modules() for n, b in m._buffers.items()]
        try:
            for module, name, buffer in buffers:
                module._buffers[name] = None if buffer is None else buffer.to(self.device)
            self._fill(resident)
            yield
        finally:
            self.left = lambda: None
            self.drop()
            self._clear(resident)
            for module, name, buffer in buffers:
                module._buffers[name] = buffer

    def hold(self, unit: Unit) -> None:
        if self.unit is unit:
            return
        self.drop()
        self.unit = unit
        self._fill(unit.slots)
        self.loads += 1
        self.progress(min(1.0, self.loads / self.expected))

    def drop(self) -> None:
        if self.unit is not None:
            self._clear(self.unit.slots)
            self.unit = None
            self.left()

    def _fill(self, slots: Sequence[Slot]) -> None:
        strict = getattr(self.meta.model, "_keep_in_fp32_modules_strict", None) or ()
        on_cpu = torch.device(self.device).type == "cpu"
        rounded = self.linear if on_cpu and bfloat16_pays(self.meta.model) else set()
        for module, attribute, name in slots:
            tensor = self.meta.load(name, self.read)
            if tensor is None:  # a buffer that the checkpoint does not store
                continue
            was = getattr(module, attribute)
            self.empty[id(module), attribute] = was
            if isinstance(was, nn.Parameter):
                wide = any(part in name.split(".") for part in strict)
                dtype = torch.float32 if wide else _dtype(self.device)
                if id(module) in rounded and tensor.ndim > 1:  # once, not for every product
                    dtype = torch.bfloat16
                dtype = dtype if tensor.is_floating_point() else tensor.dtype
                tensor = nn.Parameter(tensor.to(self.device, dtype), requires_grad=False)
                module._parameters[attribute] = tensor
            else:
                module._buffers[attribute] = tensor.to(self.device, was.dtype)

    def _clear(self, slots: Sequence[Slot]) -> None:
        for module, attribute, _ in slots:
            was = self.empty.pop((id(module), attribute), None)
            if isinstance(was, nn.Parameter):
                module._parameters[attribute] = was
            elif was is not None:
                module._buffers[attribute] = was


# --- forwards in turns ---


def _inputs(
    model: nn.Module,
    units: Sequence[Unit],
    loader: _Loader,
    batches: Sequence[Batch],
    sums: Sums,
    deliver: Sink,
) -> None:
    """One pass over all batches; what each group reads is delivered when the unit that reads it is left."""
    texts = [text_of(batch) for batch in batches]
    tokens, delivered = max(1, sum(text.tokens for text in texts)), set[str]()
    late = _in_several(units)
    steps = RoundRobin()

    def finish(waiting: Iterable[str]) -> None:
        for group in waiting:
            if group in delivered:
                raise CLGraftError(
                    f"{type(model).__name__} runs {group} several times a pass, so its inputs cannot be "
                    "collected layer by layer; compress without calibration."
                )
            delivered.add(group)
            readers = [name for name, read in sums.reads.items() if read == group]
            with torch.autocast("cpu", enabled=False):  # what is done with it is not the model's
                deliver(group, mean(sums.inputs.pop(group), tokens), readers)

    def enter(unit: Unit, *_: Any) -> None:
        steps.pause()
        sums.text = texts[steps.current]
        loader.hold(unit)

    def early(group: str) -> bool:  # a module's, or that of one of its parameters
        return not {group, group.rpartition(".")[0]} & late

    loader.left = lambda: finish([group for group in sums.inputs if early(group)])
    head = model.get_output_embeddings()  # type: ignore[operator]
    entered = [u for u in units if u.module is not head]
    hooks = [u.module.register_forward_pre_hook(partial(enter, u), prepend=True) for u in entered]
    try:
        with watched(model, sums, False), headless(model):
            steps.run([partial(forward, model, batch) for batch in batches])
        loader.drop()
        finish(list(sums.inputs))
    finally:
        loader.left = lambda: None
        for hook in hooks:
            hook.remove()


def _in_several(units: Sequence[Unit]) -> set[str]:
    """Names, in their first unit, of modules that belong to several: their inputs are complete at the end only."""
    first: dict[int, tuple[Unit, str]] = {}
    shared = set()
    for unit in units:
        for name, module in unit.module.named_modules(prefix=unit.name):
            was = first.setdefault(id(module), (unit, name))
            if was[0] is not unit:
                shared.add(was[1])
    return shared


# --- backwards, layer by layer ---


@contextmanager
def _reloading(units: Sequence[Unit], loader: _Loader) -> Iterator[None]:
    """Units load themselves; decoder layers keep their inputs only and are loaded and run anew going back."""

    def load(unit: Unit, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        loader.hold(unit)
        return run(*args, **kwargs)

    for unit in units:
        body = partial(load, unit, unit.module.forward)
        again = partial(recomputed, body, use_reentrant=False, preserve_rng_state=False)
        unit.module.forward = again if unit.layer else body  # type: ignore[method-assign]
    try:
        yield
    finally:
        for unit in units:
            del unit.module.forward
        loader.drop()
