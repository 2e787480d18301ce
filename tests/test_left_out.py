"""What a run leaves out, or refuses, of a scenario's data before anything is trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.command import Call

SCENARIO = """
from cl_graft.task import Example, Pair, Preference, Scenario, Task, Training

def letters(*, seed: int, data_dir=None, answer: str = "ok", rejected: str = "zz"):
    train = [Example(f"Q: {c}\\nA: ", {"ok": c, "int": 5}[answer]) for c in "abcdefgh"]
    pairs = [Pair(e.prompt, "yes", rejected if i else "yes") for i, e in enumerate(train)]
    half = Preference(steps=2, batch=4)
    recipe = Training(steps=2, batch=4, max_length=32, preference=half)
    task = Task("one", train, [Example("Q: a\\nA: ", "a")], "exact", max_new_tokens=2, training=recipe, pairs=pairs)
    return Scenario("letters", (task,))
"""


@pytest.fixture
def given(tmp_path: Path) -> list[str]:
    (tmp_path / "letters.py").write_text(SCENARIO)
    words = ["--strategies", "sequential", "--models", "nano-llama", "--wandb", "off"]
    return ["--scenarios", str(tmp_path / "letters.py"), *words, "--out", str(tmp_path / "out")]


def test_equal_pairs_are_counted_and_told(given: list[str], tmp_path: Path, call: Call) -> None:
    told = "task 'one': 1 of 8 preference pairs are left out, whose answers are the same within max_length=32 tokens"
    one = [
        word.replace("scenarios", "scenario").replace("strategies", "strategy") for word in given
    ]
    one[one.index("--models")] = "--model"
    done = call("run", *one)
    assert done.code == 0 and f"{told}." in done.out and told in done.err
    (result,) = (tmp_path / "out").glob("*/result.json")
    assert json.loads(result.read_text())["notes"] == [told]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            "answer=int",
            "training example 1 of task 'one' has int in 'completion'; write text there",
        ),
        ("rejected=yes", "each of the 8 preference pairs of task 'one' has the same text"),
    ],
)
def test_what_cannot_be_trained_on_is_refused_by_validate(
    given: list[str], tmp_path: Path, call: Call, change: str, told: str
) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text("budgets: 10%\n")
    done = call("validate", *given, "--set", f"letters.{change}", str(file))
    assert told in done.reason
