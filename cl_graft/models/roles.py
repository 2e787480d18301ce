"""The role of every parameter of a causal LM: embedding, head, attention, mlp or norm.

Told from the structure of the model object, not from a list of known names: the embeddings are what the
model itself calls its input and output embeddings; the decoder layers are its largest list of modules;
inside a layer, attention is the child whose class says so, every other child with matrices is the MLP, and
a layer without attention is in doubt; one-dimensional parameters are norms and biases.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Literal

from torch import nn

from ..errors import CLGraftError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Role = Literal["embedding", "head", "attention", "mlp", "norm"]
OTHER_MIXERS = ("mixer", "mamba", "rwkv")  # of tokens, beside or in place of attention


class UnclearRoles(CLGraftError):
    """A model has matrices whose role its structure does not tell."""


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and modules of the largest list of modules, by parameters.

    Raises UnclearRoles where the model has none.
    """
    lists = [
        (sum(p.numel() for p in module.parameters()), name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module)
    ]
    if not lists:
        raise UnclearRoles(
            f"{type(model).__name__} has no list of decoder layers, so its modules cannot be told apart; "
            "use a causal LM made of repeated layers."
        )
    _, name, layers = max(lists, key=lambda entry: entry[0])
    return name, layers


def roles(model: PreTrainedModel) -> dict[str, Role]:
    """Parameter name -> role, for every name of `model.named_parameters()`.

    Raises UnclearRoles, listing the modules in doubt.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    modules = dict(model.named_modules())
    prefix, layers = decoder_layers(model)
    attending = {f"{prefix}.{i}" for i, layer in enumerate(layers) if _attends(layer)}
    result: dict[str, Role] = {}
    doubtful: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        owner_name = name.rpartition(".")[0]
        owner = modules[owner_name]
        if owner is embedding:
            result[name] = "embedding"
        elif owner is head:
            result[name] = "head"
        elif parameter.ndim < 2:
            result[name] = "norm"
        elif isinstance(owner, nn.Embedding):
            result[name] = "embedding"  # learned positions
        elif owner_name.startswith(f"{prefix}."):
            role = _role_in_layer(modules, prefix, owner_name, attending)
            if role:
                result[name] = role
            else:
                doubtful[type(owner).__name__ + " " + _layerless(owner_name, prefix)] += 1
        else:
            doubtful[f"{type(owner).__name__} {owner_name}"] += 1
    if doubtful:
        raise UnclearRoles(
            f"{type(model).__name__} has modules whose role is in doubt: {', '.join(doubtful)}; "
            "attention and MLP must be children of the decoder layers."
        )
    return result


def _role_in_layer(
    modules: dict[str, nn.Module], prefix: str, owner: str, attending: set[str]
) -> Role | None:
    """Role from the classes of the modules between a decoder layer and the parameter's owner."""
    index, *inner = owner[len(prefix) + 1 :].split(".")
    layer = f"{prefix}.{index}"
    steps = [".".join([layer, *inner[: n + 1]]) for n in range(len(inner))]
    if any(_is_attention(modules[step]) for step in steps):
        return "attention"
    other = any(
        word in type(modules[step]).__name__.lower() for step in steps for word in OTHER_MIXERS
    )
    return "mlp" if steps and layer in attending and not other else None


def _is_attention(module: nn.Module) -> bool:
    name = type(module).__name__.lower()
    return "attention" in name or "attn" in name


def _attends(layer: nn.Module) -> bool:
    return any(_is_attention(module) for module in layer.modules() if module is not layer)


def _layerless(owner: str, prefix: str) -> str:
    return ".".join([prefix, "*", *owner[len(prefix) + 1 :].split(".")[1:]])
