"""What a router is: a state of a few tensors, updated task by task without old data, and a choice for each prompt."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from random import Random
from typing import ClassVar

from torch import Tensor

State = dict[str, Tensor]


class Router(ABC):
    """Infers the task of a prompt from its features, the base's hidden state of the prompt.

    Options are the keyword-only arguments of `__init__`. The state is all that a router knows: it is stored beside the
    packs, in the dtypes it is given in, and its bytes count.
    """

    examples: ClassVar[int] = 1000  # most training prompts of a task that are looked at

    def sample(self, prompts: Sequence[str], seed: int) -> list[str]:
        """The training prompts of a task that the router learns from."""
        return Random(seed).sample(list(prompts), min(self.examples, len(prompts)))

    @abstractmethod
    def update(self, state: State, features: Tensor, task: int) -> State:
        """The state after task number `task` (0-based, in the order learned).

        state: after the task before; empty for the first. features: float32 (prompts, width), of this task alone.
        """

    @abstractmethod
    def scores(self, state: State, features: Tensor) -> Tensor:
        """Scores (prompts, tasks) of features (prompts, width), higher where the task is likelier."""

    def choose(self, state: State, features: Tensor) -> list[int]:
        """The likeliest task of every prompt; of equals the earliest."""
        return self.scores(state, features).argmax(1).tolist()
