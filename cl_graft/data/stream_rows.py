"""A task of a stream's file, made of the rows that its keys name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from random import Random
from typing import Any, TypeVar

from cl_graft.data import columns, hub
from cl_graft.data.columns import Columns, Misread
from cl_graft.data.readers import DataError, sample
from cl_graft.data.stream_schema import TaskSaid
from cl_graft.data.templates import Template, value
from cl_graft.task import Example, Pair, Task, Training

T = TypeVar("T")
PAIR = ("chosen", "rejected")


def require_whole(said: TaskSaid) -> None:
    """Raises CLGraftError for keys of a task that do not go together."""
    keys, choices = said.keys, said.lists["choices"]
    files = [key for key in ("train", "validation", "test", "pairs") if getattr(keys, key)]
    splits = ("training_split", "validation_split", "test_split", "pairs_split")
    for key in ("dataset_name", *splits):
        if getattr(keys, key) and not keys.dataset_path:
            raise said.fails(f"{key} is of a data set; write its dataset_path, too.")
    if files and keys.dataset_path:
        raise said.fails(f"it names both {files[0]} and dataset_path; keep one of them.")
    if said.learned and not (keys.train or keys.dataset_path):
        raise said.fails(
            "it names no rows to train on; write `train: FILE` or `dataset_path: NAME`."
        )
    if keys.lm_eval:
        for key in ("test", "test_split", "score"):
            if getattr(keys, key) is not None:
                raise said.fails(f"lm_eval says what it is tested on and how; leave out {key}.")
    elif keys.score is None:
        raise said.fails("it names no score; write one, as `score: exact`.")
    elif not said.learned and not (keys.test or keys.test_split):
        raise said.fails("it names no rows to be measured on; write `test: FILE` or a test_split.")
    if (keys.chosen is None) != (keys.rejected is None):
        raise said.fails("it has one of chosen and rejected alone; write both.")
    if keys.label is not None and (keys.completion is not None or not choices):
        raise said.fails(
            "label is the place of the right one among choices; write choices, and no completion."
        )
    answers = (keys.completion, keys.label, keys.tests)
    if keys.prompt is None and any(key is not None for key in (*answers, keys.choices)):
        raise said.fails("it has no prompt; write its template, as `prompt: '{question}'`.")
    if keys.prompt is not None and all(key is None for key in answers):
        raise said.fails("it has no completion; write its template, as `completion: ' {answer}'`.")


class Rows:
    """The rows of a task.

    folder: of the stream's file. chosen: options over what the file says, {name: value or None}.
    """

    def __init__(
        self,
        said: TaskSaid,
        folder: Path,
        data_dir: Path | None,
        seed: int,
        chosen: dict[str, Any],
    ):
        self.said, self.keys, self.folder, self.data_dir = said, said.keys, folder, data_dir
        self.seed, self.chosen = seed, {k: v for k, v in chosen.items() if v is not None}

    def task(self) -> Task:
        """The task. Raises DataError or CLGraftError in one sentence."""
        keys, scorings = self.keys, self.said.scorings
        train = self._examples("train") if self.said.learned else []
        if keys.lm_eval:
            from cl_graft.data import harness

            test, scoring = harness.measured_by(keys.lm_eval, self.folder)
            scorings = [scoring, *scorings]
        elif keys.test or keys.test_split:
            test = _once(self._examples("test"))
        else:
            test = self._set_aside(train)
        tested = {example.prompt for example in test}
        train = [example for example in train if example.prompt not in tested]
        if self.said.learned and not train:
            raise self.said.fails(
                "every prompt to train on is a test's; give it other rows, or a smaller test_share."
            )
        held = keys.validation or keys.validation_split
        return Task(
            keys.name,
            self._drawn(train, "train", f"train/{self.seed}") if train else (),
            self._drawn(test, "test", "test"),
            score=scorings[0],
            also=tuple(scorings[1:]),
            max_new_tokens=keys.max_new_tokens,
            training=self._training(),
            pairs=self._pairs(tested) if self.said.learned else (),
            validation=self._drawn(_once(self._examples("validation")), "validation", "validation")
            if held
            else (),
        )

    def _training(self) -> Training:
        own = {f.name: self.chosen[f.name] for f in fields(Training) if f.name in self.chosen}
        # of steps and epochs, the option takes the place of what the file says
        if "steps" in own and "epochs" not in own:
            own["epochs"] = None
        return replace(self.said.training, **own)

    def _drawn(self, items: Sequence[T], part: str, seed: str) -> Sequence[T]:
        """Draw as many as the key or the option says by the seed; without a size, all, as they stand."""
        size = self.chosen.get(f"{part}_size", getattr(self.keys, f"{part}_size"))
        return sample(items, size, f"{seed}/{self.keys.name}") if size else items

    def _set_aside(self, train: Sequence[Example]) -> list[Example]:
        """The examples of a share of the prompts, drawn by the task's name: the same for every seed."""
        once = _once(train)
        count = max(1, round(len(once) * self.keys.test_share))
        return Random(f"split/{self.keys.name}").sample(once, count)

    def _examples(self, part: str) -> list[Example]:
        made = self.said
        bare = made.templates["prompt"] is None

        def adapt(row: Columns) -> Example | None:
            if not self._kept(row):
                return None
            return columns.example(row) if bare else self._example(row)

        return self._adapted(part, adapt, ["completion"] if bare else made.columns)

    def _example(self, row: Columns) -> Example:
        texts = {
            key: made.text(row)
            for key, made in self.said.templates.items()
            if made and key not in PAIR
        }
        choices, tests = (
            _list(self.said.lists[key], row, getattr(self.keys, key))
            for key in ("choices", "tests")
        )
        if self.keys.label is not None:
            texts["completion"] = _chosen(choices, value(row, self.keys.label), self.keys.label)
        elif choices and texts["completion"] not in choices:
            raise Misread(
                f"has the completion {texts['completion']!r}, which is none of its choices "
                f"{', '.join(map(repr, choices))[:200]}; write both alike, with their blanks."
            )
        given: dict[str, Any] = {"completion": "", **texts}
        return Example(**given, choices=choices, tests=tests)

    def _pairs(self, tested: set[str]) -> list[Pair]:
        if not (self.keys.pairs or self.keys.pairs_split):
            return []
        prompt, chosen, rejected = (self.said.templates[key] for key in ("prompt", *PAIR))

        def adapt(row: Columns) -> Pair | None:
            if not self._kept(row):
                return None
            if not (prompt and chosen and rejected):
                return columns.pair(row)
            return Pair(prompt.text(row), chosen.text(row), rejected.text(row))

        named = [name for made in (prompt, chosen, rejected) if made for name in made.columns]
        found = self._adapted("pairs", adapt, named if chosen else list(PAIR))
        kept = [pair for pair in found if pair.prompt not in tested]
        return list(self._drawn(kept, "pairs", f"pairs/{self.seed}"))

    def _kept(self, row: Columns) -> bool:
        for column, wanted in (self.keys.where or {}).items():
            if value(row, column) not in (wanted if isinstance(wanted, list) else [wanted]):
                return False
        return True

    def _adapted(
        self, part: str, adapt: Callable[[Columns], T | None], needed: Sequence[str]
    ) -> list[T]:
        """What `adapt` makes of the rows of a part, without those that it makes nothing of."""
        split = {"train": "training_split"}.get(part, f"{part}_split")
        named = self.keys.dataset_path or getattr(self.keys, part)
        place = self._place(named, part)
        found = hub.rows(
            place,
            adapt,
            [name for name in dict.fromkeys(needed) if "." not in name],
            config=self.keys.dataset_name,
            split=getattr(self.keys, split) or "train",
        )
        kept = [made for made in found if made is not None]
        if not kept:
            raise DataError(
                f"{self.said.where}: no row of {place} is as its `where` says ({self.keys.where}); write values that "
                "its columns hold."
            )
        return kept

    def _place(self, named: str, part: str) -> str:
        """The path of what is named, beside the stream's file or in the data folder; or else the data set's id."""
        folders = [folder for folder in (self.folder, self.data_dir) if folder]
        for folder in folders:
            if (path := folder / named).exists():
                return str(path)
        if self.keys.dataset_path and named.count("/") <= 1 and not named.startswith("."):
            return named
        key = "dataset_path" if self.keys.dataset_path else part
        raise DataError(
            f"{self.said.where}: {key} is {named}, which is not in {' nor in '.join(map(str, folders))}; mend the "
            "path, or give the folder that holds it with --data-dir."
        )


def _list(made: Sequence[Template], row: Columns, said: Any) -> tuple[str, ...]:
    """The texts of a list of templates, or of the one column of lists that a template names."""
    if isinstance(said, str):
        return tuple(made[0].texts(row))
    return tuple(template.text(row) for template in made)


def _chosen(choices: Sequence[str], place: Any, column: str) -> str:
    """The choice at a place, from 0. Raises Misread."""
    if isinstance(place, str) and place.isdecimal():
        place = int(place)
    if not isinstance(place, int) or not 0 <= place < len(choices):
        raise Misread(
            f"has {place!r} in column {column!r}; write the place of the right choice there, from 0 to "
            f"{len(choices) - 1}."
        )
    return choices[place]


def _once(examples: Sequence[Example]) -> list[Example]:
    """The first example of every prompt."""
    by_prompt: dict[str, Example] = {}
    for example in examples:
        by_prompt.setdefault(example.prompt, example)
    return list(by_prompt.values())
