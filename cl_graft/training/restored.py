"""What trainers change of a model besides its weights, put back when training is over.

transformers' Trainer (5.23) sets the config's use_cache and special tokens and leaves the model in training mode, TRL's
(1.16) sets output_router_logits of a mixture of experts, with which `generate` fails, the probability of every dropout
to zero (DPO), and forwards and adapters of its own. A stage that was recalled has none of that, and must lead to the
same numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

from torch import nn

OWN = (
    "_parameters",
    "_modules",
    "_buffers",
)  # what a module is made of; the first is what is trained


@contextmanager
def as_it_was(model: Any) -> Iterator[None]:
    """Put back configs, modes, hooks, attributes and buffers of all modules, and adapters, but not parameters."""
    adapters = set(getattr(model, "peft_config", ()))
    modules = [(module, _attributes(module)) for module in model.modules()]
    buffers = [
        (module, name, None if x is None else x.clone())
        for module, _ in modules
        for name, x in module._buffers.items()
    ]
    configs = [(config, _values(config)) for config in _configs(model)]
    try:
        yield
    finally:
        for name in set(getattr(model, "peft_config", ())) - adapters:
            model.delete_adapter(name)
        for module, attributes in modules:
            _restore(module, attributes)
        for module, name, value in buffers:
            now = module._buffers.get(name)
            module._buffers[name] = value if now is None or value is None else value.to(now.device)
        for config, values in configs:
            vars(config).clear()
            vars(config).update(values)


def _attributes(module: nn.Module) -> dict[str, Any]:
    """The module's attributes; of hooks, which are added to dicts in place, a copy of the dict."""
    return {
        name: value.copy() if "hooks" in name and isinstance(value, dict) else value
        for name, value in vars(module).items()
        if name not in OWN
    }


def _restore(module: nn.Module, attributes: dict[str, Any]) -> None:
    now = vars(module)
    for name in now.keys() - attributes.keys() - set(OWN):
        del now[name]
    for name, value in attributes.items():
        if "hooks" in name and isinstance(value, dict):
            now[name].clear()
            now[name].update(value)
        else:
            now[name] = value


def _configs(model: Any) -> list[Any]:
    """Each config of the model, its parts and its generation once."""
    from transformers import GenerationConfig, PreTrainedConfig

    kinds = (PreTrainedConfig, GenerationConfig)
    found: dict[int, Any] = {}
    left = [value for module in model.modules() for value in vars(module).values()]
    while left:
        value = left.pop()
        if isinstance(value, kinds) and id(value) not in found:
            found[id(value)] = value
            left += vars(value).values()
    return list(found.values())


def _values(config: Any) -> dict[str, Any]:
    """A copy of the config's values; configs in it are looked after by themselves."""
    from transformers import PreTrainedConfig

    return {
        name: value if isinstance(value, PreTrainedConfig) else deepcopy(value)
        for name, value in vars(config).items()
    }
