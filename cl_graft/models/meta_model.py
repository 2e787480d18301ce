"""A causal LM without its weights, and which of its parameters each tensor of a checkpoint is.

The model's code comes from transformers alone; nothing that a folder holds is run. Parameters are on the
meta device, buffers (rotary frequencies, for example) are real, so that the model can be given its
weights part by part and run.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from cl_graft.errors import CLGraftError, first_line
from cl_graft.models.experts import Stacked, stacked
from cl_graft.models.roles import Role, roles
from cl_graft.models.weights import weights

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

Shapes = Mapping[str, tuple[int, ...]]
Read = Callable[[str], Tensor]


class Conversion(NamedTuple):
    """How transformers makes a parameter of tensors like this one: a WeightConverter and which of its sources it is."""

    converter: Any
    pattern: str


class Source(NamedTuple):
    """The tensors that one conversion takes, and the first of the parameters that it makes."""

    target: str
    tensors: tuple[tuple[str, Conversion], ...]


@dataclass
class MetaModel:
    """model: parameters on the meta device, weights tied, evaluation mode.

    folder, keys: where it was made from, and the shapes of the tensors there; None and empty where it was
    made from a configuration alone.
    """

    model: PreTrainedModel
    folder: Path | None = None
    keys: Shapes = field(default_factory=dict)

    def parameter_of(self, key: str) -> str | None:
        """The model's name (the first one of tied weights) for a checkpoint's tensor; None for what is none.

        Where transformers stacks or splits tensors on loading, the parameter they end in (the first of many).
        """
        return self._found(key)[0]

    def key_of(self, name: str) -> str | None:
        """The tensor of the checkpoint that is this parameter or persistent buffer, by any of its names."""
        return self._keys.get(self._canonical.get(name, name))

    def role_of(self, key: str) -> Role:
        """Role of the parameter that a checkpoint's tensor is or is part of; other for what is none."""
        name = self.parameter_of(key)
        return "other" if name is None else self._roles[name]

    def stacked_as(self, key: str) -> Stacked | None:
        """What a checkpoint's tensor holds one of for each expert (models/experts.py); None where that is nothing."""
        name = self.parameter_of(key) or ""
        whole = name in self._stacked and len(self.keys[key]) == len(self._shapes[name])
        return self._stacked[name] if whole else None

    def expert_of(self, key: str) -> int | None:
        """Which of a stack's matrices a checkpoint's tensor is, or is part of; None for what is in no stack."""
        return self._experts.get(key)

    def is_transposed(self, key: str) -> bool:
        """Whether a checkpoint's tensor multiplies from the right: (in, out), or (experts, in, out)."""
        name, conversion = self._found(key)
        return name is not None and conversion is None and name in self._transposed

    @cached_property
    def plain(self) -> bool:
        """Whether `load` knows every parameter, so that layers can be loaded one by one."""
        return not self._missing

    @property
    def note(self) -> str | None:
        """What to tell a user about the memory that calibration takes; None where there is nothing to tell."""
        if self.plain:
            return None
        return (
            f"It is not known how {self._missing[0]!r} of {type(self.model).__name__} is stored "
            f"({len(self._missing)} such parameters), so calibration loads the whole model."
        )

    def load(self, name: str, read: Read) -> Tensor | None:
        """The weights of a parameter or persistent buffer from the tensors that `read` gives by their keys.

        Where transformers stacks or splits tensors, its own conversion is run on them. None for a buffer
        that the checkpoint does not have. Raises CLGraftError for another shape than the model's.
        """
        name = self._canonical.get(name, name)
        if name in self._keys:
            return self._checked(name, read(self._keys[name]))
        if name in self._sources:
            return self._checked(name, _converted(self.model, self._sources[name], read)[name])
        return None

    def _checked(self, name: str, tensor: Tensor) -> Tensor:
        wanted = self._shapes[name]
        if tensor.shape != wanted:
            raise CLGraftError(
                f"{name} has the shape {list(tensor.shape)} in the checkpoint and {list(wanted)} by its "
                "config.json; use the config.json that belongs to the weights."
            )
        return tensor

    @cached_property
    def _shapes(self) -> dict[str, torch.Size]:
        return {n: t.shape for n, t in self.model.state_dict().items()}

    @cached_property
    def _canonical(self) -> dict[str, str]:
        """Every name of every parameter -> its first name."""
        first = {id(p): n for n, p in self.model.named_parameters()}
        every = self.model.named_parameters(remove_duplicate=False)
        return {n: first[id(p)] for n, p in every}

    @cached_property
    def _rename(self) -> Rename:
        return _renaming(self.model)

    @cached_property
    def _roles(self) -> dict[str, Role]:
        return roles(self.model)

    @cached_property
    def _transposed(self) -> frozenset[str]:
        return frozenset(_transposed(self.model))

    @cached_property
    def _stacked(self) -> dict[str, Stacked]:
        return stacked(self.model)

    @cached_property
    def _experts(self) -> dict[str, int]:
        """Key -> number, of matrices that transformers stacks: as many of a kind as the stack has, in their order."""
        found: dict[str, int] = {}
        for name in self._sources.keys() & {
            n for n, what in self._stacked.items() if what == "matrices"
        }:
            kinds: dict[str, list[str]] = {}
            for key, conversion in self._sources[name].tensors:
                if len(self.keys[key]) == 2:
                    kinds.setdefault(conversion.pattern, []).append(key)
            for keys in kinds.values():
                if len(keys) == self._shapes[name][0]:
                    found |= {key: i for i, key in enumerate(keys)}
        return found

    @cached_property
    def _keys(self) -> dict[str, str]:
        """Parameter or buffer -> key. Under its own name first, where tied weights are stored twice."""
        keys: dict[str, str] = {}
        for key in self.keys:
            name, conversion = self._target(key)
            if name is not None and conversion is None:
                first = self._canonical.get(name, name)
                if first not in keys or name == first:
                    keys[first] = key
        return keys

    @cached_property
    def _sources(self) -> dict[str, Source]:
        """Parameter -> what it is made of, where a conversion of the shapes alone gives its shape."""
        groups: dict[str, list[tuple[str, Conversion]]] = {}
        for key in sorted(self.keys, key=_natural):
            name, conversion = self._target(key)
            if name is not None and conversion is not None:
                groups.setdefault(name, []).append((key, conversion))
        sources: dict[str, Source] = {}
        for target, tensors in groups.items():
            source = Source(target, tuple(tensors))
            try:
                made = _converted(self.model, source, self._blank)
            except (AttributeError, TypeError, ValueError, LookupError, RuntimeError):
                continue  # needs more than shapes, or another interface than the one known here
            sources |= {n: source for n, t in made.items() if t.shape == self._shapes.get(n)}
        return sources

    def _blank(self, key: str) -> Tensor:
        return torch.empty(self.keys[key], device="meta")

    @cached_property
    def _missing(self) -> list[str]:
        known = self._keys.keys() | self._sources.keys()
        return [n for n, _ in self.model.named_parameters() if n not in known]

    def _found(self, key: str) -> tuple[str | None, Conversion | None]:
        name, conversion = self._target(key)
        return (None if name is None else self._canonical.get(name)), conversion

    def _target(self, key: str) -> tuple[str | None, Conversion | None]:
        """The model's own name for a key, and what is done to the tensor on the way to it."""
        name, conversion = self._rename(key)
        for candidate, change in ((name, conversion), (key, None)):
            for spelled in _with_prefix(candidate, self.model.base_model_prefix):
                if spelled in self._shapes:
                    return spelled, change
        return None, None


def meta_model(source: str | os.PathLike[str] | PreTrainedConfig) -> MetaModel:
    """Make the meta model of a folder (config.json, and the names in its *.safetensors) or of a configuration.

    Raises CLGraftError for a folder without a readable configuration, and for a model whose code is not
    part of transformers: remote code is never run.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    folder = Path(source) if isinstance(source, (str, os.PathLike)) else None
    config: Any = deepcopy(source) if folder is None else _config(folder)
    verbosity = logging.get_verbosity()
    try:
        logging.set_verbosity_error()  # of weights that are not there, and cannot be
        with meta_parameters():
            model = AutoModelForCausalLM.from_config(
                config, trust_remote_code=False, dtype=torch.float32
            )
        model.tie_weights()
    except ValueError as error:
        raise CLGraftError(
            f"{folder or type(config).__name__} is no causal language model that transformers knows "
            f"(model type {getattr(config, 'model_type', None)!r}); give a causal LM, or a newer transformers."
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    model.requires_grad_(False).eval()
    return MetaModel(model, folder, _shapes_in(folder) if folder else {})


def meta_parameters() -> Any:
    """Context in which modules are made with parameters on the meta device and buffers that are real."""
    from accelerate import init_empty_weights

    return init_empty_weights(include_buffers=False)


def _config(folder: Path) -> PreTrainedConfig:
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    file = folder / "config.json"
    try:
        raw = json.loads(file.read_text("utf-8"))
        kind = raw.get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise CLGraftError(
            f"{file} is not readable as a model's configuration; give a Hugging Face model folder."
        ) from error
    if raw.get("auto_map") and kind not in CONFIG_MAPPING:
        raise CLGraftError(
            f"{file} asks for code of its own (auto_map), which is never run; "
            "use a model whose architecture is part of transformers."
        )
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # each configuration checks its own fields in its own way
        reason = first_line(error)
        raise CLGraftError(
            f"{file} does not describe a model that transformers knows ({reason}); mend it, or use a newer "
            "transformers."
        ) from error


def _shapes_in(folder: Path) -> Shapes:
    """Names and shapes of the folder's own weights; none where it has no safetensors."""
    if not any(folder.glob("model*.safetensors")):
        return {}
    return {name: found.shape for name, found in weights(folder).stored.items()}


def _natural(key: str) -> list[tuple[int, str]]:
    """Sorts expert 10 behind expert 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", key)]


def _with_prefix(name: str, prefix: str) -> list[str]:
    """A name as it is, without and with the base model's prefix: either may have been saved."""
    if not prefix:
        return [name]
    return [name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"]


# What transformers itself does to a checkpoint's tensors when it loads a model. Its functions for that are no
# promised interface: where they are missing or have changed, tensors are taken as they are, and a model that
# needs more is not `plain`.

Rename = Callable[[str], tuple[str, Conversion | None]]


def _renaming(model: PreTrainedModel) -> Rename:
    """Key -> the model's name for it, and the conversion that the tensor goes through, if any."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, rename_source_key

        mapping = get_model_conversion_mapping(model)
        converters = [m for m in mapping if isinstance(m, WeightConverter)]
        renamings = [m for m in mapping if not isinstance(m, WeightConverter)]
        by_pattern = {p: c for c in converters for p in c.source_patterns}
        rename_source_key("probe", renamings, converters)
    except (ImportError, AttributeError, TypeError):
        return lambda key: (key, None)

    def rename(key: str) -> tuple[str, Conversion | None]:
        name, pattern = rename_source_key(key, renamings, converters)
        return name, None if pattern is None else Conversion(by_pattern[pattern], pattern)

    return rename


def _converted(model: PreTrainedModel, source: Source, read: Read) -> dict[str, Tensor]:
    """Parameter -> tensor, of all that a conversion makes."""
    converter = deepcopy(source.tensors[0][1].converter)
    for key, conversion in source.tensors:
        converter.add_tensor(source.target, key, conversion.pattern, partial(read, key))
    made = converter.convert(source.target, model=model, config=model.config)
    return {n: t[0] if isinstance(t, list) else t for n, t in made.items()}


def _transposed(model: nn.Module) -> Iterable[str]:
    """Parameters that multiply from the right: GPT-2's Conv1D, and experts that say so of themselves."""
    from transformers.pytorch_utils import Conv1D

    for name, module in model.named_modules():
        if isinstance(module, Conv1D):
            yield f"{name}.weight"
        elif getattr(module, "is_transposed", False):
            stacked = module.named_parameters(recurse=False)
            yield from (f"{name}.{n}" for n, p in stacked if p.ndim == 3)
