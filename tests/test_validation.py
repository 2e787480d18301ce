"""What is set aside of a task to choose factors on, and that nothing of it is trained on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from cl_graft.errors import CLGraftError
from cl_graft.models.chat import rendered
from cl_graft.store.digests import data_fingerprint
from cl_graft.stream import benchmark
from cl_graft.task import Example, Pair, Scenario, Task
from tests.chat import qwen_tokenizer


def examples(count: int, first: int = 0) -> tuple[Example, ...]:
    return tuple(Example(f"question {i}", f" {i}") for i in range(first, first + count))


def scenario(**given: Any) -> Scenario:
    return Scenario("made", (Task("one", test=examples(2, 9000), score="exact", **given),))


def prompts(items: Any) -> list[str]:
    return [item.prompt for item in items]


@pytest.mark.parametrize(
    ("rows", "held"), [(1, 0), (19, 0), (20, 4), (100, 5), (1280, 64), (4000, 64)]
)
def test_one_prompt_in_twenty_is_set_aside_from_4_to_64(rows: int, held: int) -> None:
    (task,) = scenario(train=examples(rows)).tasks
    assert (len(task.train), len(task.validation)) == (rows - held, held)
    assert {*task.train, *task.validation} == {*examples(rows)}
    (again,) = scenario(train=examples(rows)).tasks
    assert again == task, "by a rule without a seed, the same for every strategy"


def test_a_prompt_that_is_set_aside_is_in_no_row_and_no_pair() -> None:
    """Rows that ask the same are set aside together."""
    twice = examples(40) + tuple(Example(e.prompt, " other") for e in examples(40))
    pairs = tuple(Pair(e.prompt, e.completion, " wrong") for e in examples(40))
    (task,) = scenario(train=twice, pairs=pairs).tasks
    held = {*prompts(task.validation)}
    assert len(held) == 4 and len(task.validation) == 8
    assert not held & {*prompts(task.train), *prompts(task.pairs)}
    assert (len(task.train), len(task.pairs)) == (72, 36)


def test_validation_of_the_scenarios_own_is_kept_and_not_trained_on() -> None:
    own = examples(3, 38)
    (task,) = scenario(train=examples(40), validation=own).tasks
    assert task.validation == own and task.train == examples(38)
    assert Scenario("again", (task,)).tasks == (task,)
    with pytest.raises(CLGraftError, match="every training prompt of task 'one'"):
        scenario(train=own, validation=own)


def test_streams_templates_and_fingerprints_know_of_it() -> None:
    made = scenario(train=examples(100))
    (experience,) = benchmark(made).train_stream
    held = {*prompts(made.tasks[0].validation)}
    assert not held & {experience.dataset[i]["prompt"] for i in range(len(experience.dataset))}
    (task,) = rendered(replace(made, chat=True), qwen_tokenizer()).tasks
    assert all(prompt.startswith("<|im_start|>user") for prompt in prompts(task.validation))
    other = replace(made.tasks[0], validation=examples(5, 500))
    assert data_fingerprint(made) != data_fingerprint(replace(made, tasks=(other,)))


def test_a_method_sees_every_validation_example_once(build: Any, tiny_scenario: Any) -> None:
    method, (task, _) = build("sequential"), tiny_scenario.tasks
    batches = method.context(task).validation(30)
    assert [len(b["input_ids"]) for b in batches] == [30, 30, 4]
    answers = [row[row != -100] for b in batches for row in b["labels"]]
    read = [method.tokenizer.decode(ids, skip_special_tokens=True).split() for ids in answers]
    assert read == [e.completion.split() for e in task.validation]
