"""What one training job is: a kind of loss and its recipe. Plain data that decides the result, and a hash of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

from cl_graft.config import Launch
from cl_graft.errors import CLGraftError
from cl_graft.task import Pair, Preference, Task

Row = dict[str, str]  # prompt and completion (sft); prompt, chosen and rejected (dpo)


@dataclass(frozen=True)
class StageConfig:
    """One job, beside the checkpoint it starts from and the rows it reads.

    batch: rows of one optimizer step over all processes. warmup: share of the steps. beta, length_normalised: of DPO
    (Rafailov et al. 2023, arXiv 2305.18290; -log sigmoid(beta/|yw| log-ratio(yw) - beta/|yl| log-ratio(yl)) where
    normalised, SimPO's and FuseChat-3.0's form).
    """

    kind: Literal["sft", "dpo"]
    steps: int
    batch: int
    learning_rate: float
    warmup: float
    weight_decay: float
    max_length: int
    seed: int
    beta: float = 0.0
    length_normalised: bool = False


def jobs(
    task: Task, seed: int, sample: Callable[[Preference], Sequence[Pair]]
) -> Iterator[tuple[list[Row], StageConfig]]:
    """The stages of a task's recipe, rows and config: SFT, then DPO if it has a preference half and there are pairs.

    sample: gives the model's own pairs; asked when SFT is over, and only where the task has none of its own.
    """
    yield sft_job(task, seed)
    half = task.training.preference
    if half and (pairs := task.pairs or sample(half)):
        yield dpo_job(task, pairs, seed)


def sft_job(task: Task, seed: int) -> tuple[list[Row], StageConfig]:
    """Rows and config of the supervised half of a task's recipe."""
    recipe = task.training
    rows = [{"prompt": e.prompt, "completion": e.completion} for e in task.train]
    config = StageConfig(
        "sft",
        _steps(recipe.steps, recipe.epochs, len(rows), recipe.batch),
        recipe.batch,
        recipe.learning_rate,
        recipe.warmup,
        recipe.weight_decay,
        recipe.max_length,
        seed,
    )
    return rows, config


def dpo_job(task: Task, pairs: Sequence[Pair], seed: int) -> tuple[list[Row], StageConfig]:
    """Rows and config of the preference half, on these pairs."""
    recipe, half = task.training, task.training.preference
    if half is None:
        raise CLGraftError(f"the recipe of task {task.name!r} has no preference half.")
    rows = [{"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected} for p in pairs]
    config = StageConfig(
        "dpo",
        _steps(half.steps, half.epochs, len(rows), half.batch),
        half.batch,
        half.learning_rate,
        recipe.warmup,
        recipe.weight_decay,
        recipe.max_length,
        seed,
        half.beta,
        half.length_normalised,
    )
    return rows, config


def _steps(steps: int, epochs: float | None, rows: int, batch: int) -> int:
    return steps if epochs is None else max(1, math.ceil(epochs * rows / batch))


def order(rows: int, config: StageConfig) -> list[int]:
    """Which row comes when: shuffled passes, as many as `steps` whole batches take.

    So a batch is the same rows whatever the number of processes, and the last one of a pass is no smaller.
    """
    rng, numbers = Random(config.seed), list[int]()
    while len(numbers) < config.steps * config.batch:
        numbers += rng.sample(range(rows), rows)
    return numbers[: config.steps * config.batch]


def accumulation(batch: int, launch: Launch) -> tuple[int, int]:
    """(micro-batch of a process, micro-batches of a step) that make exactly `batch`. Raises CLGraftError if none do."""
    processes = launch.processes or 1
    micro = launch.micro_batch or max(1, batch // processes)
    if batch % (micro * processes):
        raise CLGraftError(
            f"{processes} processes with micro-batches of {micro} cannot make a batch of {batch}; "
            f"choose numbers whose product divides it."
        )
    return micro, batch // (micro * processes)


def save_steps(config: StageConfig, launch: Launch) -> int:
    """Steps between two checkpoints that a killed job goes on from.

    Whole lines of the log: a line is a mean over its steps, and none may be cut in two by a checkpoint.
    """
    every = logging_steps(config)
    return max(every, (launch.save_steps or max(50, config.steps // 5)) // every * every)


def logging_steps(config: StageConfig) -> int:
    """Steps that a line of the log is the mean of."""
    return max(1, config.steps // 20)


def at_step(step: int, steps: int, loss: float | None) -> str:
    """Words of where a job is; without its loss before it was first logged."""
    return f"step {step} of {steps}" + (f", loss {loss:.4g}" if loss is not None else "")
