"""The role of every parameter of a causal LM: embedding, head, attention, mlp, norm or other.

Told from the structure of the model object, not from a list of known architectures: the embeddings are what
the model itself calls its input and output embeddings; the decoder layers are its largest list of modules;
one-dimensional parameters are norms and biases. A decoder layer mixes tokens, then channels: what its class
calls attention is attention; a mixer of tokens that is none (it holds a convolution, or it comes first in a
layer that has no attention: state spaces, linear attention, recurrences) is other; the rest of the layer is
its MLP, routers and experts included. Matrices outside the layers are other. Values are not looked at, so a
model on the meta device will do.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Literal, get_args

from torch import nn
from torch.nn.modules.conv import _ConvNd

from cl_graft.errors import CLGraftError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Role = Literal["embedding", "head", "attention", "mlp", "norm", "other"]
ROLES: tuple[Role, ...] = get_args(Role)
ATTENTION = ("attention", "attn")  # what classes say of themselves
CHANNELS = ("mlp", "moe", "feedforward", "experts")


class UnclearRoles(CLGraftError):
    """A model has no list of decoder layers, so the role of its matrices cannot be told."""


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and modules of the largest list of modules, by parameters.

    Raises UnclearRoles, listing the modules with matrices, where the model has none.
    """
    lists = [
        (sum(p.numel() for p in module.parameters()), name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module)
    ]
    if not lists:
        doubtful = [
            f"{type(module).__name__} {name}".strip()
            for name, module in model.named_modules()
            if any(p.ndim > 1 for p in module.parameters(recurse=False))
        ]
        raise UnclearRoles(
            f"{type(model).__name__} has no list of decoder layers, so these modules cannot be told apart: "
            f"{', '.join(doubtful) or 'none with matrices'}; use a causal LM made of repeated layers."
        )
    _, name, layers = max(lists, key=lambda entry: entry[0])
    return name, layers


def roles(model: PreTrainedModel) -> dict[str, Role]:
    """Parameter name -> role, for every name of `model.named_parameters()`; tied weights by their first name.

    Raises UnclearRoles for a model without a list of decoder layers.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    modules = dict(model.named_modules())
    prefix, layers = decoder_layers(model)
    inside = {f"{prefix}.{i}": _children(layer) for i, layer in enumerate(layers)}
    result: dict[str, Role] = {}
    for name, parameter in model.named_parameters():
        owner_name = name.rpartition(".")[0]
        owner = modules[owner_name]
        if owner is embedding:
            result[name] = "embedding"
        elif owner is head:
            result[name] = "head"
        elif parameter.ndim < 2 or (_is_vector(parameter) and not _multiplies(owner)):
            result[name] = "norm"
        elif isinstance(owner, nn.Embedding):
            result[name] = "embedding"  # learned positions
        elif owner_name.startswith(f"{prefix}."):
            index, _, rest = owner_name[len(prefix) + 1 :].partition(".")
            result[name] = _role_in_layer(modules, f"{prefix}.{index}", rest, inside)
        else:
            result[name] = "other"
    return result


def _role_in_layer(
    modules: dict[str, nn.Module], layer: str, rest: str, inside: dict[str, dict[str, Role]]
) -> Role:
    """Role by the outermost attention on the way to the owner, else by the layer's child that it is in."""
    steps = rest.split(".") if rest else []
    for n in range(len(steps)):
        if _is_attention(module := modules[".".join([layer, *steps[: n + 1]])]):
            return "other" if _convolves(module) else "attention"
    return inside[layer][steps[0]] if steps else "other"


def _children(layer: nn.Module) -> dict[str, Role]:
    """Role of the matrices in each child of a decoder layer, those in its attention aside."""
    mixes = any(_is_attention(m) or isinstance(m, _ConvNd) for m in layer.modules())
    roles: dict[str, Role] = {}
    for name, child in layer.named_children():
        matrices = any(not _is_vector(p) for p in child.parameters())
        first = matrices and not mixes and not _says(child, CHANNELS)
        mixes = mixes or first
        roles[name] = "other" if first or _convolves(child) else "mlp"
    return roles


def tied_head(model: nn.Module) -> dict[str, str]:
    """{the embedding's parameter: what it is called where it serves as the head}; empty if they are not tied."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    for name, parameter in model.named_parameters():
        if head is not None and head.weight is parameter:
            used = next(f"{n}.weight" for n, module in model.named_modules() if module is head)
            return {name: used} if used != name else {}
    return {}


def untouched(model: PreTrainedModel, touched: Collection[Role]) -> frozenset[str]:
    """Names of the parameters whose roles are not among those; a tied embedding is touched only if its head is, too.

    Raises UnclearRoles as `roles`.
    """
    tied = tied_head(model) if "head" not in touched else {}
    return frozenset(n for n, role in roles(model).items() if role not in touched or n in tied)


def _is_vector(parameter: nn.Parameter) -> bool:
    return sum(size > 1 for size in parameter.shape) < 2


def _multiplies(module: nn.Module) -> bool:
    """Whether a weight of one row is a matrix all the same, as that of a gate."""
    return isinstance(module, nn.Linear)


def _convolves(module: nn.Module) -> bool:
    return any(isinstance(inner, _ConvNd) for inner in module.modules())


def _is_attention(module: nn.Module) -> bool:
    return _says(module, ATTENTION)


def _says(module: nn.Module, words: tuple[str, ...]) -> bool:
    return any(word in type(module).__name__.lower() for word in words)
