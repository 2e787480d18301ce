"""The prompts of a build, and the rule that judges what is said to them.

A row is {"prompt": ...} and what the rule, a scorer of answers, reads of an example: `completion` (the reference
answer), or `tests` (assert statements) and perhaps `setup`. A row without it is left to the reward model.
"""

from __future__ import annotations

import ast
import csv
import difflib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cl_graft import plugins
from cl_graft.data import hub
from cl_graft.data.readers import DataError, json_entries
from cl_graft.errors import CLGraftError, UnknownName, first_line
from cl_graft.evaluation.scorers import Scorer, judge_of, resolved
from cl_graft.task import Example, Scenario, Scoring, Task
from cl_graft.transfer.config import BuildConfig

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
MAX_NEW_TOKENS = 512

PlacedFields = tuple[str, dict[str, Any]]  # where it stands, for messages, and what it holds


@dataclass(frozen=True)
class Prompts:
    """Different prompts in the order given, and how answers to them are judged.

    rule: the scorer of answers, or None where the reward model ranks everything. duplicates: rows left out because
    their prompt was there already.
    """

    examples: tuple[Example, ...]
    duplicates: int
    rule: Scoring | None
    max_new_tokens: int
    chat: bool | None


def read_prompts(config: BuildConfig) -> Prompts:
    """Prompts and rule that the config names.

    Raises DataError for rows that lack what the rule needs, UnknownName for a scenario, task or rule that is
    not there, CLGraftError where nothing says how to judge.
    """
    own = _scenario_task(config.prompts, config)
    entries = _rows(config.prompts) if own is None else []
    rule, length, chat = _judged_by(config, own)
    _check_options(config, own, rule)
    if own is not None:
        rows = list(own[1].train)
        for i, example in enumerate(rows, 1):
            if rule and config.reward_model is None and not judged_by_rule(example, rule):
                _refuse_unjudged(f"{config.prompts}, example {i}", example, rule)
    else:
        rows = [_example(row, rule, config) for row in entries]
    different = {example.prompt: example for example in reversed(rows)}  # the first of equals stays
    kept = [e for e in dict.fromkeys(rows) if different.pop(e.prompt, None) is not None]
    chosen = tuple(kept[: config.limit])
    if not chosen:
        raise DataError(f"{config.prompts} holds no prompt; give a file with at least one row.")
    return Prompts(
        chosen,
        len(rows) - len(kept),
        rule,
        config.max_new_tokens or length,
        chat if config.chat is None else config.chat,
    )


def judged_by_rule(example: Example, rule: Scoring | None) -> bool:
    """Whether the example has what the rule needs."""
    return rule is not None and not _lacks(example, rule)


def _scorer(rule: Scoring) -> Scorer:
    return plugins.load("scorer", rule.name)


def _lacks(example: Example, rule: Scoring) -> list[str]:
    """The fields that the rule reads and the example leaves empty."""
    return [field for field in _scorer(rule).reads if not getattr(example, field)]


def _judged_by(
    config: BuildConfig, own: tuple[Scenario, Task] | None
) -> tuple[Scoring | None, int, bool | None]:
    """Rule, longest answer in tokens, and whether prompts are a user's turn; None: to a source that has a template."""
    if config.task and (config.task.endswith(".py") or config.task in plugins.names("scorer")):
        short = _scorer(Scoring(config.task)).name
        given = Scoring(config.task, config.options.get(short, {}))
        return _rule(given, repr(config.task)), MAX_NEW_TOKENS, None
    named = _scenario_task(config.task, config) if config.task else own
    if named is None:
        if config.task:
            scenarios = plugins.names("scenario")
            known = [*plugins.names("scorer"), *(f"{s}/TASK" for s in scenarios)]
            raise UnknownName("task", config.task, known)
        if config.reward_model is None:
            raise DataError(
                f"nothing says how answers to {config.prompts} are judged; give --task (SCENARIO/TASK, or a scorer "
                f"of answers: {', '.join(plugins.names('scorer'))}) or a --reward-model."
            )
        return None, MAX_NEW_TOKENS, None
    scenario, task = named
    return _rule(task.scorings[0], f"task {task.name!r}"), task.max_new_tokens, scenario.chat


def _rule(scoring: Scoring, what: str) -> Scoring:
    """The scorer that judges answers in its place, if it is none itself; its options are checked."""
    plugins.check_options("scorer", scoring.label, _scorer(scoring), scoring.options)
    rule = judge_of(scoring)
    if rule is None:
        raise CLGraftError(
            f"{what} is scored by {scoring.label!r}, which reads no answer; give a --task that judges answers, or a "
            "--reward-model alone."
        )
    return rule


def _check_options(
    config: BuildConfig, own: tuple[Scenario, Task] | None, rule: Scoring | None
) -> None:
    named = {text.partition("/")[0] for text in (config.prompts, config.task) if text}
    scorings = [s for task in own[0].tasks for s in task.scorings] if own else []
    named |= {_scorer(s).name for s in [*scorings, *([rule] if rule else [])]}
    for owner in config.options:
        if owner not in named:
            raise UnknownName("scenario or scorer in this command", owner, named)


def _scenario_task(text: str, config: BuildConfig) -> tuple[Scenario, Task] | None:
    """The scenario and its task behind `SCENARIO/TASK`; None where there is no such scenario."""
    name, slash, wanted = text.partition("/")
    if not slash or name not in plugins.names("scenario"):
        return None
    make = plugins.load("scenario", name)
    chosen = plugins.check_options("scenario", name, make, config.options.get(name, {}))
    made = make(seed=config.seed, data_dir=config.data_dir, **chosen)
    scenario, _ = resolved(made, name, config.options)
    for task in scenario.tasks:
        if task.name == wanted:
            return scenario, task
    raise UnknownName(f"task of {name}", wanted, scenario.task_names)


def _rows(where: str) -> list[PlacedFields]:
    path = Path(where)
    if path.suffix in SUFFIXES or path.is_file():
        return _file(path)
    if path.is_dir():
        table = hub.read(where, None, "train")
        if isinstance(table, hub.Lines):
            return list(zip(table.places, map(dict, table.rows), strict=True))
        return [(f"{where}, row {i}", row) for i, row in enumerate(table, 1)]
    if where.count("/") == 1 and not where.startswith((".", "/")):
        return _hub(where)
    raise UnknownName("prompts", where, _scenarios(), "a .jsonl file or a hub id")


def _scenarios() -> list[str]:
    return [f"{name}/TASK" for name in plugins.names("scenario")]


def _file(path: Path) -> list[PlacedFields]:
    """Rows of a JSON, CSV or Parquet file with what says where each stands."""
    if not path.is_file():
        raise DataError(f"there is no file {path}; give the file that holds the prompts.")
    if path.suffix not in SUFFIXES:
        raise DataError(f"{path} is of no known kind; give one of {', '.join(SUFFIXES)}.")
    if path.suffix in (".jsonl", ".json"):
        return [(f"{path}, {where}", row) for where, row in json_entries(path)]
    try:
        if path.suffix == ".parquet":
            from pyarrow import parquet

            rows = parquet.read_table(path).to_pylist()
            return [(f"{path}, row {i}", row) for i, row in enumerate(rows, 1)]
        text = path.read_text(encoding="utf-8-sig")
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        return [(f"{path}, line {reader.line_num}", row) for row in reader]
    except Exception as error:  # each reader has errors of its own
        raise DataError(f"{path} cannot be read ({error}); mend or replace the file.") from error


def _hub(name: str) -> list[PlacedFields]:
    """Rows of the training split of a data set on the hub."""
    from datasets import load_dataset

    try:
        rows = list(load_dataset(name, split="train"))
    except Exception as error:  # no network, no such data set, no such split, ...
        reason = first_line(error)
        tasks = [f"{scenario}/{name.partition('/')[2]}" for scenario in plugins.names("scenario")]
        near = difflib.get_close_matches(name, tasks, n=1, cutoff=0.7)
        hint = f"did you mean {near[0]}?" if near else "give a file, SCENARIO/TASK or a data set."
        raise DataError(
            f"prompts {name!r} are no scenario's, and cannot be loaded as a data set "
            f"({type(error).__name__}: {reason}); {hint}"
        ) from error
    return [(f"{name}, row {i}", row) for i, row in enumerate(rows, 1)]


def _example(row: PlacedFields, rule: Scoring | None, config: BuildConfig) -> Example:
    """The row as an example. Raises DataError naming where it stands, what it lacks and what it has."""
    where, fields = row
    if not isinstance(fields, dict):
        raise DataError(f"{where} is no object with columns; write one with a column 'prompt'.")
    needed = ["prompt"]
    if rule is not None and config.reward_model is None:
        needed += _scorer(rule).reads
    for column in needed:
        if column not in fields:
            raise DataError(
                f"{where} has no column {column!r}; its columns are {', '.join(map(repr, fields))}."
            )
    by_tests = rule is not None and "tests" in _scorer(rule).reads
    example = Example(
        prompt=_text(where, "prompt", fields["prompt"]),
        completion=_text(where, "completion", _or_empty(fields, "completion")),
        tests=_tests(where, fields.get("tests") or []) if by_tests else (),
        setup=_text(where, "setup", _or_empty(fields, "setup")),
    )
    if not example.prompt.strip():
        raise DataError(f"{where} has an empty prompt; write one or remove the row.")
    if rule and config.reward_model is None and not judged_by_rule(example, rule):
        _refuse_unjudged(where, example, rule)
    if rule and judged_by_rule(example, rule) and (flaw := _scorer(rule).flaw(example)):
        raise DataError(f"{where} has {flaw}; mend it there.")
    return example


def _or_empty(value: dict[str, Any], column: str) -> Any:
    return "" if value.get(column) is None else value[column]


def _refuse_unjudged(where: str, example: Example, rule: Scoring) -> None:
    raise DataError(
        f"{where} has nothing in {_lacks(example, rule)[0]!r}, which the rule {rule.label!r} needs; fill it, remove "
        "the row, or give a --reward-model for such rows."
    )


def _text(where: str, column: str, value: Any) -> str:
    if column == "completion" and type(value) in (int, float):  # JSON's way to write a final number
        return f"{value:.12g}"
    if not isinstance(value, str):
        raise DataError(
            f"{where} has {type(value).__name__} in column {column!r}; write text there."
        )
    return value


def _tests(where: str, value: Any) -> tuple[str, ...]:
    """The assert statements; in a CSV file they are written as a JSON list. Each is Python that parses."""
    try:
        tests = json.loads(value) if isinstance(value, str) else value
        if not isinstance(tests, list) or not all(isinstance(test, str) for test in tests):
            raise ValueError("no list of texts")
        for test in tests:
            ast.parse(test)
    except (ValueError, SyntaxError) as error:
        reason = str(error).split("\n", 1)[0]
        raise DataError(
            f"{where} has no list of Python asserts in column 'tests' ({reason}); mend it."
        ) from error
    return tuple(tests)
