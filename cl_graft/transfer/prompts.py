"""The prompts of a build, and the rule that judges what is said to them.

A row is {"prompt": ...} and what the rule needs: `completion` (the reference answer) for `number` and `exact`,
`tests` (assert statements) and perhaps `setup` for `tests`. A row without it is left to the reward model.
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
from cl_graft.data.readers import DataError, json_lines
from cl_graft.errors import UnknownName
from cl_graft.evaluation.scorers import final_number
from cl_graft.task import Example, Scenario, Task
from cl_graft.transfer.config import BuildConfig

RULES = {"number": "completion", "exact": "completion", "tests": "tests"}  # and what each needs
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
MAX_NEW_TOKENS = 512

Row = tuple[str, dict[str, Any]]  # where it stands, for messages, and what it holds


@dataclass(frozen=True)
class Prompts:
    """Different prompts in the order given, and how answers to them are judged.

    rule: a key of RULES, or None where the reward model ranks everything. duplicates: rows left out because
    their prompt was there already.
    """

    examples: tuple[Example, ...]
    duplicates: int
    rule: str | None
    max_new_tokens: int
    chat: bool


def read_prompts(config: BuildConfig) -> Prompts:
    """Prompts and rule that the config names.

    Raises DataError for rows that lack what the rule needs, UnknownName for a scenario, task or rule that is
    not there, CLGraftError where nothing says how to judge.
    """
    _check_options(config)
    own = _scenario_task(config.prompts, config)
    found = _rows(config.prompts) if own is None else []
    rule, length, chat = _judged_by(config, own)
    if own is not None:
        rows = list(own[1].train)
        for i, example in enumerate(rows, 1):
            if rule and config.reward_model is None and not judged_by_rule(example, rule):
                _refuse_unjudged(f"{config.prompts}, example {i}", rule)
    else:
        rows = [_example(row, rule, config) for row in found]
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
        config.chat or chat,
    )


def judged_by_rule(example: Example, rule: str | None) -> bool:
    """Whether the example has what the rule needs."""
    return rule is not None and bool(getattr(example, RULES[rule]))


def _judged_by(
    config: BuildConfig, own: tuple[Scenario, Task] | None
) -> tuple[str | None, int, bool]:
    """Rule, longest answer in tokens, and whether prompts are a user's turn."""
    if config.task in RULES:
        return config.task, MAX_NEW_TOKENS, False
    named = _scenario_task(config.task, config) if config.task else own
    if named is None:
        if config.task:
            scenarios = plugins.names("scenario")
            raise UnknownName("task", config.task, [*RULES, *(f"{s}/TASK" for s in scenarios)])
        if config.reward_model is None:
            raise DataError(
                f"nothing says how answers to {config.prompts} are judged; give --task ({', '.join(RULES)} or "
                "SCENARIO/TASK) or a --reward-model."
            )
        return None, MAX_NEW_TOKENS, False
    scenario, task = named
    rule = {"choice": "exact"}.get(task.score, task.score)  # an answer that is sampled is no choice
    if rule not in RULES:
        raise UnknownName(f"rule for task {task.name!r}", task.score, RULES)
    return rule, task.max_new_tokens, scenario.chat


def _check_options(config: BuildConfig) -> None:
    named = {text.partition("/")[0] for text in (config.prompts, config.task) if text}
    for owner in config.options:
        if owner not in named:
            raise UnknownName("scenario in this command", owner, named)


def _scenario_task(text: str, config: BuildConfig) -> tuple[Scenario, Task] | None:
    """The scenario and its task behind `SCENARIO/TASK`; None where there is no such scenario."""
    name, slash, wanted = text.partition("/")
    if not slash or name not in plugins.names("scenario"):
        return None
    make = plugins.load("scenario", name)
    chosen = plugins.check_options("scenario", name, make, config.options.get(name, {}))
    scenario = make(seed=config.seed, data_dir=config.data_dir, **chosen)
    for task in scenario.tasks:
        if task.name == wanted:
            return scenario, task
    raise UnknownName(f"task of {name}", wanted, scenario.task_names)


def _rows(where: str) -> list[Row]:
    path = Path(where)
    if path.suffix in SUFFIXES or path.is_file():
        return _file(path)
    if where.count("/") == 1 and not where.startswith((".", "/")):
        return _hub(where)
    raise UnknownName("prompts", where, [*_scenarios(), "a .jsonl file", "owner/dataset"])


def _scenarios() -> list[str]:
    return [f"{name}/TASK" for name in plugins.names("scenario")]


def _file(path: Path) -> list[Row]:
    """Rows of a JSON, CSV or Parquet file with what says where each stands."""
    if not path.is_file():
        raise DataError(f"there is no file {path}; give the file that holds the prompts.")
    if path.suffix not in SUFFIXES:
        raise DataError(f"{path} is of no known kind; give one of {', '.join(SUFFIXES)}.")
    try:
        if path.suffix == ".parquet":
            from pyarrow import parquet

            rows = parquet.read_table(path).to_pylist()
            return [(f"{path}, row {i}", row) for i, row in enumerate(rows, 1)]
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".csv":
            reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
            return [(f"{path}, line {reader.line_num}", row) for row in reader]
        if path.suffix == ".json":
            return [(f"{path}, record {i}", row) for i, row in enumerate(json.loads(text), 1)]
    except Exception as error:  # each reader has errors of its own
        raise DataError(f"{path} cannot be read ({error}); mend or replace the file.") from error
    return [(f"{path}, {where}", row) for where, row in json_lines(path, text)]


def _hub(name: str) -> list[Row]:
    """Rows of the training split of a data set on the hub."""
    from datasets import load_dataset

    try:
        rows = list(load_dataset(name, split="train"))
    except Exception as error:  # no network, no such data set, no such split, ...
        reason = str(error).strip().split("\n", 1)[0].rstrip(".")
        tasks = [f"{scenario}/{name.partition('/')[2]}" for scenario in plugins.names("scenario")]
        near = difflib.get_close_matches(name, tasks, n=1, cutoff=0.7)
        hint = f"did you mean {near[0]}?" if near else "give a file, SCENARIO/TASK or a data set."
        raise DataError(
            f"prompts {name!r} are no scenario's, and cannot be loaded as a data set "
            f"({type(error).__name__}: {reason}); {hint}"
        ) from error
    return [(f"{name}, row {i}", row) for i, row in enumerate(rows, 1)]


def _example(row: Row, rule: str | None, config: BuildConfig) -> Example:
    """The row as an example. Raises DataError naming where it stands, what it lacks and what it has."""
    where, found = row
    if not isinstance(found, dict):
        raise DataError(f"{where} is no object with columns; write one with a column 'prompt'.")
    needed = ["prompt"]
    if rule is not None and config.reward_model is None:
        needed.append(RULES[rule])
    for column in needed:
        if column not in found:
            raise DataError(
                f"{where} has no column {column!r}; its columns are {', '.join(map(repr, found))}."
            )
    example = Example(
        prompt=_text(where, "prompt", found["prompt"]),
        completion=_text(where, "completion", _or_empty(found, "completion")),
        tests=_tests(where, found.get("tests") or []) if rule == "tests" else (),
        setup=_text(where, "setup", _or_empty(found, "setup")),
    )
    if not example.prompt.strip():
        raise DataError(f"{where} has an empty prompt; write one or remove the row.")
    if rule and config.reward_model is None and not judged_by_rule(example, rule):
        _refuse_unjudged(where, rule)
    if rule == "number" and example.completion and final_number(example.completion) is None:
        raise DataError(
            f"{where} has no number in its completion {example.completion[:40]!r}; write one there."
        )
    return example


def _or_empty(found: dict[str, Any], column: str) -> Any:
    return "" if found.get(column) is None else found[column]


def _refuse_unjudged(where: str, rule: str) -> None:
    raise DataError(
        f"{where} has nothing in {RULES[rule]!r}, which the rule {rule!r} needs; fill it, remove the row, or "
        "give a --reward-model for such rows."
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
