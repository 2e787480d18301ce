"""What a router is: a state of a few tensors, updated task by task without old data, and scores of each prompt."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from cl_graft.errors import CLGraftError
from cl_graft.evaluation.features import Features
from cl_graft.models.spread import device_of, offloaded
from cl_graft.models.text import encode_prompts
from cl_graft.skillpack.compress.text import padded
from cl_graft.skillpack.format.file import SkillPack
from cl_graft.skillpack.live.grafted import Grafted

State = dict[str, Tensor]
BATCH = 16  # prompts that are read at a time where more than features is held of them
GRID = 10  # parts that weights of merged packs are whole numbers of, so that prompts share a merge


@dataclass(frozen=True)
class Choice:
    """What answers a prompt: tasks (0-based), the likeliest first, and their weights, of sum 1; none is the base."""

    tasks: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()

    @staticmethod
    def of(task: int | None) -> Choice:
        return Choice() if task is None else Choice((task,), (1.0,))


@dataclass(frozen=True)
class Selection:
    """The way from scores to what answers.

    top_k: packs that answer a prompt. combine: as an ensemble, or as a merge. reject: the share of in-stream prompts
    that may be left to the base; 0 leaves none to it.
    """

    top_k: int = 1
    combine: Literal["ensemble", "merge"] = "ensemble"
    reject: float = 0.0

    def choose(
        self, scores: Tensor, temperature: float = 1.0, threshold: float | None = None
    ) -> list[Choice]:
        """A choice for each row of scores (prompts, tasks); of equals the earliest. threshold: of the best score."""
        best, tasks = (x[:, : self.top_k] for x in scores.sort(dim=1, descending=True, stable=True))
        shares = torch.full_like(best, 1.0)
        if self.combine == "merge":
            shares = (GRID * (best / temperature).softmax(1)).round()
        kept = [True] * len(best) if threshold is None else (best[:, 0] >= threshold).tolist()
        rows = zip(tasks.tolist(), shares.tolist(), kept, strict=True)
        return [_choice(of, parts) if keep else Choice() for of, parts, keep in rows]

    def threshold(self, scores: Tensor) -> float:
        """The best score that the share `reject` of these in-stream prompts falls short of; scores (prompts, tasks)."""
        return scores.double().amax(1).quantile(self.reject).item()


def _choice(tasks: Sequence[int], parts: Sequence[float]) -> Choice:
    """Weights in proportion to whole numbers; tasks of none are left out."""
    known = [(task, part) for task, part in zip(tasks, parts, strict=True) if part]
    total = sum(part for _, part in known)
    return Choice(tuple(task for task, _ in known), tuple(part / total for _, part in known))


@dataclass(frozen=True)
class View:
    """What a router may look at when it is asked; no pack is on then.

    packs: what answers each task so far. features: float32 (prompts, width) of prompts, under the base.
    """

    grafted: Grafted
    tokenizer: Any
    features: Features
    packs: Sequence[Sequence[SkillPack]]

    def batches(self, prompts: Sequence[str]) -> Iterator[tuple[list[int], Tensor, Tensor]]:
        """Prompts of about a length: their indices, and input_ids and attention_mask, int64 (prompts, tokens)."""
        rows = encode_prompts(self.tokenizer, prompts)
        order = sorted(range(len(rows)), key=lambda i: (len(rows[i]), i))
        device = device_of(self.grafted.model)
        self.grafted.model.eval()
        for first in range(0, len(order), BATCH):
            chunk = order[first : first + BATCH]
            batch = padded([(rows[i], len(rows[i])) for i in chunk], self.tokenizer.pad_token_id)
            yield chunk, batch["input_ids"].to(device), batch["attention_mask"].to(device)

    def delta(self, task: int, name: str, layer: Any) -> Tensor:
        """What the task's packs add to the layer's weight of that name, float32 in its shape."""
        device = offloaded(self.grafted.model).device(name, layer.weight)
        total = torch.zeros(layer.weight.shape, device=device)
        for pack in self.packs[task]:
            if name in pack.tensors:
                total += pack.delta(name).to(total.device)
        return total


class BaseRouter(ABC):
    """Infers the task of a prompt. Options are the keyword-only arguments of `__init__`.

    The state is all that it knows beside the packs: it is stored beside them, in the dtypes it is given in, and its
    bytes count. temperature: what scores are divided by before a softmax makes weights of them.
    """

    examples: ClassVar[int] = 1000  # most training prompts of a task that are looked at
    temperature: ClassVar[float] = 1.0
    selection = Selection()

    def sample(self, prompts: Sequence[str], seed: int) -> list[str]:
        """The training prompts of a task that the router learns from."""
        return Random(seed).sample(list(prompts), min(self.examples, len(prompts)))

    @abstractmethod
    def learn(self, state: State, prompts: Sequence[str], view: View, task: int) -> State:
        """The state after task number `task`, of which the prompts are; asked before the task has a pack."""

    @abstractmethod
    def judge(self, state: State, prompts: Sequence[str], view: View) -> Tensor:
        """Scores (prompts, tasks), higher where the task is likelier; the best of a row says how like any it is.

        Raises CLGraftError before the first task.
        """

    def passes(self, tasks: int) -> int:
        """Forward passes over a prompt until one of so many tasks is chosen."""
        return 1


class Router(BaseRouter):
    """A router by the features of a prompt: the base's last hidden state, averaged over the prompt's tokens."""

    @abstractmethod
    def update(self, state: State, features: Tensor, task: int) -> State:
        """The state after task number `task` (0-based, in the order learned).

        state: after the task before; empty for the first. features: float32 (prompts, width), of this task alone.
        """

    @abstractmethod
    def scores(self, state: State, features: Tensor) -> Tensor:
        """Scores (prompts, tasks) of features (prompts, width), higher where the task is likelier."""

    def learn(self, state: State, prompts: Sequence[str], view: View, task: int) -> State:
        return self.update(state, view.features(prompts), task)

    def judge(self, state: State, prompts: Sequence[str], view: View) -> Tensor:
        require_seen(self, state)
        return self.scores(state, view.features(prompts))


class PackRouter(BaseRouter):
    """A router by the packs themselves: it learns from no prompt and keeps nothing."""

    def learn(self, state: State, prompts: Sequence[str], view: View, task: int) -> State:
        return {}


def require_seen(router: BaseRouter, seen: Any) -> None:
    """Raises CLGraftError for a router that has seen no task. seen: its state, or the packs."""
    if not seen:
        raise CLGraftError(
            f"the router {type(router).__name__} has seen no task and cannot tell one from another; let it learn a "
            "task first, or leave the prompt to the base."
        )
