"""What a file of a stream says: its keys, read from YAML and checked, before any data are looked at.

A key that means what it means to lm-evaluation-harness has its name there (`dataset_path`, `dataset_name`,
`training_split`, `validation_split`, `test_split`). Its `doc_to_text`, `doc_to_target` and `doc_to_choice` are Jinja,
and it puts a blank that nobody wrote before the second; what is trained on here is written in full, as `prompt`,
`completion` and `choices`, which is what an `Example` calls them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from reprlib import repr as shortened  # what aliases of YAML blow up is not written out
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from cl_graft.data.templates import BadTemplate, Template
from cl_graft.errors import CLGraftError, UnknownName
from cl_graft.ranges import Count, Part
from cl_graft.task import Preference, Scoring, Training
from cl_graft.yaml_files import parsed

FILES = (".yaml", ".yml")  # what a stream's file is called
LM_EVAL = {  # keys of its files, and those that say the same here
    "doc_to_text": "prompt",
    "doc_to_target": "completion",
    "doc_to_choice": "choices",
    "task": "name",
    "metric_list": "score",
    "output_type": "score",
}
NAME = re.compile(r"\w[\w.-]*")  # of a task
TEMPLATES = ("prompt", "completion", "setup", "suite", "chosen", "rejected")
LISTS = ("choices", "tests")
Said = TypeVar("Said", bound=BaseModel)


class Keys(BaseModel):
    """Keys of a part of the file. All that is not there is None."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)


class TaskKeys(Keys):
    """One task: where its rows are, what is made of a row, how many, how it is scored, how it is trained."""

    name: str = "general"
    # rows: files beside this one or in --data-dir, or a data set of the hub or a folder
    train: str | None = None
    validation: str | None = None
    test: str | None = None
    pairs: str | None = None
    dataset_path: str | None = None
    dataset_name: str | None = None
    training_split: str | None = None
    validation_split: str | None = None
    test_split: str | None = None
    pairs_split: str | None = None
    where: dict[str, Any] | None = None
    test_share: Part = 0.1
    # what is made of a row
    prompt: str | None = None
    completion: str | None = None
    choices: str | list[Any] | None = None
    label: str | None = None
    tests: str | list[Any] | None = None
    setup: str | None = None
    suite: str | None = None
    chosen: str | None = None
    rejected: str | None = None
    # how many
    train_size: Count | None = None
    validation_size: Count | None = None
    test_size: Count | None = None
    pairs_size: Count | None = None
    # how it is scored and trained
    score: str | dict[str, Any] | None = None
    also: list[Any] = []
    lm_eval: str | None = None
    max_new_tokens: Count = 48
    training: dict[str, Any] = {}


class StreamKeys(Keys):
    """The whole file. defaults: keys of a task for all of `tasks`; its `training` is joined with theirs."""

    description: str = ""
    chat: bool | None = None
    defaults: dict[str, Any] = {}
    tasks: list[dict[str, Any]]
    general: dict[str, Any] | None = None


class TaskSaid:
    """A task's keys with its templates, scorings and recipe read.

    where: its file and place, for errors. learned: whether it is trained on, as all but the general task are.
    """

    def __init__(self, keys: TaskKeys, where: str, learned: bool):
        self.keys, self.where, self.learned = keys, where, learned
        self.templates = {k: self._template(k, getattr(keys, k)) for k in TEMPLATES}
        self.lists = {k: self._list(k, getattr(keys, k)) for k in LISTS}
        self.training = training(keys.training, f"{where}.training")
        given = [keys.score] if keys.score is not None else []
        self.scorings = [scoring(said, where) for said in [*given, *keys.also]]

    @property
    def columns(self) -> list[str]:
        """The columns that an example is made of, in order."""
        told = [self.templates[k] for k in ("prompt", "completion", "setup", "suite")]
        told += [template for k in LISTS for template in self.lists[k]]
        named = [name for template in told if template for name in template.columns]
        return list(
            dict.fromkeys([*named, *(self.keys.where or {}), *filter(None, [self.keys.label])])
        )

    def fails(self, reason: str) -> CLGraftError:
        """The error that this task's keys are."""
        return CLGraftError(f"{self.where}: {reason}")

    def _template(self, key: str, text: str | None) -> Template | None:
        if text is None:
            return None
        try:
            return Template(text)
        except BadTemplate as error:
            raise self.fails(f"the template of {key}, {text!r}, {error}.") from error

    def _list(self, key: str, said: str | list[Any] | None) -> list[Template]:
        for entry in said if isinstance(said, list) else ():
            if not isinstance(entry, str):
                raise self.fails(
                    f"{key} has {shortened(entry)}, which YAML does not read as text; write it in quotes."
                )
        texts = said if isinstance(said, list) else [said] if said is not None else []
        found = [template for text in texts if (template := self._template(key, text))]
        if isinstance(said, str) and len(found[0].columns) != 1:
            raise self.fails(
                f"{key} is the text {said!r}; name one column that holds a list, or write a list of templates."
            )
        return found


def read(path: Path) -> tuple[StreamKeys, list[TaskSaid], TaskSaid | None]:
    """The file's keys, its tasks, and its general task. Raises CLGraftError in one sentence, with file and key."""
    file = path.name
    whole = checked(StreamKeys, _mapping(path), file, "stream")
    tasks = []
    for number, said in enumerate(whole.tasks):
        name = said.get("name")
        if not isinstance(name, str) or not NAME.fullmatch(name):  # packs' files are called by it
            raise CLGraftError(
                f"{file}: tasks[{number}] has the name {shortened(name)}; write one of letters, digits, '-', '_' and "
                "'.', as `name: sums`."
            )
        keys = {**whole.defaults, **said, "training": _joined(whole.defaults, said)}
        tasks.append(_task(keys, f"{file}: task {name!r}", True))
    general = whole.general
    return whole, tasks, None if general is None else _task(general, f"{file}: general", False)


def _task(said: Mapping[str, Any], where: str, learned: bool) -> TaskSaid:
    return TaskSaid(checked(TaskKeys, said, where, "task"), where, learned)


def _joined(defaults: Mapping[str, Any], said: Mapping[str, Any]) -> Any:
    """The recipe: the task's own keys over the common ones, those of its preference half as well."""
    common, own = defaults.get("training") or {}, said.get("training") or {}
    if not isinstance(common, dict) or not isinstance(own, dict):
        return own or common
    joined = common | own
    halves = [half.get("preference") for half in (common, own)]
    if all(isinstance(half, dict) for half in halves):
        joined["preference"] = {**common["preference"], **own["preference"]}
    return joined


def checked(kind: type[Said], said: Mapping[str, Any], where: str, what: str) -> Said:
    """The keys of a part of a file. Raises UnknownName or CLGraftError."""
    for key in said:
        if key not in kind.model_fields:
            if key in LM_EVAL:
                raise CLGraftError(
                    f"{where}: {key} is a key of lm-evaluation-harness; write {LM_EVAL[key]} here, whose columns "
                    "stand in single braces."
                )
            raise UnknownName(f"key of a {what} ({where})", str(key), kind.model_fields)
    try:
        return kind(**said)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        if first["type"] == "missing":
            raise CLGraftError(f"{where} has no {place}; write a list of them.") from error
        place = str(first["loc"][0])  # of a union's members, the rest tells a user nothing
        told = first["msg"].removeprefix("Input should be ")
        raise CLGraftError(
            f"{where}: {place} is {shortened(first['input'])}; write {told}."
        ) from error


def training(said: Mapping[str, Any], where: str) -> Training:
    """The recipe that keys say. Raises UnknownName, or CLGraftError for a value that is none."""
    given = dict(said)
    if isinstance(half := given.get("preference"), dict):
        given["preference"] = _record(Preference, half, f"{where}.preference")
    elif half is not None:
        raise CLGraftError(
            f"{where}.preference is {shortened(half)}; write its settings, as {{beta: 0.1}}, or {{}}."
        )
    return _record(Training, given, where)


def _record(kind: type, said: Mapping[str, Any], where: str) -> Any:
    known = [f.name for f in fields(kind)]
    for key in said:
        if key not in known:
            raise UnknownName(f"key of {where}", str(key), known)
    try:
        return kind(**{key: _number(value) for key, value in said.items()})
    except CLGraftError as error:
        raise CLGraftError(f"{where}: {error}") from error


def _number(value: Any) -> Any:
    """The number that a text is: YAML 1.1 reads 1e-3, without a point, as text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def scoring(said: Any, where: str) -> Scoring:
    """A scorer by name, or as {name: {option: value}}.

    Raises CLGraftError for what is none, and for a path: a stream's file is data, and a scorer's is code.
    """
    name: Any = said
    options: Any = {}
    if isinstance(said, dict) and len(said) == 1:
        ((name, options),) = said.items()
    if not isinstance(name, str) or not isinstance(options, dict | None):
        raise CLGraftError(
            f"{where}: the scorer {shortened(said)} is neither a name nor one name with its options; write "
            "`score: {number: {tolerance: 0.01}}`."
        )
    if name.endswith(".py"):
        raise CLGraftError(
            f"{where}: the scorer {name!r} is a file of Python, which a stream's file may not name, for it is data; "
            "write the scenario in Python, or give the scorer a name as a package's entry point."
        )
    return Scoring(name, options or {})


def _mapping(path: Path) -> dict[str, Any]:
    said = parsed(path, "give a stream's YAML file")
    if not isinstance(said, dict):
        raise CLGraftError(
            f"{path} says no stream; write its tasks, as docs/adding-a-scenario.md shows."
        )
    return said
