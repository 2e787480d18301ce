"""The task streams: reproducible, split cleanly, and scored so that their own reference answers are right."""

from __future__ import annotations

import re
import sys
from functools import cache
from random import Random
from typing import Any

import pytest

from cl_graft import plugins
from cl_graft.data import DataError, records
from cl_graft.errors import CLGraftError, UnknownName
from cl_graft.evaluation.sandbox import run_asserts
from cl_graft.evaluation.scorers import Examinee, score
from cl_graft.evaluation.scorers.number import final_number
from cl_graft.models import toy_language
from cl_graft.task import Example, Scenario, Task
from tests.real import DATA, needs_data


def made(name: str, **options: Any) -> Scenario:
    make = plugins.load("scenario", name)
    given = {k: options.pop(k) for k in ("seed", "data_dir") if k in options}
    chosen = plugins.check_options("scenario", name, make, options)
    return make(**{"seed": 0, "data_dir": None, **given}, **chosen)


@cache
def mini(seed: int = 0) -> Scenario:
    return made("mini", seed=seed, train_size=400, test_size=60)


def prompts(examples: Any) -> set[str]:
    return {example.prompt for example in examples}


def as_answers(examples: Any, answers: list[str]) -> Examinee:
    return Examinee(None, None, 32, 128, given=answers)  # type: ignore[arg-type]


# --- mini ---


def test_mini_has_three_tasks_and_a_general_set_that_is_never_trained() -> None:
    scenario = mini()
    assert scenario.task_names == ("math", "code", "cipher")
    assert [task.score for task in scenario.tasks] == ["number", "tests", "exact"]
    assert scenario.general is not None
    assert not scenario.general.train and len(scenario.general.test) == 60
    for task in scenario.tasks:
        assert (len(task.train), len(task.validation), len(task.test)) == (400, 64, 60)
        assert not prompts(task.validation) & prompts([*task.train, *task.test])
        assert all(plugins.load("scorer", scoring.name) for scoring in task.scorings)
        assert not prompts(scenario.general.test) & prompts(task.train)


def test_mini_is_the_same_for_the_same_seed() -> None:
    assert made("mini", seed=0, train_size=400, test_size=60) == mini()


def test_seeds_share_the_test_sets_but_not_the_training_sets() -> None:
    for one, two in zip(mini(0).tasks, mini(1).tasks, strict=True):
        assert one.test == two.test
        assert one.train != two.train
    assert mini(0).general == mini(1).general


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_test_prompt_is_trained_on_or_asked_twice(seed: int) -> None:
    """At the sizes of the published tables and at twice their test sets; `general` is trained on by nobody."""
    scenario = made("mini", seed=seed, test_size=400)
    assert scenario.general is not None
    trained = set[str]().union(*(prompts(task.train) for task in scenario.tasks))
    for task in (*scenario.tasks, scenario.general):
        assert len(prompts(task.test)) == len(task.test) == 400, task.name
        assert not prompts(task.test) & trained, task.name
        assert len(prompts(task.validation)) == len(task.validation)
        assert not prompts(task.validation) & (trained | prompts(task.test)), task.name


@pytest.mark.parametrize("source", [toy_language.math, toy_language.code, toy_language.general])
def test_every_kind_of_question_is_in_every_part(source: toy_language.Source) -> None:
    """A kind that is tested can be learned: its other questions are in the training part."""
    rng, parts = Random(0), dict[str, set[str]]()
    for _ in range(4000):
        question = source(rng).question
        names = "|".join((*toy_language.NAMES, *toy_language.THINGS))
        kind = re.sub(rf"\d+|\b(?:{names})\b| [a-z]{{2,4}}\.", "#", question)
        parts.setdefault(toy_language.part(question), set()).add(kind)
    assert parts["training"] == parts["validation"] == parts["test"]
    assert len(parts["test"]) in (5, 6, 8)


def test_a_larger_test_set_extends_the_smaller() -> None:
    larger = made("mini", test_size=90, train_size=10)
    for one, two in zip(mini().tasks, larger.tasks, strict=True):
        assert two.test[:60] == one.test


def test_the_answers_of_math_are_worked_out() -> None:
    """Every step `a+b=c` of an answer holds, and the last result is the number after `####`."""
    for example in mini().tasks[0].test:
        steps = re.findall(r"(\d+)([-+*])(\d+)=(\d+)", example.completion)
        results = [
            {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[op]
            for a, op, b, _ in steps
        ]
        assert steps and [str(r) for r in results] == [c for *_, c in steps]
        assert example.completion.endswith(f"#### {results[-1]}")
        assert all(re.search(rf"\b{n}\b", example.prompt) for n in (steps[0][0], steps[0][2]))


def test_the_cipher_shifts_by_one() -> None:
    for example in mini().tasks[2].test:
        word = re.findall("Shift ([a-z]+) by one", example.prompt)[0]
        assert [(ord(b) - ord(a)) % 26 for a, b in zip(word, example.completion, strict=True)] == [
            1
        ] * len(word)


def test_hidden_tests_accept_the_reference_and_reject_another_items() -> None:
    """One item of each kind; the other one is asked for by a different sentence."""
    items: dict[str, Example] = {}
    for example in mini().tasks[1].test:
        items.setdefault(re.sub(r"\d+", "#", example.prompt), example)
    kinds = list(items.values())
    assert len(kinds) == 8
    for example, other in zip(kinds, kinds[1:] + kinds[:1], strict=True):
        assert len(example.tests) >= 4
        assert run_asserts(example.completion, example.tests).passed, example
        assert not run_asserts(other.completion, example.tests).passed, (example, other)


def test_every_reference_of_code_passes_in_process() -> None:
    """These programs are the scenario's own, so they may run here; hundreds in the time of one sandbox."""
    for example in mini().tasks[1].train:
        names: dict[str, Any] = {}
        exec(example.completion, names)
        for test in example.tests:
            exec(test, names)


def test_dpo_is_switched_by_an_option() -> None:
    assert all(task.training.preference is None for task in mini().tasks)
    tuned = made("mini", dpo=True, train_size=4, test_size=4)
    assert all(task.training.preference is not None for task in tuned.tasks)


def test_tasks_can_be_chosen_and_ordered() -> None:
    scenario = made("mini", tasks="cipher,math", train_size=4, test_size=4)
    assert scenario.task_names == ("cipher", "math")
    with pytest.raises(UnknownName, match="did you mean math"):
        made("mini", tasks="code,mth")
    with pytest.raises(CLGraftError, match="different names"):
        made("mini", tasks="math,math", train_size=4, test_size=4)


@pytest.mark.parametrize("sizes", [{"test_size": 0}, {"train_size": 0}, {"train_size": -1}])
def test_empty_sets_are_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(CLGraftError, match="is not 1 or more"):
        made("mini", **sizes)


def test_a_source_with_too_few_questions_for_a_test_set_is_refused() -> None:
    """A source may have few different questions; drawing must not go on for ever."""
    held_out = sys.modules[plugins.load("scenario", "mini").__module__].held_out

    def narrow(rng: Random) -> toy_language.Item:
        return toy_language.Item(f"Copy {rng.randrange(10)}.", "")

    there = [i for i in range(10) if toy_language.part(f"Copy {i}.") == "test"]
    assert 0 < len(there) < 10
    assert len(held_out(narrow, "test", "narrow", len(there))) == len(there)
    with pytest.raises(DataError, match=rf"has {len(there)} different .* lower mini.test_size"):
        held_out(narrow, "test", "narrow", len(there) + 1)


# --- real data ---


real = needs_data("mbpp", "gsm8k")
EVERYTHING = {"train_size": 10**6, "test_size": 10**6}


@cache
def real_math() -> dict[str, Task]:
    found = made("math_then_code", data_dir=DATA, math="mawps+gsm8k", **EVERYTHING)
    return {task.name: task for task in found.tasks}


@cache
def real_classification() -> dict[str, Task]:
    found = made("text_classification", data_dir=DATA, **EVERYTHING)
    return {task.name: task for task in found.tasks}


@real
def test_math_then_code_holds_the_published_splits() -> None:
    sizes = {
        name: (len(t.train) + len(t.validation), len(t.test)) for name, t in real_math().items()
    }
    assert sizes == {"mawps": (1578, 400), "gsm8k": (7473, 1319), "mbpp": (374, 500)}
    assert [t.score for t in real_math().values()] == ["number", "number", "tests"]
    lm_eval = ("number:lm-eval strict-match", "number:lm-eval flexible-extract")
    assert {name: t.metrics[1:] for name, t in real_math().items()} == {
        "mawps": ("neg_bits_per_byte",),
        "gsm8k": ("neg_bits_per_byte", *lm_eval),
        "mbpp": ("neg_bits_per_byte",),
    }


@real
def test_text_classification_holds_its_five_tasks() -> None:
    sizes = {
        name: (len(t.train) + len(t.validation), len(t.test))
        for name, t in real_classification().items()
    }
    assert sizes == {
        "agnews": (4000, 7600),
        "amazon": (5000, 7600),
        "sst2": (2000, 872),
        "dbpedia": (5000, 2600),
        "mnli": (3000, 7600 - 131),
    }
    for task in real_classification().values():
        assert len({e.choices for e in task.test}) == 1
        assert {e.completion for e in task.train} == set(task.train[0].choices)


@real
def test_no_real_test_prompt_is_trained_on() -> None:
    for task in (*real_math().values(), *real_classification().values()):
        assert not prompts(task.train) & prompts(task.test), task.name


@real
def test_real_samples_depend_on_the_seed_for_training_only() -> None:
    one, two, again = (
        made("math_then_code", data_dir=DATA, math="mawps", seed=seed, train_size=50)
        for seed in (0, 1, 0)
    )
    assert one == again
    for a, b in zip(one.tasks, two.tasks, strict=True):
        assert a.test == b.test and a.train != b.train
        assert len(a.train) + len(a.validation) == 50


@real
@pytest.mark.parametrize("name", ["mawps", "gsm8k"])
def test_references_of_real_math_are_right(name: str) -> None:
    task = real_math()[name]
    for part in (task.train, task.test):
        said = as_answers(part, [e.completion for e in part])
        scored = score(said, part, ["number"])["number"]
        assert all(outcome.score == 1 for outcome in scored)


@real
def test_references_of_mawps_say_the_number_of_the_file() -> None:
    """Also large ones and fractions, which a short format would round or write with an exponent."""
    wanted = {
        " ".join(r["input"].split()): r["target"]
        for r in reversed(records(DATA, "mawps/test.jsonl", ("input", "target")))
    }
    task = real_math()["mawps"]
    for example in (*task.train, *task.test):
        question = example.prompt.removeprefix("Question: ").removesuffix("\nAnswer:")
        assert final_number(example.completion) == pytest.approx(wanted[question], rel=1e-11)


@real
def test_references_of_gsm8k_hold_no_calculator_marks() -> None:
    task = real_math()["gsm8k"]
    assert not any("<<" in e.completion for e in (*task.train, *task.test))


@real
def test_mbpp_references_pass_their_own_tests_in_the_sandbox() -> None:
    """A sample, with the programs whose tests need a setup; one test problem of 500 (id 123) takes too long."""
    task = real_math()["mbpp"]
    everything = [e for e in (*task.train, *task.test) if "amicable" not in e.prompt]
    with_setup = [e for e in everything if len(e.tests) > 3 and "Node" in e.tests[0]]
    assert len(with_setup) == 2
    for example in (*with_setup, *Random(0).sample(everything, 28)):
        outcome = run_asserts(example.completion, example.tests, example.setup)
        assert outcome.passed, (example.prompt, outcome)


@real
def test_mbpp_prompts_name_the_function() -> None:
    """The sentence and the first test, as comments, so that an answer is a program without the prompt, too."""
    task = real_math()["mbpp"]
    for example in (*task.train, *task.test):
        assert all(line.startswith("# ") for line in example.prompt.rstrip("\n").split("\n"))
        shown = example.prompt.rstrip("\n").split("\n")[-1].removeprefix("# ")
        assert shown in example.tests and shown.startswith("assert ")
        assert "\t" not in example.completion and "\r" not in example.completion


@real
def test_an_unknown_real_task_is_answered_with_the_nearest() -> None:
    with pytest.raises(UnknownName, match="did you mean gsm8k"):
        made("math_then_code", data_dir=DATA, math="gsm8")
    with pytest.raises(UnknownName, match="did you mean agnews"):
        made("text_classification", data_dir=DATA, tasks="agnew")
