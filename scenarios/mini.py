"""Math, then code, then a cipher, made here: word problems, Python functions with hidden tests, letter shifts.

Everything is procedural, so the scenario runs on any machine with no download. It is meant for the
embedded model `mini-llama`, whose tokenizer knows its words.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from cl_graft.models import world
from cl_graft.task import Example, Preference, Scenario, Task, Training


def mini(
    *,
    seed: int,
    data_dir=None,
    train_size: int = 4000,
    test_size: int = 200,
    steps: int = 250,
    batch: int = 32,
    learning_rate: float = 1.5e-3,
    dpo: bool = False,
    tasks: str = "math,code,cipher",
) -> Scenario:
    """Options: sizes of the sets, the SFT recipe, and `dpo` to follow SFT by preference optimisation."""
    training = Training(
        steps=steps,
        batch=batch,
        learning_rate=learning_rate,
        preference=Preference() if dpo else None,
    )
    scorers = {
        "math": (world.math, "number"),
        "code": (world.code, "tests"),
        "cipher": (world.cipher, "exact"),
    }

    def task(name: str, source: Callable[[Random], world.Item], score: str) -> Task:
        test = examples(source, f"test/{name}", test_size, set())
        seen = {e.prompt for e in test}
        train = examples(source, f"train/{seed}/{name}", train_size, seen)
        return Task(name, train, test, score, max_new_tokens=32, training=training)

    return Scenario(
        "mini",
        tuple(task(name, *scorers[name]) for name in tasks.split(",")),
        general=Task(
            "general",
            (),
            examples(world.general, "test/general", test_size, set()),
            "exact",
            max_new_tokens=8,
        ),
    )


def examples(
    source: Callable[[Random], world.Item], seed: str, size: int, excluded: set[str]
) -> tuple[Example, ...]:
    """Items of the source whose prompts are not excluded; the training set never holds a test prompt."""
    rng, found = Random(seed), []
    while len(found) < size:
        item = source(rng)
        prompt = world.prompt(item.question)
        if prompt not in excluded:
            tests = tuple(f"assert {call} == {expected}" for call, expected in item.tests)
            found.append(Example(prompt, item.answer, tests))
    return tuple(found)
