"""Math, then facts that must go: passwords of invented people are learned and then unlearned, made here.

For the embedded models. The test of `facts` asks for every password in the two wordings that it was trained in, a
suite each; unlearning is given one of them: what is lost in that wording alone is still in the weights. Another
wording, of which no training has seen anything, is the test of `unlearn`. Beside exact answers the bits of the right
password count: before training it is as unlikely as any other word. That these tests are of the training set is on
purpose.
"""

from __future__ import annotations

from dataclasses import replace
from random import Random

from cl_graft import plugins
from cl_graft.models import toy_language
from cl_graft.ranges import Count, Positive
from cl_graft.task import Example, Scenario, Task, Training

# trained and unlearned, trained alone, never trained: for validation, and for the test of the last task
ASKED = (
    "Password of {}.",
    "Which word is {} known by?",
    "Tell the word of {}.",
    "Say what {} says.",
)


def unlearning(
    *,
    seed: int,
    data_dir=None,
    facts: Count = 64,
    train_size: Count = 4000,
    test_size: Count = 200,
    steps: Count = 240,
    facts_steps: Count = 240,
    unlearning_steps: Count = 20,
    batch: Count = 16,
    learning_rate: Positive = 2e-3,
    facts_learning_rate: Positive = 2e-3,
    unlearning_rate: Positive = 3e-4,
) -> Scenario:
    """Options: the number of facts, sizes of the sets of math and general ability, and three SFT recipes: of math, of
    the facts, and of what a method trains to unlearn them."""
    mini = plugins.load("scenario", "mini")(
        seed=seed,
        train_size=train_size,
        test_size=test_size,
        steps=steps,
        batch=batch,
        learning_rate=learning_rate,
        tasks="math",
    )
    given, otherwise, validation, never = told(facts)
    learned = Training(steps=facts_steps, batch=batch, learning_rate=facts_learning_rate)
    undone = Training(steps=unlearning_steps, batch=batch, learning_rate=unlearning_rate)
    common = {"score": "exact", "also": ("neg_bits_per_byte",), "max_new_tokens": 8}
    tasks = (
        *mini.tasks,
        Task(
            "facts",
            given + otherwise,
            suites("given", given) + suites("otherwise", otherwise),
            training=learned,
            validation=validation,
            **common,
        ),
        Task(
            "unlearn",
            given,
            never,
            training=undone,
            validation=validation,
            unlearns="facts",
            **common,
        ),
    )
    return Scenario("unlearning", tasks, general=mini.general)


def told(count: int) -> list[tuple[Example, ...]]:
    """Every fact in each of the wordings, the same for every seed: a name of five letters, a word of four."""
    rng, known = Random("facts"), dict[str, str]()
    while len(known) < count:
        name, word = ("".join(rng.choices(toy_language.LETTERS, k=k)) for k in (5, 4))
        known.setdefault(name, word)
    return [
        tuple(
            Example(toy_language.prompt(asked.format(name)), word) for name, word in known.items()
        )
        for asked in ASKED
    ]


def suites(name: str, examples: tuple[Example, ...]) -> tuple[Example, ...]:
    """The examples as a suite of a test."""
    return tuple(replace(example, suite=name) for example in examples)
