"""Measuring tasks on a base model with packs: the same weights are measured once, and each example by its own packs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

from cl_graft.evaluation.outcomes import Outcomes, Results
from cl_graft.evaluation.scorers import Examinee, score
from cl_graft.skillpack.format.file import SkillPack, fingerprint
from cl_graft.skillpack.live.grafted import Grafted
from cl_graft.store.digests import digest
from cl_graft.store.locks import locked
from cl_graft.task import Task

Key = tuple[str, ...]


@dataclass(frozen=True)
class Group:
    """Examples that the same packs answer: their indices, and the task (0-based) they are taken for; None, the base."""

    packs: Sequence[SkillPack]
    examples: Sequence[int]
    taken_for: int | None = None


@dataclass(frozen=True)
class Answered:
    """Who answered a task's examples the last time it was measured.

    key: what tells this measurement from others of the task. tasks: their names by number; empty where all tasks are
    answered by the same packs.
    """

    key: Key
    groups: Sequence[Group]
    tasks: Sequence[str]

    @property
    def names(self) -> list[str | None]:
        """The task that each example was taken for, in their order."""
        name_of = {i: g.taken_for for g in self.groups for i in g.examples} if self.tasks else {}
        return [None if (k := name_of[i]) is None else self.tasks[k] for i in sorted(name_of)]

    @property
    def counts(self) -> dict[str, int]:
        """{task: examples taken for it}; the base's have the empty name."""
        return dict(Counter(name or "" for name in self.names))


class Examiner:
    """The one place where a model is scored.

    seconds: spent on scoring. waiting_seconds: spent on waiting for another cell to score. measured: {key: outcomes} of
    this run. recalled: keys of what another cell or experience measured, with the same weights.
    """

    def __init__(self, grafted: Grafted, tokenizer: Any, outcomes: Outcomes, allow_code: bool):
        self.grafted, self.tokenizer = grafted, tokenizer
        self.outcomes, self.allow_code = outcomes, allow_code
        self.measured: dict[Key, Results] = {}
        self.recalled: set[Key] = set()
        self.seconds = self.waiting_seconds = 0.0
        self._weights: dict[Key, str] = {}

    def measure(self, task: Task, groups: Sequence[Group], experience: int) -> Results:
        """Outcomes of every metric, one a test example; groups are evaluated one after the other, packs merged.

        Weights stay as the last group left them. experience: tasks learned so far, for the record.
        """
        whole = key(task, groups)
        if whole in self.measured:
            return self.measured[whole]
        parts = [self._measured(task, group, len(groups) == 1, experience) for group in groups]
        if len(groups) > 1:
            places = [index for group in groups for index in group.examples]
            order = sorted(range(len(places)), key=places.__getitem__)
            joined = {m: [o for part in parts for o in part[m]] for m in task.metrics}
            self.measured[whole] = {
                m: [outcomes[k] for k in order] for m, outcomes in joined.items()
            }
        return self.measured[whole]

    def _measured(self, task: Task, group: Group, alone: bool, experience: int) -> Results:
        """Outcomes of a group's examples."""
        some, name = task, key(task, [group])
        if not alone:
            some = replace(task, test=tuple(task.test[i] for i in group.examples))
            name = (*name, digest(list(group.examples)))
        if name not in self.measured:
            self.grafted.activate(group.packs)
            weights, begun = self.fingerprint(group.packs), perf_counter()
            file = self.outcomes.file(weights, self.tokenizer, some)
            with locked(file):
                self.waiting_seconds += perf_counter() - begun
                known = self.outcomes.recall(file, experience)
                if known is None:
                    known = self._score(some), False
                    self.outcomes.keep(file, some, known[0], weights, experience)
            self.measured[name], elsewhere = known
            if elsewhere:
                self.recalled.add(name)
        return self.measured[name]

    def fingerprint(self, packs: Sequence[SkillPack]) -> str:
        """Digest of the weights under these packs, computed once, for which they are put on."""
        name = tuple(pack.digest for pack in packs)
        if name not in self._weights:
            self.grafted.activate(packs)
            self._weights[name] = fingerprint(self.grafted.model.named_parameters())
        return self._weights[name]

    def _score(self, task: Task) -> Results:
        begun = perf_counter()
        model: Any = self.grafted.model
        length, most = task.training.max_length, task.max_new_tokens
        examinee = Examinee(model, self.tokenizer, most, length, self.allow_code)
        outcomes = score(examinee, task.test, task.scorings)
        self.seconds += perf_counter() - begun
        return outcomes


def key(task: Task, groups: Sequence[Group]) -> Key:
    """What tells measurements of a run apart: the task, and the packs; where several answer, which example is whose."""
    if len(groups) == 1:
        return task.name, *(pack.digest for pack in groups[0].packs)
    told = [[[pack.digest for pack in group.packs], list(group.examples)] for group in groups]
    return task.name, "mixed", digest(told)
