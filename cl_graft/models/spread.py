"""A model that is too large for one device, spread by accelerate's device map, and what its offloaded parameters hold.

What the GPUs have no room for is in host memory, and what that has no room for is in files: those of the checkpoint,
where they hold a tensor as it is loaded. Such a parameter is on the meta device but while its module runs. What wants
its values asks here, and what gives it others puts in its place how they are made: no file is ever written to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cl_graft.errors import CLGraftError

Make = Callable[[], Tensor]


class Offloaded(Mapping[str, Tensor]):
    """{name: what it holds now}, of parameters that are on the meta device between calls; read or made when asked for.

    Tied parameters have one value under each of their names. source: accelerate's map of offloaded weights, {name:
    tensor}. first: {any name: the one that `model.named_parameters()` gives}. devices: where it runs, by any name.
    keeps: what has to live as long.
    """

    def __init__(
        self,
        source: Any,
        first: Mapping[str, str],
        devices: Mapping[str, torch.device],
        keeps: object = None,
    ):
        self._source, self._first, self._devices, self._keeps = source, first, devices, keeps
        self._made: dict[str, Make] = {}
        self.lent: dict[int, str] = {}  # address of the memory that a module runs with: name

    def __getitem__(self, name: str) -> Tensor:
        return self.reader(name)()

    def __iter__(self) -> Iterator[str]:
        return iter(self._first)

    def __len__(self) -> int:
        return len(self._first)

    def __contains__(self, name: object) -> bool:
        return name in self._first

    def reader(self, name: str) -> Make:
        """What gives the parameter as it is now, whatever is put in its place later."""
        return self._made.get(self._first[name], partial(self.base, name))

    def base(self, name: str) -> Tensor:
        """The parameter as it was loaded; not to be written to."""
        return self._source[self._first[name]]

    def in_memory(self, name: str) -> bool:
        """Whether the base's is in host memory; else it is in a file."""
        return self._first[name] in getattr(self._source, "state_dict", self._source)

    def device(self, name: str, parameter: Tensor) -> torch.device:
        """Where the parameter is when its module runs; of one that is not offloaded, where it is."""
        return self._devices.get(name, parameter.device)

    def put(self, name: str, make: Make) -> None:
        """Have the parameter be what `make` gives, each time it is asked for."""
        self._made[self._first[name]] = make

    def restore(self, name: str) -> None:
        """Have the parameter be the base's again."""
        self._made.pop(self._first[name], None)


def original(x: Any) -> Any:
    """The parameter that a tensor is lent for, or else the tensor."""
    return getattr(x, "stands_for", x)


def is_spread(model: Any) -> bool:
    """Whether accelerate's device map has put the model on several devices, or a part of it on none."""
    return hasattr(model, "_hf_hook")


def offloaded(model: Any) -> Offloaded:
    """The model's parameters that are on no device between calls; empty for a model that is whole on one device."""
    modules = model.modules() if is_spread(model) else ()
    hooks: Any = (getattr(module, "_hf_hook", None) for module in modules)
    return next((hook.held for hook in hooks if hasattr(hook, "held")), Offloaded({}, {}, {}))


def device_of(model: Any) -> torch.device:
    """Where the model takes its input; of one without weights the meta device."""
    device = getattr(getattr(model, "_hf_hook", None), "execution_device", None)
    return model.device if device is None else torch.device(device)


def named_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What `model.named_parameters()` gives, with the values of those that are offloaded; one of these at a time."""
    held = offloaded(model)
    for name, parameter in model.named_parameters():
        yield name, held.get(name, parameter)


def copies(model: nn.Module) -> Mapping[str, Tensor]:
    """{parameter: its values now, whatever becomes of it}; of a spread model in host memory, or read when asked for."""
    if not is_spread(model):
        return {name: p.detach().clone() for name, p in model.named_parameters()}
    held, readers, shapes = offloaded(model), dict[str, Make](), dict[str, tuple[int, ...]]()
    for name, parameter in model.named_parameters():
        if name in held:
            readers[name] = held.reader(name)
        else:
            readers[name] = partial(itself, parameter.detach().to("cpu", copy=True))
        shapes[name] = tuple(parameter.shape)
    return Read(readers, shapes)


def shapes_of(weights: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """{name: shape}; of what is read when it is asked for without reading any."""
    if isinstance(weights, Read):
        return dict(weights.shapes)
    return {name: tuple(weight.shape) for name, weight in weights.items()}


def near(weights: Mapping[str, Tensor], model: nn.Module) -> Mapping[str, Tensor]:
    """What is read when it is asked for, put where the model takes its input; others as they are."""
    if not isinstance(weights, Read):
        return weights
    device = device_of(model)
    return Read({n: partial(_moved, r, device) for n, r in weights.readers.items()}, weights.shapes)


def _moved(read: Make, device: torch.device) -> Tensor:
    return read().to(device)


class Read(Mapping[str, Tensor]):
    """{name: what its reader gives, each time it is asked for}. shapes: of all, known without reading any."""

    def __init__(self, readers: Mapping[str, Make], shapes: Mapping[str, tuple[int, ...]]):
        self.readers, self.shapes = readers, shapes

    def __getitem__(self, name: str) -> Tensor:
        return self.readers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self.readers)

    def __len__(self) -> int:
        return len(self.readers)


def itself(x: Tensor) -> Tensor:
    """What reads a tensor that is held."""
    return x


@torch.no_grad()
def write(model: nn.Module, read: Callable[[str], Tensor]) -> None:
    """Give every parameter the values that `read` gives for its name; for an offloaded one it is asked at each use."""
    held = offloaded(model)
    for name, parameter in model.named_parameters():
        if name in held:
            held.put(name, partial(read, name))
        else:
            parameter.copy_(read(name))


def require_whole(model: Any, who: str) -> None:
    """Raises CLGraftError for a model that is spread: what works on its weights would find a part of them nowhere."""
    if is_spread(model):
        raise CLGraftError(
            f"{who} works on the weights of the model itself, which is spread over devices; choose a method that sees "
            "the delta alone, as graftllm, or a device that holds the model."
        )


@contextmanager
def unwritten(model: nn.Module, who: str) -> Iterator[None]:
    """Raises CLGraftError where a parameter that is offloaded was written to within: that changes nothing."""
    held = offloaded(model)
    kept = {n: (p, p._version) for n, p in model.named_parameters() if n in held}
    yield
    for name, (parameter, version) in kept.items():
        if parameter._version != version:
            raise CLGraftError(
                f"{who} writes to {name} of a model that is spread, which is on no device and stays as it was; choose "
                "a method that sees the delta alone, as graftllm, or a device that holds the model."
            )


@contextmanager
def in_host_memory(model: nn.Module) -> Iterator[None]:
    """Keep the model out of accelerators' memory within; afterwards its tensors are where they were."""
    homes = [(x, x.device) for x in (*model.parameters(), *model.buffers()) if not x.is_meta]
    try:
        for tensor, _ in homes:
            tensor.data = tensor.data.to("cpu")
        torch.cuda.empty_cache()
        yield
    finally:
        for tensor, device in homes:
            tensor.data = tensor.data.to(device)


@contextmanager
def in_place(module: nn.Module) -> Iterator[None]:
    """Have a module's own weights where it runs within, for what runs it in another way than by its `forward`."""
    hook: Any = getattr(module, "_hf_hook", None)
    if hook is None:
        yield
        return
    hook.pre_forward(module)
    try:
        yield
    finally:
        hook.post_forward(module, ())


@contextmanager
def rereading(model: nn.Module) -> Iterator[None]:
    """Have autograd keep the names of lent parameters within: a backward pass reads them again, one at a time, instead
    of holding all."""
    held = offloaded(model)
    if not held:
        yield
        return

    def pack(x: Tensor) -> Any:
        name = held.lent.get(x.untyped_storage().data_ptr())
        if name is None:
            return x
        return name, x.device, x.dtype, x.size(), x.stride(), x.storage_offset()

    def unpack(kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        name, device, dtype, *view = kept
        return held[name].to(device, dtype).as_strided(*view)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
