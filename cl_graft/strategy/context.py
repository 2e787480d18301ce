"""What a method may look at when it decides what to keep of a task's delta."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cl_graft.budget import Budget, largest_within
from cl_graft.errors import OverBudget
from cl_graft.models.roles import Role, roles
from cl_graft.models.spread import device_of, is_spread, shapes_of
from cl_graft.models.text import encode
from cl_graft.skillpack.codecs import Encoded, Spec, dense, sparse, weight_bits
from cl_graft.skillpack.compress.calibrate import Moments, moments
from cl_graft.skillpack.compress.text import padded
from cl_graft.skillpack.format.file import SkillPack, packed_size
from cl_graft.task import Example, Task
from cl_graft.training.delta import Delta

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def cost_of(pack: SkillPack, specs: Mapping[str, Spec], budget: Budget) -> int:
    """Bytes of a pack with these tensors by the budget's convention: of the file, or of the weights it keeps."""
    if budget.counts_weights:
        return -(-sum(weight_bits(*spec) for spec in specs.values()) // 8)
    return packed_size(
        specs,
        task=pack.task,
        method=pack.method,
        options=pack.options,
        base=pack.base,
        versions=pack.versions,
    )


def validation(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, size: int
) -> list[dict[str, Tensor]]:
    """A task's validation in batches, as `Context.validation` says; for methods that look at all tasks seen."""
    rows = task.validation or task.train
    chunks = [rows[i : i + size] for i in range(0, len(rows), size)]
    return [batch_of(model, tokenizer, task, chunk) for chunk in chunks]


def batch_of(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    examples: Sequence[Example],
) -> dict[str, Tensor]:
    """input_ids, attention_mask and labels (int64, examples x length), on the model's device."""
    texts = [encode(tokenizer, e.prompt, e.completion, task.training.max_length) for e in examples]
    batch = padded([(h + t, len(h)) for h, t in texts], tokenizer.pad_token_id)
    return {key: value.to(device_of(model)) for key, value in batch.items()}


@dataclass
class Context:
    """The task just learned, and the model that learned it.

    model: holds the tuned weights. start: parameter name -> weights that training started from, in the
    model's dtype. frozen: parameters that stay as they are. budget: storage allowed for this task.
    progress: called with the fraction done.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    task: Task
    start: Mapping[str, Tensor]
    budget: Budget
    seed: int
    header: SkillPack  # the pack to be, without tensors: what its header costs
    frozen: Collection[str] = ()
    progress: Callable[[float], None] = field(default=lambda done: None)

    @cached_property
    def roles(self) -> dict[str, Role]:
        """Parameter name -> embedding, head, attention, mlp or norm."""
        return roles(self.model)

    def delta(self, stage: Path) -> Delta:
        """Tuned minus start of all that is touched, read tensor by tensor from the folder of a finished stage."""
        return Delta(stage, self.start, device_of(self.model), self.frozen)

    def cost(self, tensors: Mapping[str, Encoded]) -> int:
        """Bytes these encoded tensors take by the budget's convention (see Budget)."""
        return self.cost_of({name: encoded.spec for name, encoded in tensors.items()})

    def cost_of(self, specs: Mapping[str, Spec]) -> int:
        """Bytes of tensors with these specs, {name: (codec, shape, meta)}, without any data."""
        return cost_of(self.header, specs, self.budget)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """{parameter name: shape} of all that is touched; known before there are any weights."""
        return {n: shape for n, shape in shapes_of(self.start).items() if n not in self.frozen}

    def seed_of(self, name: str) -> int:
        """48 bits of the run's seed and a parameter's name, for what is drawn at random parameter by parameter."""
        drawn = hashlib.blake2b(f"{self.seed}/{name}".encode(), digest_size=6)
        return int.from_bytes(drawn.digest(), "big")

    def require_fit(self, tensors: Mapping[str, Encoded]) -> None:
        """Raises OverBudget if the tensors cost more than the budget."""
        cost = self.cost(tensors)
        if cost > self.budget.bytes:
            raise OverBudget(
                f"the pack for task {self.task.name!r} needs {cost} bytes and the budget {self.budget.text} "
                f"allows {self.budget.bytes}; raise --budget or the method's compression."
            )

    def top_magnitude(self, delta: Mapping[str, Tensor]) -> dict[str, Encoded]:
        """The largest entries over all tensors together, as many as the budget holds."""
        return self.keep(delta, self.masks({name: x.abs() for name, x in delta.items()}))

    def keep(self, delta: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> dict[str, Encoded]:
        """The masked entries, sparse; a tensor with none is left out."""
        return {name: sparse(delta[name], masks[name]) for name in delta if masks[name].any()}

    def masks(self, scores: Mapping[str, Tensor], at_most: int | None = None) -> dict[str, Tensor]:
        """Boolean masks of the best-scored entries, as many over all together as the budget holds.

        at_most: a count known to fit about so; if it fits here it is taken, and no more is looked for.
        """
        flat = torch.cat([s.flatten().float() for s in scores.values()])
        order = flat.argsort(descending=True, stable=True)

        def chosen(count: int) -> dict[str, Tensor]:
            picked = torch.zeros_like(flat, dtype=torch.bool)
            picked[order[:count]] = True
            parts = picked.split([s.numel() for s in scores.values()])
            return {n: p.view_as(s) for (n, s), p in zip(scores.items(), parts, strict=True)}

        def cost(count: int) -> int:
            return self.cost(self.keep(scores, chosen(count)))

        most = min(at_most or flat.numel(), flat.numel())
        if at_most and cost(most) <= self.budget.bytes:
            return chosen(most)
        return chosen(largest_within(self.budget, cost, most, "one weight"))

    def dense(self, tensors: Mapping[str, Tensor]) -> dict[str, Encoded]:
        """All of the delta in bf16, whatever it costs: for references that have no budget."""
        return {name: dense(x) for name, x in tensors.items()}

    def batches(self, size: int, seed: int = 0) -> Iterator[dict[str, Tensor]]:
        """Endless batches of the task's training text: input_ids, attention_mask, labels (int64, size x length).

        Labels are -100 outside the completion.
        """
        rng, rows = Random(f"{self.seed}/{seed}"), list(self.task.train)
        while True:
            picked = [rows[rng.randrange(len(rows))] for _ in range(size)]
            yield batch_of(self.model, self.tokenizer, self.task, picked)

    def validation(self, size: int) -> list[dict[str, Tensor]]:
        """The task's validation examples in batches of `size`, each once, as `batches` gives them.

        A task of fewer than 20 training prompts has none (Task.with_validation); then they are its training examples.
        """
        return validation(self.model, self.tokenizer, self.task, size)

    def moments(self, batches: int = 8, size: int = 32, gradients: bool = True) -> Moments:
        """Second moments of the layers' inputs and output gradients on the task's training text."""
        source = self.batches(size, seed=1)
        found = moments(self.model, [next(source) for _ in range(batches)], gradients)
        if is_spread(self.model):  # layers are on several devices, and the delta on one
            device = device_of(self.model)
            found.inputs = {name: x.to(device) for name, x in found.inputs.items()}
            found.outputs = {name: x.to(device) for name, x in found.outputs.items()}
        return found
