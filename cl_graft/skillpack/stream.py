"""The moments of calibrate.py for a checkpoint folder, in the memory of one decoder layer.

The model runs by its own code; only its weights come and go. Each decoder layer, and each module outside the
layers that has weights of its own, is a unit: entering one drops the weights of the last and loads its own.
The micro-batches run in lockstep, each in a thread that waits before a unit until the others have come to
it, so that a unit is loaded once a pass however many micro-batches there are. Exactly one thread runs at any
time, in a fixed order. Between units only the micro-batches' hidden states and masks are held.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Semaphore, Thread
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

from ..errors import CLGraftError
from ..models.roles import decoder_layers
from ..models.skeleton import Read, Skeleton
from ..models.text import encode
from .calibrate import Batch, Moments, Sums, backward, forward, headless, moments, text_of, watched
from .checkpoint import Checkpoint

Sink = Callable[[str, Tensor], None]


def stream_moments(
    checkpoint: Checkpoint,
    skeleton: Skeleton,
    batches: Iterable[Batch],
    *,
    gradient_batches: Iterable[Batch] = (),
    device: str | torch.device = "cpu",
    sink: Sink | None = None,
    weights: Read | None = None,
    progress: Callable[[float], None] | None = None,
) -> Moments:
    """Moments of the checkpoint's model on the batches, in float32 on the CPU and in bfloat16 elsewhere.

    batches: each with input_ids and attention_mask, (sequences, length) int64; every batch's hidden states are
    held. gradient_batches: each with labels too, one at a time, for `outputs`; layers are loaded once for
    the forward pass and once more for the backward pass, which runs them anew. sink: called with each group
    and its moments (on `device`) as soon as a unit is done with; `inputs` of the result is then the sink
    itself where that is a Mapping, else empty, for the caller to set. weights: gives a unit's weights by the
    checkpoint's keys instead of `checkpoint.read`. progress: called with the fraction done.

    Where `skeleton.plain` is False (`skeleton.note` says why) the whole model is loaded. Raises CLGraftError
    for a model that runs a layer several times a pass, and what the model's own code raises.
    """
    texts = [_moved(batch, device) for batch in batches]
    labelled = [_moved(batch, device) for batch in gradient_batches]
    inputs: dict[str, Tensor] = {}
    deliver = inputs.__setitem__ if sink is None else sink
    report = progress or (lambda done: None)
    if skeleton.plain:
        read = checkpoint.read if weights is None else weights
        found = _streamed(skeleton, read, texts, labelled, device, deliver, report)
    else:
        found = _whole(skeleton, checkpoint, weights, texts, labelled, device, deliver)
    report(1.0)
    return Moments(sink if isinstance(sink, Mapping) else inputs, found.reads, found.outputs)


def _streamed(
    skeleton: Skeleton,
    read: Read,
    texts: Sequence[Batch],
    labelled: Sequence[Batch],
    device: str | torch.device,
    deliver: Sink,
    progress: Callable[[float], None],
) -> Moments:
    model, sums = skeleton.model, Sums()
    units, resident = _units(skeleton)
    layers = sum(unit.layer for unit in units)
    loads = bool(texts) * len(units) + len(labelled) * (len(units) + layers)
    loader = _Loader(skeleton, read, device, progress, max(1, loads))
    with loader.ready(resident):
        if texts:
            _inputs(model, units, loader, texts, sums, deliver)
        for batch in labelled:
            sums.text = text_of(batch)
            with watched(model, sums, True, inputs=False), _reloading(units, loader):
                backward(model, batch)
    tokens = sum(text_of(batch).tokens for batch in labelled)
    return Moments({}, sums.reads, {n: x.div_(max(1, tokens)) for n, x in sums.outputs.items()})


def _whole(
    skeleton: Skeleton,
    checkpoint: Checkpoint,
    weights: Read | None,
    texts: Sequence[Batch],
    labelled: Sequence[Batch],
    device: str | torch.device,
    deliver: Sink,
) -> Moments:
    """transformers loads what the skeleton does not know how to."""
    model = (
        type(skeleton.model)
        .from_pretrained(
            checkpoint.folder if weights is None else None,
            config=deepcopy(skeleton.model.config),
            state_dict=None
            if weights is None
            else {key: weights(key) for key in checkpoint.tensors},
            use_safetensors=True,
            dtype=_dtype(device),
        )
        .to(device)
    )
    found = moments(model, texts, gradients=False)
    for group, hessian in found.inputs.items():
        deliver(group, hessian)
    outputs = moments(model, labelled).outputs if labelled else {}
    return Moments({}, found.reads, outputs)


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


def _units(skeleton: Skeleton) -> tuple[list[Unit], list[Slot]]:
    """The units, and what belongs to none: weights of modules that hold others, loaded throughout."""
    model = skeleton.model
    prefix, layers = decoder_layers(model)
    units = [
        Unit(name := f"{prefix}.{i}", layer, list(_slots(layer, name, skeleton)), True)
        for i, layer in enumerate(layers)
    ]
    inside = {id(module) for layer in layers for module in layer.modules()}
    resident: list[Slot] = []
    for name, module in model.named_modules():
        if id(module) in inside:
            continue
        own = [s for s in _slots(module, name, skeleton) if s.module is module]
        if any(next(child.parameters(), None) is not None for child in module.children()):
            resident += own
        elif own:
            units.append(Unit(name, module, own, False))
    return units, resident


def _slots(module: nn.Module, prefix: str, skeleton: Skeleton) -> Iterator[Slot]:
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
    """At most one unit's weights are in memory, those of `unit`."""

    skeleton: Skeleton
    read: Read
    device: str | torch.device
    progress: Callable[[float], None]
    expected: int  # loads in all
    unit: Unit | None = None
    left: Callable[[], None] = lambda: None  # called before a unit's weights are dropped
    loads: int = 0
    empty: dict[tuple[int, str], Tensor] = field(default_factory=dict)  # what was there before

    @contextmanager
    def ready(self, resident: Sequence[Slot]) -> Iterator[None]:
        """With buffers on the device and the resident weights loaded; afterwards as it was before."""
        buffers = [(m, n, b) for m in self.skeleton.model.modules() for n, b in m._buffers.items()]
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
            self.left()
            self._clear(self.unit.slots)
            self.unit = None

    def _fill(self, slots: Sequence[Slot]) -> None:
        strict = getattr(self.skeleton.model, "_keep_in_fp32_modules_strict", None) or ()
        for module, attribute, name in slots:
            tensor = self.skeleton.load(name, self.read)
            if tensor is None:  # a buffer that the checkpoint does not store
                continue
            was = getattr(module, attribute)
            self.empty[id(module), attribute] = was
            if isinstance(was, nn.Parameter):
                wide = any(part in name.split(".") for part in strict)
                dtype = torch.float32 if wide else _dtype(self.device)
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


# --- forwards in lockstep ---


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
    steps = Lockstep()

    def finish(waiting: Iterable[str]) -> None:
        for group in waiting:
            if group in delivered:
                raise CLGraftError(
                    f"{type(model).__name__} runs {group} several times a pass, so its inputs cannot be "
                    "collected layer by layer; compress without calibration."
                )
            delivered.add(group)
            deliver(group, sums.inputs.pop(group).div_(tokens))

    def enter(unit: Unit, *_: Any) -> None:
        steps.pause()
        sums.text = texts[steps.current]
        loader.hold(unit)

    loader.left = lambda: finish([g for g in sums.inputs if g not in late])
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
    found = set()
    for unit in units:
        for name, module in unit.module.named_modules(prefix=unit.name):
            was = first.setdefault(id(module), (unit, name))
            if was[0] is not unit:
                found.add(was[1])
    return found


class _Stopped(BaseException):
    """Thrown into the threads that still wait when one has failed; no library's `except Exception` holds it."""


@dataclass
class _Lane:
    go: Semaphore = field(default_factory=lambda: Semaphore(0))
    back: Semaphore = field(default_factory=lambda: Semaphore(0))
    thread: Thread | None = None
    done: bool = False


@dataclass
class Lockstep:
    """Jobs that take turns: each runs, alone, until it calls `pause`, and goes on when all others have done so."""

    current: int = 0  # the job whose turn it is
    _lanes: list[_Lane] = field(default_factory=list)
    _errors: list[BaseException] = field(default_factory=list)
    _stopping: bool = False

    def run(self, jobs: Sequence[Callable[[], None]]) -> None:
        """Returns when all have ended. Raises the first error in any of them, when all have been stopped."""
        self._lanes = [_Lane() for _ in jobs]
        for lane, job in zip(self._lanes, jobs, strict=True):
            lane.thread = Thread(target=self._work, args=(lane, job), daemon=True)
        try:
            while any(not lane.done for lane in self._lanes):
                for turn, lane in enumerate(self._lanes):
                    self.current = turn
                    if not lane.done:
                        self._resume(lane)
        finally:
            self._stop()

    def pause(self) -> None:
        """Called in a job."""
        if self._stopping:
            raise _Stopped
        lane = self._lanes[self.current]
        lane.back.release()
        lane.go.acquire()
        if self._stopping:
            raise _Stopped

    def _resume(self, lane: _Lane) -> None:
        assert lane.thread is not None
        if lane.thread.ident is None:
            lane.thread.start()
        else:
            lane.go.release()
        lane.back.acquire()
        if self._errors:
            raise self._errors[0]

    def _work(self, lane: _Lane, job: Callable[[], None]) -> None:
        try:
            job()
        except _Stopped:
            pass
        except BaseException as error:
            self._errors.append(error)
        finally:
            lane.done = True
            lane.back.release()

    def _stop(self) -> None:
        """Ends what has not ended, one thread after the other."""
        self._stopping = True
        for lane in self._lanes:
            if lane.thread is not None and lane.thread.ident is not None:
                lane.go.release()
                lane.thread.join()


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


# --- text ---


def calibration_batches(
    tokenizer_folder: str | os.PathLike[str],
    jsonl_path: str | os.PathLike[str],
    *,
    samples: int,
    length: int,
    batch: int,
) -> list[dict[str, Tensor]]:
    """The first `samples` rows of a JSONL file, at most `length` tokens each, as batches of `batch` rows.

    Rows are {"text": ...}, every token of which is a label, or {"prompt": ..., "completion": ...}, where
    the completion's are (the prompt's are -100). Batches hold input_ids, attention_mask and labels, int64
    (rows, tokens), padded on the right; rows are sorted by length, so that little is padded. Raises
    CLGraftError with the file and the line for a row that is neither, and for a file without rows.
    """
    from transformers import AutoTokenizer

    if min(samples, length, batch) < 1 or length < 2:
        raise CLGraftError(
            f"calibration needs samples >= 1, length >= 2 and batch >= 1; got {samples}, {length} and {batch}."
        )
    rows = _rows(Path(jsonl_path), samples)
    try:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, trust_remote_code=False)
    except Exception as error:  # each kind of tokenizer has errors of its own
        raise CLGraftError(
            f"{tokenizer_folder} has no readable tokenizer ({type(error).__name__}); give a whole model folder."
        ) from error
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    encoded = sorted((_encoded(tokenizer, row, length) for row in rows), key=lambda e: len(e[0]))
    return [_padded(encoded[i : i + batch], pad or 0) for i in range(0, len(encoded), batch)]


def _rows(path: Path, most: int) -> list[dict[str, str]]:
    rows: list[dict[str, str]] = []
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip() and len(rows) < most:
                    rows.append(_row(line, f"{path}, line {number}"))
    except (OSError, UnicodeDecodeError) as error:
        raise CLGraftError(
            f"{path} cannot be read as text ({error}); give a JSONL file."
        ) from error
    if not rows:
        raise CLGraftError(f"{path} has no rows; give a JSONL file with a text on each line.")
    return rows


def _row(line: str, where: str) -> dict[str, str]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise CLGraftError(f"{where} is not JSON ({error}); write one object a line.") from error
    for fields in (("text",), ("prompt", "completion")):
        if isinstance(row, dict) and all(isinstance(row.get(f), str) for f in fields):
            if row[fields[-1]]:
                return {f: row[f] for f in fields}
            raise CLGraftError(f"{where} has an empty {fields[-1]!r}; fill it or drop the line.")
    raise CLGraftError(
        f'{where} is not {{"text": "..."}} nor {{"prompt": "...", "completion": "..."}}; mend it.'
    )


def _encoded(tokenizer: Any, row: dict[str, str], length: int) -> tuple[list[int], int]:
    """Token ids, and how many of them are the prompt's."""
    if "text" in row:
        return tokenizer(row["text"])["input_ids"][:length], 0
    head, tail = encode(tokenizer, row["prompt"], row["completion"], length)
    tail = [token for token in tail if token is not None]  # no end where the tokenizer has none
    return head + tail, len(head)


def _padded(rows: Sequence[tuple[list[int], int]], pad: int) -> dict[str, Tensor]:
    width = max(len(ids) for ids, _ in rows)
    ids = torch.full((len(rows), width), pad)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for i, (tokens, prompt) in enumerate(rows):
        ids[i, : len(tokens)] = torch.tensor(tokens)
        mask[i, : len(tokens)] = 1
        labels[i, prompt : len(tokens)] = torch.tensor(tokens[prompt:])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
