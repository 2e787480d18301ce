"""Math, then code, then a cipher, made here: word problems, Python functions with hidden tests, letter shifts.

Everything is procedural, so the scenario runs on any machine with no download. It is meant for the
embedded model `mini-llama`, whose tokenizer knows its words. The test sets are the same for every seed, hold each
question once, and ask what is in no training set and in no embedded model's pre-training (`toy_language.part`).
"""

from __future__ import annotations

from random import Random

from cl_graft.data import DataError
from cl_graft.errors import UnknownName
from cl_graft.models import toy_language
from cl_graft.ranges import Count, Positive
from cl_graft.task import Example, Preference, Scenario, Task, Training

# Source, scorer, and the share of `steps` that the task takes.
TASKS: dict[str, tuple[toy_language.Source, str, float]] = {
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
    freeze_embeddings: bool = False,
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
        train = training(source, f"train/{seed}/{name}", train_size)
        test = held_out(source, "test", name, test_size)
        validation = held_out(source, "validation", name, VALIDATION)
        recipe = Training(
            steps=round(share * steps),
            batch=batch,
            learning_rate=learning_rate,
            freeze_embeddings=freeze_embeddings,
            preference=preference if dpo else None,
        )
        return Task(
            name, train, test, score, max_new_tokens=32, training=recipe, validation=validation
        )

    general = held_out(toy_language.general, "test", "general", test_size)
    return Scenario(
        "mini",
        tuple(task(name) for name in tasks.split(",")),
        general=Task("general", (), general, "exact", max_new_tokens=8),
    )


def training(source: toy_language.Source, seed: str, size: int) -> tuple[Example, ...]:
    """Examples drawn from the training part of the source; a question may come again."""
    rng = Random(seed)
    return tuple(example(toy_language.training(source, rng)) for _ in range(size))


def held_out(
    source: toy_language.Source, part: toy_language.Part, name: str, size: int
) -> tuple[Example, ...]:
    """Examples of another part of the source, the same for every seed, no question twice.

    Raises DataError for a size above the number of questions that there are.
    """
    seed = f"{part}/{name}"
    rng, items = Random(seed), dict[str, Example]()
    for _ in range(200 * size + 2000):
        item = source(rng)
        if toy_language.part(item.question) == part:
            items.setdefault(item.question, example(item))
        if len(items) == size:
            return tuple(items.values())
    raise DataError(
        f"{seed!r} of mini has {len(items)} different questions, not {size}; lower mini.{part}_size."
    )


def example(item: toy_language.Item) -> Example:
    tests = tuple(f"assert {call} == {expected}" for call, expected in item.tests)
    return Example(toy_language.prompt(item.question), item.answer, tests)
