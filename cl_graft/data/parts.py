"""Training and test examples of one task out of its data: what is left out of them, and a test set where there is none.

Files of the field say a prompt twice, with one answer or with two, and ask in the test what they train on. One rule for
all: each prompt is once in a part, by its first row, and no prompt of the test is trained on. What that leaves out is
counted. Files for development (`dev.json`, `eval.json`) are never read: those of O-LoRA and SAPT are the test files.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

from cl_graft.data.readers import DataError, sample
from cl_graft.task import Example

TRAINED = (
    5000  # examples of a task with a test file alone that are trained on, at most two thirds of it
)
HELD = 5  # one in so many of a task with a training file alone is its test


class Parts(NamedTuple):
    """Examples to train on and to test, and sentences on what is not as a reader of the files would expect."""

    train: list[Example]
    test: list[Example]
    notes: tuple[str, ...] = ()


def parts(
    name: str, train: Sequence[Example], test: Sequence[Example], notes: Sequence[str] = ()
) -> Parts:
    """The examples without repeated prompts, and without training examples whose prompt is in the test.

    Raises DataError where that leaves nothing to train on.
    """
    tested, of_test = _once(test, "test")
    trained, of_train = _once(train, "training")
    asked = {example.prompt for example in tested}
    left = [example for example in trained if example.prompt not in asked]
    if trained and not left:
        raise DataError(
            f"every training prompt of {name} is in its test; give it other training data."
        )
    told = [*notes, *of_test, *of_train]
    if leaked := len(trained) - len(left):
        told.append(f"{leaked:,} training prompts are in the test and left out of the training")
    return Parts(left, tested, tuple(told))


def split(
    name: str, rows: Sequence[Example], groups: Sequence[Hashable], of_test: bool
) -> tuple[list[Example], list[Example], str]:
    """Training and test examples, by a seed that is the task's name, of one that has one file; and a note on it.

    groups: of each example, what it shares with others that have to stand on the same side, such as a paragraph.
    of_test: whether the one file is the test's.
    """
    together: dict[Hashable, list[Example]] = {}
    for example, group in zip(rows, groups, strict=True):
        together.setdefault(group, []).append(example)
    shuffled = sample(list(together.values()), len(together), f"{name} split")
    trained = min(TRAINED, 2 * len(rows) // 3) if of_test else len(rows) - len(rows) // HELD
    train: list[Example] = []
    test: list[Example] = []
    for members in shuffled:
        (train if len(train) < trained else test).extend(members)
    missing = "train.json" if of_test else "test.json"
    return train, test, f"no {missing}: {len(test):,} of {len(rows):,} rows are the test"


def _once(examples: Sequence[Example], part: str) -> tuple[list[Example], list[str]]:
    kept: dict[str, Example] = {}
    conflicting = 0
    for example in examples:
        first = kept.setdefault(example.prompt, example)
        conflicting += first.completion != example.completion
    if not (repeated := len(examples) - len(kept)):
        return list(kept.values()), []
    other = f", {conflicting:,} of them with another answer," if conflicting else ""
    return list(kept.values()), [
        f"{repeated:,} {part} rows repeat a prompt{other} and are left out"
    ]
