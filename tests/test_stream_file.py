"""A scenario from a YAML file: what it makes of rows, what it refuses, and that a cell is known by the file and its data."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from textwrap import indent
from typing import Any

import pytest
import yaml

from cl_graft import plugins
from cl_graft.config import RunConfig
from cl_graft.data import DataError
from cl_graft.data.columns import Misread
from cl_graft.data.templates import BadTemplate, Template
from cl_graft.errors import CLGraftError, UnknownName
from cl_graft.experiment.cell import finished, run
from cl_graft.experiment.prepare import scenario_of
from cl_graft.store.digests import data_fingerprint
from cl_graft.store.files import RecordError
from cl_graft.task import Example, Pair, Preference, Scenario, Scoring, Task, Training
from tests.command import Call, assert_refused
from tests.refusals import one_sentence

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write `stream.yaml` of these keys, beside files of rows."""

    def written(said: dict[str, Any] | str, **rows: list[Any]) -> Path:
        for name, those in rows.items():
            lines = "".join(json.dumps(row) + "\n" for row in those)
            (tmp_path / f"{name}.jsonl").write_text(lines)
        path = tmp_path / "stream.yaml"
        path.write_text(said if isinstance(said, str) else yaml.safe_dump(said))
        return path

    return written


def made(path: Path, seed: int = 0, data_dir: Path | None = None, **options: Any) -> Scenario:
    return plugins.load("scenario", str(path))(seed=seed, data_dir=data_dir, **options)


def task_of(path: Path, seed: int = 0, **options: Any) -> Task:
    (task,) = made(path, seed, **options).tasks
    return task


SUMS = {"name": "sums", "train": "train.jsonl", "test": "test.jsonl", "score": "exact"}
SUMS |= {"prompt": "{a} + {b} =", "completion": " {sum}"}
TRAIN = [{"a": a, "b": 1, "sum": a + 1} for a in range(9)]
TEST = [{"a": a, "b": 2, "sum": a + 2} for a in range(3)]


# --- templates ---


@pytest.mark.parametrize(
    ("text", "row", "told"),
    [
        ("{q}\nAnswer:", {"q": "Why?"}, "Why?\nAnswer:"),
        ("{ q }", {"q": "Why?"}, "Why?"),
        ("{n} of {x}", {"n": 3, "x": 0.5}, "3 of 0.5"),
        ("a brace: {{", {}, "a brace: {"),
        ("\\boxed{{{n}}}", {"n": 3}, "\\boxed{3}"),
        ("{a.b.1}", {"a": {"b": ["no", "yes"]}}, "yes"),
        ("{a.b}", {"a.b": "whole", "a": {"b": "inner"}}, "whole"),
        ("{two words}", {"two words": "x"}, "x"),
        ("none", {}, "none"),
    ],
)
def test_a_template_puts_columns_into_its_braces(text: str, row: dict, told: str) -> None:
    assert Template(text).text(row) == told


@pytest.mark.parametrize("text", ["{", "}", "{}", "{q!r}", "{n:>1000000000}", "{q:{n}}", "{ }"])
def test_a_template_has_names_of_columns_alone(text: str) -> None:
    with pytest.raises(BadTemplate):
        Template(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{q.__class__}", "has no column 'q.__class__'"),
        ("{q.upper}", "has no column 'q.upper'"),
        ("{q[0]}", "has no column 'q[0]'"),
        ("{list.9}", "has no column 'list.9'"),
        ("{nothing}", "has nothing in column 'nothing'"),
        ("{list}", "has list in column 'list'"),
        ("{yes}", "has bool in column 'yes'"),
        ("{{q}}", "write {q}"),
        ("{{ q }}", "write {q}"),
    ],
)
def test_a_template_reaches_no_attribute(text: str, words: str) -> None:
    """What a str is made of is no column, and doubled braces around a column are Jinja's."""
    with pytest.raises(Misread, match=words.replace("[", r"\[").replace("{", r"\{")):
        Template(text).text({"q": "x", "nothing": None, "list": ["x"], "yes": True})


# --- what is made ---


def test_examples_are_what_the_templates_say(write: Write) -> None:
    task = task_of(write({"tasks": [SUMS]}, train=TRAIN, test=TEST))
    assert set(task.train) == {Example(f"{a} + 1 =", f" {a + 1}") for a in range(9)}
    assert set(task.test) == {Example(f"{a} + 2 =", f" {a + 2}") for a in range(3)}
    assert (task.name, task.score, task.training) == ("sums", Scoring("exact"), Training())


def test_it_is_the_scenario_that_python_would_have_made(write: Write) -> None:
    """The same rows in the same order by the same recipe have the same fingerprint, and so share stages."""
    recipe = {"steps": 7, "batch": 4, "learning_rate": "1e-3", "preference": {"beta": 0.5}}
    keys = {**SUMS, "score": {"number": {"tolerance": 0.5}}, "also": ["exact"], "training": recipe}
    yaml_made = made(write({"tasks": [keys]}, train=TRAIN, test=TEST), seed=3)
    (task,) = yaml_made.tasks
    training = Training(steps=7, batch=4, learning_rate=1e-3, preference=Preference(beta=0.5))
    score = Scoring("number", {"tolerance": 0.5})
    own = Task("sums", task.train, task.test, score, ("exact",), training=training)
    assert data_fingerprint(yaml_made) == data_fingerprint(Scenario("any", (own,)))


def test_choices_are_templates_or_a_column_of_them(write: Write) -> None:
    row = {"q": "2 is", "options": ["odd", "even"], "right": 1, "word": "even"}
    common = {"name": "t", "train": "train.jsonl", "test": "test.jsonl", "score": "choice"}
    common["prompt"] = "{q}"
    expected = Example("2 is", " even", choices=(" odd", " even"))
    for keys in (
        {"choices": " {options}", "label": "right"},
        {"choices": [" {options.0}", " {options.1}"], "completion": " {word}"},
        {"choices": [" odd", " even"], "completion": " {options.1}"},
    ):
        path = write({"tasks": [common | keys]}, train=[row | {"q": "3 is"}], test=[row])
        assert task_of(path).test == [expected]


def test_programs_and_suites(write: Write) -> None:
    row = {"text": "Add.", "test_list": ["assert f(1) == 2", "assert f(2) == 3"], "of": "mbpp"}
    keys = {"name": "t", "prompt": "{text}", "tests": "{test_list}", "setup": "x = 1"}
    keys |= {"suite": "{of}", "score": "tests", "train": "train.jsonl", "test": "test.jsonl"}
    (example,) = task_of(write({"tasks": [keys]}, train=[row | {"text": "b"}], test=[row])).test
    assert example == Example("Add.", "", tuple(row["test_list"]), setup="x = 1", suite="mbpp")


def test_columns_of_trl_need_no_template(write: Write) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    keys = {"name": "t", "train": "train.jsonl", "test": "test.jsonl", "score": "exact"}
    path = write(
        {"tasks": [keys]},
        train=[{"prompt": "1", "completion": "2"}],
        test=[{"completion": turns}],
    )
    assert task_of(path).train == [Example("1", "2")] and task_of(path).test == [
        Example("Hi", "Hello")
    ]


def test_without_test_rows_a_share_of_the_prompts_is_set_aside(write: Write) -> None:
    """No prompt is in both; the split depends on no seed and no size, what is drawn to train on does on the seed."""
    keys = {**SUMS, "test": None, "test_share": 0.25}
    rows = [{"a": a % 40, "b": 1, "sum": a} for a in range(80)]  # each prompt twice
    path = write({"tasks": [keys]}, train=rows)
    task = task_of(path)
    tested = {e.prompt for e in task.test}
    assert len(task.test) == len(tested) == 10
    learned = [*task.train, *task.validation]
    assert len(learned) == 60 and not tested & {e.prompt for e in learned}
    other = task_of(path, seed=1)
    assert list(other.test) == list(task.test)
    assert (list(other.train), other.validation) == (list(task.train), task.validation)
    few, others = (task_of(path, seed, train_size=5, test_size=3) for seed in (0, 1))
    assert len(few.test) == 3 and set(few.test) < set(task.test) and few.test == others.test
    assert len(few.train) == 5 and set(few.train) <= set(learned) and few.train != others.train


def test_no_test_prompt_is_trained_on_and_none_is_asked_twice(write: Write) -> None:
    path = write({"tasks": [SUMS]}, train=[*TRAIN, *TEST], test=[*TEST, TEST[0]])
    task = task_of(path)
    assert len(task.test) == 3 and {e.prompt for e in task.train} == {
        f"{a} + 1 =" for a in range(9)
    }


def test_rows_are_chosen_by_their_columns(write: Write) -> None:
    path = write({"tasks": [{**SUMS, "where": {"a": [1, 2]}}]}, train=TRAIN, test=TEST)
    assert {e.prompt for e in task_of(path).train} == {"1 + 1 =", "2 + 1 ="}
    path = write({"tasks": [{**SUMS, "where": {"a": "1"}}]})
    assert "no row of" in one_sentence(lambda: made(path), DataError)


def test_a_preference_half(write: Write) -> None:
    pairs = [{"a": 1, "b": 1, "good": 2, "bad": 3}, {"a": 0, "b": 2, "good": 2, "bad": 9}]
    keys = {**SUMS, "pairs": "pairs.jsonl", "chosen": " {good}", "rejected": " {bad}"}
    keys["training"] = {"epochs": 2, "preference": {"steps": 3}}
    said = {"defaults": {"training": {"batch": 4, "preference": {"beta": 0.2, "steps": 9}}}}
    task = task_of(write({**said, "tasks": [keys]}, train=TRAIN, test=TEST, pairs=pairs))
    assert list(task.pairs) == [Pair("1 + 1 =", " 2", " 3")]  # the other asks a test's question
    half = Preference(beta=0.2, steps=3)
    assert task.training == Training(batch=4, epochs=2, preference=half)


def test_several_tasks_a_general_one_and_options_over_the_file(write: Write) -> None:
    said = {
        "description": "Sums twice.\nMore of it.",
        "chat": True,
        "defaults": {**SUMS, "max_new_tokens": 4, "training": {"epochs": 2, "batch": 3}},
        "tasks": [{"name": "one"}, {"name": "two", "completion": " -{sum}", "train_size": 4}],
        "general": {k: v for k, v in SUMS.items() if k not in ("name", "train")},
    }
    path = write(said, train=TRAIN, test=TEST)
    whole = made(path)
    assert (whole.name, whole.task_names, whole.chat) == ("stream", ("one", "two"), True)
    assert [len(task.train) for task in whole.tasks] == [9, 4]
    assert {task.max_new_tokens for task in whole.tasks} == {4}
    assert whole.general and whole.general.name == "general" and len(whole.general.test) == 3
    assert not whole.general.train
    assert plugins.about("scenario", str(path)) == "Sums twice."
    options = plugins.options(plugins.load("scenario", str(path)))
    assert (options["batch"], options["epochs"], options["train_size"]) == (3, 2, None)
    changed = made(path, tasks="two,one", train_size=2, steps=5)
    assert changed.task_names == ("two", "one")
    assert [len(task.train) for task in changed.tasks] == [2, 2]
    assert changed.tasks[0].training == Training(steps=5, batch=3)  # not by epochs any more


def test_a_data_set_s_folder_by_its_splits_and_from_the_data_folder(
    write: Write, tmp_path: Path
) -> None:
    (tmp_path / "data" / "set").mkdir(parents=True)
    for split, rows in (("train", TRAIN), ("test", TEST)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "data" / "set" / f"{split}.jsonl").write_text(lines)
    keys = {**SUMS, "train": None, "test": None, "dataset_path": "set", "test_split": "test"}
    far = write({"tasks": [{**keys, "dataset_path": "./set"}]})
    assert "give the folder that holds it with --data-dir" in one_sentence(
        lambda: made(far), DataError
    )
    (task,) = made(far, data_dir=tmp_path / "data").tasks
    assert {e.prompt for e in task.test} == {f"{a} + 2 =" for a in range(3)}


# --- what is refused ---


ALIASES = "\n".join(f"{b}: &{b} [{', '.join(9 * ['*' + a])}]" for a, b in pairwise("abcdefghij"))
BOMB = f"defaults:\n  where:\n    a: &a [x]\n{indent(ALIASES, '    ')}\n  train_size: *j\ntasks: [{{name: t}}]"


def changed(**keys: Any) -> dict[str, Any]:
    return {"tasks": [{k: v for k, v in {**SUMS, **keys}.items() if v is not None}]}


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("tasks: [", "stream.yaml, line 1 is not YAML"),
        ("- a", "says no stream"),
        ({}, "stream.yaml has no tasks"),
        ({"tasks": []}, "give at least one"),
        ({"task": []}, "key of lm-evaluation-harness; write name"),
        ({"tasks": [{}]}, "tasks[0] has the name None; write one of letters"),
        (changed(name="../../up"), "tasks[0] has the name '../../up'"),
        (changed(name="general:x"), "tasks[0] has the name"),
        ("tasks: 2024-99-99", "is not YAML"),
        ("[" * 5000, "is not YAML"),
        (BOMB, "train_size is "),
        ({"tasks": [SUMS, SUMS]}, "each a name of its own"),
        (changed(promt="x"), "(stream.yaml: task 'sums') named 'promt'; did you mean prompt"),
        (changed(doc_to_text="{{a}}"), "write prompt here, whose columns stand in single braces"),
        (changed(train_size=0), "task 'sums': train_size is 0; write greater than or equal to 1"),
        (changed(test_share=2), "test_share is 2"),
        (changed(prompt="{a"), "the template of prompt, '{a', has braces that do not match"),
        (changed(choices=[True, False]), "choices has True, which YAML does not read as text"),
        (changed(choices="yes"), "name one column that holds a list"),
        (changed(score=None), "names no score"),
        (changed(score={"number": 3}), "the scorer {'number': 3} is neither"),
        (changed(score="./mine.py"), "is a file of Python, which a stream's file may not name"),
        (changed(also=["../x.py"]), "is a file of Python"),
        (changed(train=None), "names no rows to train on"),
        (changed(dataset_path="x"), "names both train and dataset_path"),
        (changed(test_split="test"), "test_split is of a data set"),
        (changed(prompt=None), "has no prompt"),
        (changed(completion=None), "has no completion"),
        (changed(label="a"), "label is the place"),
        (changed(chosen="{a}"), "one of chosen and rejected alone"),
        (changed(lm_eval="gsm8k"), "leave out test"),
        (changed(training={"step": 3}), "task 'sums'.training named 'step'; did you mean steps"),
        (changed(training={"steps": 0}), "training.steps=0 is not 1 or more; the nearest is 1"),
        (changed(training={"preference": 1}), "training.preference is 1"),
        (changed(training={"preference": {"beta": -1}}), "preference.beta=-1"),
    ],
)
def test_a_file_is_refused_in_one_sentence_with_file_and_key(
    write: Write, said: Any, words: str
) -> None:
    path = write(said, train=TRAIN, test=TEST)
    message = one_sentence(lambda: plugins.load("scenario", str(path)))
    assert words in message and "stream.yaml" in message


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (changed(train="none.jsonl"), "task 'sums': train is none.jsonl, which is not in"),
        (changed(prompt="{c}"), "train.jsonl has no column 'c' but a, b, sum"),
        (changed(prompt="{a.c}"), "train.jsonl, line 1 has no column 'a.c'"),
        (changed(completion="{{sum}}"), "train.jsonl, line 1 has a column 'sum' that the template"),
        (
            changed(choices=["x", "y"]),
            "train.jsonl, line 1 has the completion ' 1', which is none of its choices 'x', 'y'",
        ),
        (
            changed(choices=["x"], completion=None, label="a"),
            "train.jsonl, line 2 has 1 in column 'a'; write the place of the right choice",
        ),
        (changed(train="test.jsonl"), "every prompt to train on is a test's"),
    ],
)
def test_rows_are_refused_in_one_sentence_with_file_and_line(
    write: Write, said: Any, words: str
) -> None:
    path = write(said, train=TRAIN, test=TEST)
    assert words in one_sentence(lambda: made(path))


def test_a_scorer_beside_the_file_is_not_run(write: Write, tmp_path: Path) -> None:
    """A name is looked up among ours and packages' alone."""
    (tmp_path / "exact.py").write_text("raise SystemExit('ran')")
    path = write({"tasks": [SUMS]}, train=TRAIN, test=TEST)
    config = RunConfig(scenario=str(path), strategy="lora")
    assert scenario_of(config).tasks[0].score == "exact"
    path = write(changed(score="exat"))
    with pytest.raises(CLGraftError, match="no scorer named 'exat'; did you mean exact"):
        scenario_of(config)


def test_yaml_is_a_scenario_alone(write: Write) -> None:
    path = write({"tasks": [SUMS]})
    for kind in ("strategy", "scorer", "router"):
        message = one_sentence(lambda kind=kind: plugins.file_of(kind, str(path)))  # type: ignore[misc]
        assert "can be a scenario alone" in message
    with pytest.raises(UnknownName, match="did you mean sums"):
        made(write({"tasks": [SUMS]}, train=TRAIN, test=TEST), tasks="sum")


# --- the commands, and who a cell is ---

SMALL = {**SUMS, "max_new_tokens": 3, "training": {"steps": 2, "batch": 2}}


def test_the_commands_take_its_path(
    write: Write, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write({"description": "Sums.", "tasks": [SMALL]}, train=TRAIN, test=TEST)
    listed = call("list", "scenarios", "./stream.yaml", "--verbose").out
    assert "Sums." in listed and "--set stream.steps=2\n" in listed
    Path("sweep.yaml").write_text(
        "scenarios:\n  - ./stream.yaml: {steps: [1, 2]}\nstrategies: lora\nmodels: nano-llama\n"
    )
    done = call("validate", "sweep.yaml")
    assert (done.code, done.out.splitlines()[-1]) == (0, "sweep.yaml is valid: 2 cells.")
    given = ["--scenarios", "./stream.yaml", "--strategies", "lora", "--models", "nano-llama"]
    assert call("plan", *given, "--set", "stream.steps=3").code == 0
    assert_refused(call("plan", *given, "--set", "stream.step=3"), "did you mean steps")
    assert_refused(call("plan", *given, "--set", "stream.steps=0"), "stream.steps=0 is not")
    done = call(
        "run", "--scenario", "./stream.yaml", "--strategy", "lora", "--model", "nano-llama",
        "--wandb", "off", "--out", "out", "--set", "stream.train_size=4",
    )  # fmt: skip
    assert done.code == 0 and "stream(train_size=4)" in done.out


def test_a_cell_is_known_by_the_file_and_its_data(write: Write, tmp_path: Path) -> None:
    """Edited, either is refused; put back, the cell is what it was."""
    path = write({"tasks": [SMALL]}, train=TRAIN, test=TEST)
    config = RunConfig(
        scenario=str(path), strategy="lora", model="nano-llama", out=tmp_path / "out", wandb="off"
    )
    result = run(config)
    sources = json.loads((tmp_path / "out" / config.cell / "cell.json").read_text())["sources"]
    assert set(sources["scenario"]) == {"stream.yaml", "train.jsonl", "test.jsonl"}
    assert finished(config) == result
    for file in (path, tmp_path / "train.jsonl"):
        before = file.read_text()
        file.write_text(before + "\n")
        with pytest.raises(RecordError, match=f"another {file.name} than there is now"):
            finished(config)
        file.write_text(before)
    assert finished(config) == result
