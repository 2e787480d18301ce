"""LoRA adapters by PEFT on every matrix of the layers: linear layers, stacked experts and routers, not the head."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from cl_graft.budget import Budget, largest_within
from cl_graft.errors import CLGraftError
from cl_graft.models.roles import roles
from cl_graft.skillpack.codecs import (
    Encoded,
    Spec,
    low_rank,
    low_rank_spec,
    low_rank_stack,
    low_rank_stack_spec,
)
from cl_graft.skillpack.compress.calibrate import linear_layers, stored_transposed
from cl_graft.skillpack.format.file import SkillPack
from cl_graft.task import Task

Pair = tuple[Tensor, Tensor]

# PEFT 0.21 refuses `out_proj` and `conv1d` of these: the kernels of their state spaces read the weights themselves.
REFUSED = {"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"}


class Adapter:
    """A new adapter on a model; the model is plain again, and as it was, at the end of the `with`.

    model: PEFT's wrapping of it, whose adapter alone is trained: B starts at zero, so nothing is changed yet.
    rank, dropout: of LoRA; alpha_over_rank: the factor on B A (Hu et al. 2021, arXiv 2106.09685). Every expert of a
    stack has an adapter of this rank of its own, and so have routers. Raises as `require_adaptable` and
    `require_dropout`.
    """

    def __init__(self, model: Any, rank: int, alpha_over_rank: float, dropout: float):
        from peft import LoraConfig, get_peft_model

        require_adaptable(model)
        require_dropout(model, dropout)
        self.scale, self.transposed = alpha_over_rank, transposed(model)
        self.trainable = [p for p in model.parameters() if p.requires_grad]  # PEFT freezes them
        config = LoraConfig(
            r=rank,
            lora_alpha=alpha_over_rank * rank,  # type: ignore[arg-type]
            lora_dropout=dropout,
            target_modules=sorted(targets(model)),
            target_parameters=sorted(mixtures(model)) or None,
            task_type="CAUSAL_LM",
        )
        self.model: Any = get_peft_model(model, config, autocast_adapter_dtype=True)

    def __enter__(self) -> Adapter:
        return self

    def __exit__(self, *exc: object) -> None:
        self.model.unload()
        for parameter in self.trainable:
            parameter.requires_grad_(True)

    def factors(self) -> dict[str, Pair]:
        """{parameter: (left, right)}, float32: its delta, laid out as it is, is left @ right; B has the scale."""
        return self.laid_out(self.weights())

    def load(self, tensors: Mapping[str, Encoded]) -> None:
        """Start from these factors, as `factors` gave them, of the same rank."""
        self.put(self.read(tensors))

    def trained(self) -> dict[str, Tensor]:
        """Copies of what is trained, by the names that the parameters have in `model`."""
        named = self.model.named_parameters()
        return {name: p.detach().clone() for name, p in named if p.requires_grad}

    @torch.no_grad()
    def train_on(self, trained: Mapping[str, Tensor]) -> None:
        """Go on from what `trained` gave."""
        for name, value in trained.items():
            self.model.get_parameter(name).copy_(value)

    def weights(self) -> dict[str, Pair]:
        """{parameter: (A, B)}, float32, without the scale: (rank, in) and (out, rank); of stacked experts one each."""
        return {
            name: (down(module).detach().float().clone(), _up(module).detach().float().clone())
            for name, module in adapted_layers(self.model).items()
        }

    @torch.no_grad()
    def put(self, weights: Mapping[str, Pair]) -> None:
        """Go on from these A and B, as `weights` gives them."""
        for name, module in adapted_layers(self.model).items():
            low, up = weights[name]
            down(module).copy_(low)
            _up(module).copy_(up)

    def laid_out(self, weights: Mapping[str, Pair]) -> dict[str, Pair]:
        """`factors` of A and B."""
        pairs = {}
        for name, (low, up) in weights.items():
            up = self.scale * up
            pairs[name] = (low.mT, up.mT) if name in self.transposed else (up, low)
        return pairs

    def read(self, tensors: Mapping[str, Encoded]) -> dict[str, Pair]:
        """A and B of factors that were stored, as `encoded` has it."""
        weights = {}
        for name, kept in tensors.items():
            left, right = kept.parts["left"].float(), kept.parts["right"].float()
            up, low = (right.mT, left.mT) if name in self.transposed else (left, right)
            weights[name] = (low, up / self.scale)
        return weights


def targets(model: Any) -> dict[str, nn.Module]:
    """{module name: module} of every linear layer but the head."""
    head = model.get_output_embeddings()
    return {n: m for n, m in linear_layers(model).items() if m is not head}


def mixtures(model: Any) -> dict[str, Tensor]:
    """{name: parameter} of the stacked experts (experts, rows, cols) and the routers (experts, in) of a mixture.

    Under transformers 5 they are parameters of modules of their own and no linear layers.
    """
    linear = {f"{name}.weight" for name in linear_layers(model)}
    role = roles(model)
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.ndim > 1
        and role[name] == "mlp"
        and name not in linear
        and not name.endswith("bias")
    }


def require_adaptable(model: Any) -> None:
    """Raises CLGraftError for a model of which PEFT cannot adapt every matrix of the layers."""
    kind = type(model).__name__
    why = (
        f"PEFT refuses to adapt the state spaces of {kind}"
        if model.config.model_type in REFUSED
        else ""
    )
    for name, parameter in mixtures(model).items():
        if parameter.ndim == 3 and not hasattr(_owner(model, name), "is_transposed"):
            why = f"{kind} does not say which way the matrices of {name} are stored"
    if why:
        raise CLGraftError(
            f"{why}, so there is no LoRA on every matrix of its layers; choose a method without adapters, as graftllm."
        )


def require_dropout(model: Any, dropout: float, name: str = "dropout") -> None:
    """Raises CLGraftError for dropout on a mixture of experts: PEFT has none for parameters that are no layers."""
    if dropout and mixtures(model):
        raise CLGraftError(
            f"{name}={dropout:g} cannot be had on {type(model).__name__}, whose experts are stacked: PEFT drops "
            f"nothing from them; give {name}=0."
        )


def adapted_layers(model: Any) -> dict[str, Any]:
    """{parameter name in the plain model: PEFT's layer, with lora_A and lora_B} of a model with an adapter."""
    found, prefix = {}, "base_model.model."
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            # of two parameters of one module the wrapper of the first is the base layer of the second's
            path = name[len(prefix) :].removesuffix(".base_layer")
            found[f"{path}.{getattr(module, 'parameter_name', 'weight')}"] = module
    return found


def down(module: Any) -> Tensor:
    """A of one of PEFT's layers: (rank, in), or (experts, rank, in); a view, so it can be written to."""
    weight = module.lora_A["default"].weight
    experts = getattr(module, "num_experts", 1)
    return weight if experts == 1 else weight.view(experts, -1, weight.shape[-1])


def _up(module: Any) -> Tensor:
    """B of one of PEFT's layers: (out, rank), or (experts, out, rank); a view, so it can be written to."""
    weight = module.lora_B["default"].weight
    experts = getattr(module, "num_experts", 1)
    return weight if experts == 1 else weight.view(len(weight), -1, experts).permute(2, 0, 1)


def transposed(model: Any) -> set[str]:
    """Parameter names of matrices, and of stacks of such, stored (in, out)."""
    stacked = {
        n for n, p in mixtures(model).items() if p.ndim == 3 and _owner(model, n).is_transposed
    }
    return stored_transposed(model) | stacked


def _owner(model: Any, parameter: str) -> Any:
    return model.get_submodule(parameter.rpartition(".")[0])


def encoded(pair: Pair) -> Encoded:
    """Factors, as `Adapter.factors` gives them, in bf16."""
    return (low_rank if pair[0].ndim == 2 else low_rank_stack)(*pair)


def spec(shape: tuple[int, ...], rank: int) -> Spec:
    """What `encoded` says of a parameter's factors of this rank, before there are any."""
    return (low_rank_spec if len(shape) == 2 else low_rank_stack_spec)(shape, rank)


def largest_rank(
    model: Any,
    cost_of: Callable[[Mapping[str, Spec]], int],
    budget: Budget,
    shares: int = 1,
    given: int | None = None,
    name: str = "rank",
) -> int:
    """The largest rank of which `shares` adapters in bf16 fit the budget as one pack, or the one given if it does.

    cost_of: bytes of tensors with these specs, as `Context.cost_of`. name: of the option that gives it. Raises
    OverBudget, CLGraftError for a rank above what the matrices have, and as `require_adaptable`.
    """
    require_adaptable(model)
    layers: dict[str, Any] = {f"{n}.weight": m.weight for n, m in targets(model).items()}
    shapes = {name: tuple(p.shape) for name, p in (layers | mixtures(model)).items()}

    def cost(rank: int) -> int:
        return cost_of({name: spec(shape, rank * shares) for name, shape in shapes.items()})

    # a router has a row an expert, a gate of a shared one a single row, and both may have more ranks than these
    most = min(
        min(shape[-2:])
        for name, shape in shapes.items()
        if (name in layers or len(shape) == 3) and min(shape) > 1
    )
    return largest_within(budget, cost, most, "LoRA of rank 1 on all matrices", given, name)


def downs(model: Any, packs: Sequence[SkillPack]) -> dict[str, Tensor]:
    """{parameter: the A of all these adapters, one below the other, float32 (sum of ranks, in)}; of a stack of experts
    (experts, sum of ranks, in).

    model: the plain one. packs: what `factors` gave, as `encoded`.
    """
    sideways = transposed(model)
    stacked: dict[str, list[Tensor]] = {}
    for pack in packs:
        for name, kept in pack.tensors.items():
            left, right = kept.parts["left"].float(), kept.parts["right"].float()
            stacked.setdefault(name, []).append(left.mT if name in sideways else right)
    return {name: torch.cat(parts, -2) for name, parts in stacked.items()}


def faster(task: Task, scale: float) -> Task:
    """The task with both halves of its recipe at a multiple of their learning rates, as adapters need them."""
    recipe, half = task.training, task.training.preference
    if half:
        half = replace(half, learning_rate=half.learning_rate * scale)
    rate = recipe.learning_rate * scale
    return replace(task, training=replace(recipe, learning_rate=rate, preference=half))
