"""LoRA on every linear layer, by PEFT, under the three conventions of continual learning (Hu et al. 2022)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from cl_graft.budget import largest
from cl_graft.errors import OverBudget, UnknownName
from cl_graft.skillpack.codecs import Encoded, low_rank
from cl_graft.skillpack.compress.calibrate import linear_layers, stored_transposed
from cl_graft.skillpack.live.decode import factors as stored_factors
from cl_graft.strategy import Strategy
from cl_graft.strategy.context import Context
from cl_graft.task import Task, Training

CONVENTIONS = {"trained_on": "latest", "summed": "sum", "merged": "latest"}


class lora(Strategy):
    """convention: `trained_on` trains one adapter on from task to task (SeqLoRA); `summed` freezes the old
    adapters and adds a new one, kept as a pack of its own (IncLoRA); `merged` folds each adapter into the
    weights and stores the running sum as one pack.
    rank: None takes the largest that the budget holds (for `merged`, an equal share for every task).
    """

    @property
    def keeps(self):
        if self.options["convention"] not in CONVENTIONS:
            raise UnknownName("LoRA convention", self.options["convention"], CONVENTIONS)
        return CONVENTIONS[self.options["convention"]]

    def learn(
        self,
        task: Task,
        context: Context,
        *,
        convention: str = "trained_on",
        rank: int | None = None,
        alpha_over_rank: float = 2.0,
        dropout: float = 0.0,
        learning_rate_scale: float = 3.0,
    ) -> dict[str, Encoded]:
        from peft import LoraConfig, get_peft_model

        rank = rank or self._largest_rank(
            context, len(self.scenario.tasks) if convention == "merged" else 1
        )
        continued = self.packs[-1] if convention == "trained_on" and self.packs else None
        if continued:  # the adapter itself holds what was learned: its base is the base
            self.restore_base()
        transposed = stored_transposed(self.model)
        config = LoraConfig(
            r=rank,
            lora_alpha=alpha_over_rank * rank,
            lora_dropout=dropout,
            target_modules=sorted(self._targets()),
            task_type="CAUSAL_LM",
        )
        adapted: Any = get_peft_model(self.model, config, autocast_adapter_dtype=True)
        faster = replace(task, training=_faster(task.training, learning_rate_scale))
        try:
            if continued:
                _load_factors(adapted, continued.tensors, transposed, alpha_over_rank)
            self.teach(adapted, faster)
            factors = _factors(adapted, transposed, alpha_over_rank)
        finally:
            adapted.unload()
        if convention == "merged" and self.packs:
            earlier = self.packs[-1].tensors
            factors = {n: _joined(earlier[n], left, right) for n, (left, right) in factors.items()}
        return {name: low_rank(left, right) for name, (left, right) in factors.items()}

    def _targets(self) -> dict[str, Any]:
        """Every linear layer but the head."""
        head = self.model.get_output_embeddings()
        return {n: m for n, m in linear_layers(self.model).items() if m is not head}

    def _largest_rank(self, context: Context, shares: int) -> int:
        shapes = {f"{n}.weight": m.weight.shape for n, m in self._targets().items()}

        def fits(rank: int) -> bool:
            blank = {
                name: low_rank(torch.zeros(out, rank * shares), torch.zeros(rank * shares, inner))
                for name, (out, inner) in shapes.items()
            }
            return context.cost(blank) <= context.budget.bytes

        best = largest(fits, 1, min(min(shape) for shape in shapes.values()))
        if best < 1:
            raise OverBudget(
                f"the budget {context.budget.text} does not hold LoRA of rank 1 on all linear layers; raise it."
            )
        return best


def _faster(recipe: Training, scale: float) -> Training:
    """Both halves of the recipe at a multiple of their learning rates: adapters need larger ones."""
    half = recipe.preference
    if half:
        half = replace(half, learning_rate=half.learning_rate * scale)
    return replace(recipe, learning_rate=recipe.learning_rate * scale, preference=half)


def _lora_modules(adapted: Any) -> dict[str, Any]:
    prefix = "base_model.model."
    return {
        f"{name[len(prefix) :]}.weight": module
        for name, module in adapted.named_modules()
        if hasattr(module, "lora_A") and "default" in module.lora_A
    }


def _factors(adapted: Any, transposed: set[str], scale: float) -> dict[str, tuple]:
    """name -> (left, right) with delta = left @ right in the parameter's own orientation; the scale is in left."""
    factors = {}
    for name, module in _lora_modules(adapted).items():
        up = scale * module.lora_B["default"].weight.detach().float()
        down = module.lora_A["default"].weight.detach().float()
        factors[name] = (down.T, up.T) if name in transposed else (up, down)
    return factors


@torch.no_grad()
def _load_factors(
    adapted: Any, tensors: dict[str, Encoded], transposed: set[str], scale: float
) -> None:
    for name, module in _lora_modules(adapted).items():
        left, right = stored_factors([tensors[name]])
        up, down = (right.T, left.T) if name in transposed else (left, right)
        module.lora_B["default"].weight.copy_(up / scale)
        module.lora_A["default"].weight.copy_(down)


def _joined(earlier: Encoded, left: torch.Tensor, right: torch.Tensor) -> tuple:
    old_left, old_right = stored_factors([earlier])
    return torch.cat([old_left, left], 1), torch.cat([old_right, right], 0)
