"""Math, then code, then a cipher, made here: word problems, Python functions with hidden tests, letter shifts.

Everything is procedural, so the scenario runs on any machine with no download. It is meant for the
embedded model `mini-llama`, whose tokenizer knows its words.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from random import Random

from cl_graft.data import DataError
from cl_graft.errors import UnknownName
from cl_graft.models import toy_language
from cl_graft.ranges import Count, Positive
from cl_graft.task import Example, Preference, Scenario, Task, Training

# Source, scorer, and the share of `steps` that the task takes.
TASKS: dict[str, tuple[Callable[[Random], toy_language.Item], str, float]] = {
    "math": (toy_language.math, "number", 2.0),
    "code": (toy_language.code, "tests", 1.0),
    "cipher": (toy_language.cipher, "exact", 2.0),
}

VALIDATION = 64  # examples of each task beside its training set


def mini(
    *,
    seed: int,
    data_dir=None,
    train_size: Count = 4000,
    test_size: Count = 200,
    steps: Count = 240,
    batch: Count = 16,
    learning_rate: Positive = 2e-3,
    dpo: bool = False,
    dpo_learning_rate: Positive = 1e-4,
    dpo_beta: Positive = 0.1,
    dpo_length_normalised: bool = False,
    tasks: str = "math,code,cipher",
) -> Scenario:
    """Options: sizes of the sets, the SFT recipe, `dpo` to follow SFT by preference optimisation, and its recipe."""
    preference = Preference(
        learning_rate=dpo_learning_rate, beta=dpo_beta, length_normalised=dpo_length_normalised
    )

    def task(name: str) -> Task:
        if name not in TASKS:
            raise UnknownName("task of mini", name, TASKS)
        source, score, share = TASKS[name]
        test = examples(source, f"test/{name}", test_size)
        seen = {e.prompt for e in test}
        train = examples(source, f"train/{seed}/{name}", train_size, seen)
        seen |= {e.prompt for e in train}
        validation = examples(source, f"validation/{seed}/{name}", VALIDATION, seen)
        recipe = Training(
            steps=round(share * steps),
            batch=batch,
            learning_rate=learning_rate,
            preference=preference if dpo else None,
        )
        return Task(
            name, train, test, score, max_new_tokens=32, training=recipe, validation=validation
        )

    general = examples(toy_language.general, "test/general", test_size)
    return Scenario(
        "mini",
        tuple(task(name) for name in tasks.split(",")),
        general=Task("general", (), general, "exact", max_new_tokens=8),
    )


def examples(
    source: Callable[[Random], toy_language.Item],
    seed: str,
    size: int,
    excluded: Container[str] = frozenset(),
) -> tuple[Example, ...]:
    """Items of the source whose prompts are not excluded; no set holds a prompt of another.

    Raises DataError where large sets leave too little of a small source.
    """
    rng, items = Random(seed), []
    for _ in range(100 * size + 1000):
        item = source(rng)
        prompt = toy_language.prompt(item.question)
        if prompt not in excluded:
            tests = tuple(f"assert {call} == {expected}" for call, expected in item.tests)
            items.append(Example(prompt, item.answer, tests))
        if len(items) == size:
            return tuple(items)
    raise DataError(
        f"the sets before it leave too few prompts for {seed!r} of mini; lower mini.test_size or mini.train_size."
    )
