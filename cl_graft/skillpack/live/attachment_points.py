"""Where a model reads its parameters, in modules that still have the samples of a batch apart.

That is seen in a trial run, not guessed from names: a tied weight is found in each place, and what reads the
tokens of all samples as one list (the experts of a mixture) is found as the module around it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from cl_graft.models.spread import offloaded, original
from cl_graft.skillpack.format.errors import SkillPackError

PLAIN = Tensor | bool | int | float | str | torch.dtype | torch.device | None


class AttachError(SkillPackError):
    """A choice, a batch or a model that attached packs cannot serve."""


@dataclass(frozen=True, eq=False)
class AttachmentPoint:
    """A module that has the samples of a batch apart, and the touched parameters read in it.

    places: {parameter name: the modules, with their own name for it, where it hangs}.
    linear, rows: names of parameters that its output depends on as y = x W^T + b (as y = x W where
    `transposed`), or whose rows it looks up.
    """

    module: nn.Module
    places: dict[str, list[tuple[nn.Module, str]]] = field(default_factory=dict)
    linear: set[str] = field(default_factory=set)
    rows: set[str] = field(default_factory=set)

    @property
    def transposed(self) -> bool:
        return not isinstance(self.module, nn.Linear)


def find_attachment_points(
    model: nn.Module, touched: Mapping[str, Tensor], example: Mapping[str, Any] | None = None
) -> list[AttachmentPoint]:
    """The innermost modules around each reading of each parameter of `touched` that get the samples apart and no
    state of a sequence. Raises AttachError where there is none.
    """
    if example is None:
        device = offloaded(model).device(*next(iter(touched.items())))
        ids = torch.arange(6, device=device).reshape(3, 2) % 3
        example = {"input_ids": ids} | ({"use_cache": True} if hasattr(model, "generate") else {})
    readings, apart = _trial(model, touched, example)
    modules, points = dict(model.named_modules()), dict[int, AttachmentPoint]()
    for name, parameter in touched.items():
        steps = name.split(".")
        owners = tuple(modules[".".join(steps[:n])] for n in range(len(steps)))
        around = [
            next((m for m in reversed(stack) if m in apart), None)
            for stack in readings.get(name)
            or [owners]  # an expert that no token chose was not read
        ]
        for module in {id(m): m for m in around}.values():
            if module is None:
                raise AttachError(
                    f"parameter {name!r} is read where the samples of a batch cannot be told apart; "
                    "put the pack into the weights with Grafted."
                )
            if not any(module is not m and module in set(m.modules()) for m in around if m):
                point = points.setdefault(id(module), AttachmentPoint(module))
                _enter(point, name, parameter, model)
    return list(points.values())


def _enter(point: AttachmentPoint, name: str, parameter: Tensor, model: nn.Module) -> None:
    from transformers.pytorch_utils import Conv1D

    module = point.module
    point.places[name] = [
        (m, own) for m in module.modules() for own, p in m._parameters.items() if p is parameter
    ]
    if module._parameters.get("weight") is not parameter:
        return
    if type(module).forward in (nn.Linear.forward, Conv1D.forward):
        point.linear.add(name)
    table = getattr(model, "get_input_embeddings", lambda: None)()
    if type(module) is nn.Embedding or (isinstance(module, nn.Embedding) and module is table):
        point.rows.update([name] if module.max_norm is None else [])


class _Readings(TorchFunctionMode):
    """Notes within which modules an operation makes a tensor of a touched parameter."""

    def __init__(self, touched: Mapping[str, Tensor], stack: list[nn.Module]):
        super().__init__()
        self.names, self.stack = {id(p): name for name, p in touched.items()}, stack
        self.found: dict[str, set[tuple[nn.Module, ...]]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if any(isinstance(x, Tensor) for x in tree_leaves(out)):  # not: its dtype, its device
            for x in tree_leaves((args, kwargs)):
                if (parameter := id(original(x))) in self.names:
                    self.found.setdefault(self.names[parameter], set()).add(tuple(self.stack))
        return out


def _trial(
    model: nn.Module, touched: Mapping[str, Tensor], example: Mapping[str, Any]
) -> tuple[dict[str, set[tuple[nn.Module, ...]]], set[nn.Module]]:
    """Run the model once: {parameter: stacks of modules, outermost first, that read it}, and the
    modules that got the samples apart, and only tensors, each time they were called."""
    samples = next(len(x) for x in example.values() if isinstance(x, Tensor))
    stack: list[nn.Module] = []
    apart, mixing = set[nn.Module](), {model}

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        stack.append(module)
        given = [*args, *kwargs.values()]
        if not all(_plain(x) for x in given):
            mixing.update(stack)  # a cache: it counts the tokens of each call
        first = next((x for x in given if isinstance(x, Tensor)), None)
        (apart if _by_sample(first, samples) else mixing).add(module)

    def leave(module: nn.Module, args: Any, out: Any) -> None:
        stack.pop()

    hooks = []
    for module in model.modules():
        hooks.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        hooks.append(module.register_forward_hook(leave, always_call=True))
    try:
        with torch.no_grad(), torch.random.fork_rng(), _Readings(touched, stack) as readings:
            model(**example)
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        raise AttachError(
            f"{type(model).__name__} does not run on the example ({error}); pass an `example`: the "
            "keyword arguments of one forward of several samples."
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    return readings.found, apart - mixing


def _plain(x: Any) -> bool:
    return all(_plain(y) for y in x) if type(x) in (tuple, list) else isinstance(x, PLAIN)


def _by_sample(x: Tensor | None, samples: int) -> bool:
    """Whether a module's first tensor has a row for each sample: (samples, ..., width), or ids (samples,
    tokens) or (1, tokens) for all. A list of tokens (samples * tokens, width) does not."""
    if x is None:
        return False
    if x.is_floating_point():
        return x.ndim > 2 and len(x) == samples
    return x.ndim > 1 and len(x) in (1, samples)
