"""LoRA adapters by PEFT on every linear layer but the head: the largest that fits, and their factors in and out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from cl_graft.budget import Budget, largest_within
from cl_graft.skillpack.codecs import Encoded, Spec, low_rank_spec
from cl_graft.skillpack.compress.calibrate import linear_layers, stored_transposed
from cl_graft.skillpack.format.file import SkillPack
from cl_graft.task import Task

Pair = tuple[Tensor, Tensor]


class Adapter:
    """A new adapter on a model; the model is plain again, and as it was, at the end of the `with`.

    model: PEFT's wrapping of it, whose adapter alone is trained: B starts at zero, so nothing is changed yet.
    rank, dropout: of LoRA; alpha_over_rank: the factor on B A (Hu et al. 2021, arXiv 2106.09685).
    """

    def __init__(self, model: Any, rank: int, alpha_over_rank: float, dropout: float):
        from peft import LoraConfig, get_peft_model

        self.scale, self.transposed = alpha_over_rank, stored_transposed(model)
        config = LoraConfig(
            r=rank,
            lora_alpha=alpha_over_rank * rank,  # type: ignore[arg-type]
            lora_dropout=dropout,
            target_modules=sorted(targets(model)),
            task_type="CAUSAL_LM",
        )
        self.model: Any = get_peft_model(model, config, autocast_adapter_dtype=True)

    def __enter__(self) -> Adapter:
        return self

    def __exit__(self, *exc: object) -> None:
        self.model.unload()

    def factors(self) -> dict[str, Pair]:
        """{parameter: (left, right)}, float32: its delta, laid out as it is, is left @ right; B has the scale."""
        pairs = {}
        for name, module in adapted_layers(self.model).items():
            up = self.scale * module.lora_B["default"].weight.detach().float()
            down = module.lora_A["default"].weight.detach().float()
            pairs[name] = (down.T, up.T) if name in self.transposed else (up, down)
        return pairs

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Encoded]) -> None:
        """Start from these factors, as `factors` gave them, of the same rank."""
        for name, module in adapted_layers(self.model).items():
            left, right = tensors[name].parts["left"].float(), tensors[name].parts["right"].float()
            up, down = (right.T, left.T) if name in self.transposed else (left, right)
            module.lora_B["default"].weight.copy_(up / self.scale)
            module.lora_A["default"].weight.copy_(down)


def targets(model: Any) -> dict[str, nn.Module]:
    """{module name: module} of every linear layer but the head."""
    head = model.get_output_embeddings()
    return {n: m for n, m in linear_layers(model).items() if m is not head}


def adapted_layers(model: Any) -> dict[str, Any]:
    """{parameter name in the plain model: PEFT's layer, with lora_A and lora_B} of a model with an adapter."""
    prefix = "base_model.model."
    return {
        f"{name[len(prefix) :]}.weight": module
        for name, module in model.named_modules()
        if hasattr(module, "lora_A") and "default" in module.lora_A
    }


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
    OverBudget, and CLGraftError for a rank above what the matrices have.
    """
    shapes = {f"{n}.weight": _shape(m) for n, m in targets(model).items()}

    def cost(rank: int) -> int:
        specs = {name: low_rank_spec(shape, rank * shares) for name, shape in shapes.items()}
        return cost_of(specs)

    most = min(min(shape) for shape in shapes.values())
    return largest_within(budget, cost, most, "LoRA of rank 1 on all linear layers", given, name)


def _shape(module: Any) -> tuple[int, int]:
    return tuple(module.weight.shape)


def downs(model: Any, packs: Sequence[SkillPack]) -> dict[str, Tensor]:
    """{parameter: the A of all these adapters, one below the other, float32 (sum of ranks, in)}.

    model: the plain one. packs: what `factors` gave, stored as `low_rank`.
    """
    transposed = stored_transposed(model)
    stacked: dict[str, list[Tensor]] = {}
    for pack in packs:
        for name, encoded in pack.tensors.items():
            left, right = encoded.parts["left"].float(), encoded.parts["right"].float()
            stacked.setdefault(name, []).append(left.T if name in transposed else right)
    return {name: torch.cat(parts) for name, parts in stacked.items()}


def faster(task: Task, scale: float) -> Task:
    """The task with both halves of its recipe at a multiple of their learning rates: adapters need larger ones."""
    recipe, half = task.training, task.training.preference
    if half:
        half = replace(half, learning_rate=half.learning_rate * scale)
    rate = recipe.learning_rate * scale
    return replace(task, training=replace(recipe, learning_rate=rate, preference=half))
