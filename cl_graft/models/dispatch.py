"""Spreading a model that is too large for one device: which part goes where, and the hooks that run it.

accelerate decides by the bytes of the weights and the memory that is free, or that it is told; transformers loads by
its map. Weights that no file holds as they are loaded, as stacked experts that are stored one by one, go into a folder
of this process's own for as long as the model lives.
"""

from __future__ import annotations

import shutil
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Any

import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from accelerate.utils import (
    PrefixedDataset,
    get_balanced_memory,
    get_max_memory,
    infer_auto_device_map,
    send_to_device,
)
from torch import nn

from cl_graft.errors import CLGraftError, errors_alone
from cl_graft.models.spread import Offloaded, is_spread, original
from cl_graft.store.locks import locked, use, used

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DeviceMap = dict[str, Any]  # {part of the model: a GPU's number, "cpu" or "disk"}
LOG = "accelerate"  # which says where it puts weights
SHARE = 0.9  # of free memory that weights may take; the rest is for what is computed


def fits(size: int) -> bool:
    """Whether weights of so many bytes fit the device that a model runs on: the first GPU, or the CPU."""
    if torch.cuda.is_available():
        free = torch.cuda.mem_get_info(0)[0]
    else:
        import psutil

        free = psutil.virtual_memory().available
    return size <= SHARE * free


def device_map(
    model: PreTrainedModel, dtype: torch.dtype, memory: Mapping[str, str] | None
) -> DeviceMap | None:
    """Where the parts of a model go, whose parameters may be on the meta device; None where it fits one device.

    dtype: that the weights will have. memory: {GPU's number or cpu: bytes, as 70GiB} that they may take, of any
    machine's; None is what is free on this one. What fits nowhere goes to the disk.
    """
    model.tie_weights()
    size = sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize
    if memory is None and fits(size):
        return None
    kept: Any = {"no_split_module_classes": [*(model._no_split_modules or ())], "dtype": dtype}
    with errors_alone(LOG):
        given = get_max_memory(_numbered(memory)) if memory else _free()
        balanced = get_balanced_memory(model, given, **kept)
        return infer_auto_device_map(model, balanced, **kept)


def require_devices(memory: Mapping[str, str]) -> None:
    """Raises CLGraftError for a GPU that this machine does not have."""
    count = torch.cuda.device_count()
    for name in memory:
        if name.isdigit() and int(name) >= count:
            there = f"has GPUs 0 to {count - 1}" if count else "has none"
            raise CLGraftError(
                f"max_memory names GPU {name}, and this machine {there}; name those that it has, and cpu."
            )


def _numbered(memory: Mapping[str, str]) -> dict[int | str, str | int]:
    # accelerate takes bytes as a number alone
    given = {name: int(size) if size.isdigit() else size for name, size in memory.items()}
    return {int(name) if name.isdigit() else name: size for name, size in given.items()}


def _free() -> dict[int | str, int]:
    return {name: int(SHARE * size) for name, size in get_max_memory().items()}


class Spill:
    """A new folder for weights that go to the disk, which is removed when nobody holds this any more.

    Those that killed processes left beside it are removed now.
    """

    def __init__(self, scratch: Path):
        home = scratch / "offloaded"
        with locked(home):
            for left in home.glob("*/"):
                if not used(left):
                    _remove(left)
            home.mkdir(exist_ok=True)
            self.path = Path(mkdtemp(dir=home))
            use(self.path, self)
        weakref.finalize(self, _remove, self.path)


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    Path(f"{folder}.used").unlink(missing_ok=True)


class Lending(ModelHook):
    """Lends a module its offloaded parameters while it runs; one that somebody has put in their place stays.

    accelerate's own hook makes new parameters at each call, so that tied ones come apart; here those on the meta device
    stay the same objects. own: the module's own names of them; prefix: what comes before in the model's. weights_map:
    where transformers looks for offloaded weights when it saves a model.
    """

    def __init__(self, prefix: str, own: Sequence[str], held: Offloaded, instead_of: Any):
        self.own, self.held, self.weights_map = own, held, PrefixedDataset(held, prefix)
        self.execution_device = instead_of.execution_device
        self.skip_keys = instead_of.skip_keys

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        for own in self.own:
            away: Any = module._parameters[own]
            if away.is_meta:
                value = self.weights_map[own].to(self.execution_device, away.dtype)
                lent: Any = nn.Parameter(value, requires_grad=away.requires_grad)
                lent.stands_for = away
                module._parameters[own] = lent
                self.held.lent[lent.untyped_storage().data_ptr()] = self.weights_map.prefix + own
        kwargs = send_to_device(kwargs, self.execution_device, skip_keys=self.skip_keys)
        return send_to_device(args, self.execution_device), kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        self.take_back(module)
        return output

    def take_back(self, module: nn.Module, *_: Any) -> None:
        """Put the parameters on the meta device back in their places."""
        for own in self.own:
            lent: Any = module._parameters[own]
            module._parameters[own] = original(lent)
            if lent is not module._parameters[own]:
                self.held.lent.pop(lent.untyped_storage().data_ptr(), None)


def settle(model: Any, spill: Spill | None) -> None:
    """Put `Lending` in the place of accelerate's hooks on a model that was just spread; it keeps the folder."""
    if is_spread(model):
        model.to = lambda *args, **kwargs: model  # Avalanche asks for one device before it trains
    for hook in [m._hf_hook for m in model.modules() if hasattr(m, "_hf_hook")]:
        hook.tied_params_map = None  # of use while hooks are put on; it holds weights
    first = {id(p): name for name, p in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)
    names = {name: first[id(p)] for name, p in every if p.is_meta}
    hooks: dict[str, Any] = {name: _hook_of(model, name) for name in names}
    if not names:
        return
    source = next(iter(hooks.values())).weights_map.dataset
    devices = {name: torch.device(hook.execution_device) for name, hook in hooks.items()}
    held = Offloaded(source, names, devices, spill)
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        own = [n for n, p in module._parameters.items() if p is not None and p.is_meta]
        if own:
            lending = Lending(prefix, own, held, hooks[prefix + own[0]])
            add_hook_to_module(module, lending)
            module.register_forward_hook(lending.take_back, always_call=True)  # after errors, too


def _hook_of(model: nn.Module, name: str) -> Any:
    """accelerate's hook that offloads a parameter."""
    hook: Any = model.get_submodule(name.rpartition(".")[0])._hf_hook
    return next(h for h in getattr(hook, "hooks", [hook]) if getattr(h, "offload", False))
