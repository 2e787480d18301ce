"""Measuring tasks on a base model with packs: the same weights are measured once, and each example by its own packs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

from cl_graft.evaluation.engine import Engine
from cl_graft.evaluation.outcomes import Outcomes, Results
from cl_graft.evaluation.scorers import Examinee, compared, score
from cl_graft.models.spread import named_weights
from cl_graft.skillpack.format.file import SkillPack, fingerprint
from cl_graft.skillpack.live import attach, ensemble
from cl_graft.skillpack.live.grafted import Grafted
from cl_graft.store.digests import code_digest, digest
from cl_graft.store.locks import locked
from cl_graft.task import Task

Key = tuple[str, ...]


@dataclass(frozen=True)
class Group:
    """Examples that the same packs answer: their indices, and the task (0-based) they are taken for; None, the base.

    members: of an ensemble, the packs of each, which answer in a pass of their own; `packs` is empty then. of_one:
    whether the packs are those of one task, as they are where tasks are given.
    """

    packs: Sequence[SkillPack]
    examples: Sequence[int]
    taken_for: int | None = None
    members: Sequence[Sequence[SkillPack]] = ()
    of_one: bool = True

    @property
    def names(self) -> list[str]:
        """What tells apart who answers: digests."""
        if not self.members:
            return [pack.digest for pack in self.packs]
        return ["ensemble", *("+".join(pack.digest for pack in each) for each in self.members)]


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
    this run. recalled: keys of what another cell or experience measured, with the same weights. engine: what answers
    with the weights in the place of the model in this process, if anything does.
    """

    engine: Engine | None = None

    def __init__(self, grafted: Grafted, tokenizer: Any, outcomes: Outcomes, allow_code: bool):
        self.grafted, self.tokenizer = grafted, tokenizer
        self.outcomes, self.allow_code = outcomes, allow_code
        self.measured: dict[Key, Results] = {}
        self.recalled: set[Key] = set()
        self.seconds = self.waiting_seconds = 0.0
        self._weights: dict[Key, str] = {}

    def measure(
        self, task: Task, groups: Sequence[Group], experience: int, every: bool = False
    ) -> Results:
        """Outcomes of every metric, one a test example; groups are evaluated one after the other, packs merged.

        Weights stay as the last group left them. experience: tasks learned so far, for the record. every: whether each
        task's packs answer all of these examples anyway, as those of general ability.
        """
        whole = key(task, groups)
        if whole in self.measured:
            return self.measured[whole]
        if len(groups) == 1:
            return self._measured(task, groups[0], True, experience)
        parts = [self._part(task, group, every, experience) for group in groups]
        places = [index for group in groups for index in group.examples]
        order = sorted(range(len(places)), key=places.__getitem__)
        joined = {m: [o for part in parts for o in part[m]] for m in task.metrics}
        self.measured[whole] = {m: [outcomes[k] for k in order] for m, outcomes in joined.items()}
        return self.measured[whole]

    def _part(self, task: Task, group: Group, every: bool, experience: int) -> Results:
        """Outcomes of a group's examples among others.

        Where the same packs answer the whole task anyway, in this cell or where tasks are given, those answers are
        taken: the base's, which is measured first, and those of the packs that most examples are taken for. That is
        told by the group alone, and not by what happens to be known, so that outcomes are the same whoever came first.
        """
        all_of = range(len(task.test))
        most = 2 * len(group.examples) >= len(all_of)
        if group.of_one and (every or most or not group.packs):
            answered = self._measured(task, replace(group, examples=all_of), True, experience)
            return {m: [outcomes[i] for i in group.examples] for m, outcomes in answered.items()}
        return self._measured(task, group, False, experience)

    def _measured(self, task: Task, group: Group, alone: bool, experience: int) -> Results:
        """Outcomes of a group's examples."""
        some, name = task, key(task, [group])
        if not alone:
            some = replace(task, test=tuple(task.test[i] for i in group.examples))
            name = (*name, digest(list(group.examples)))
        if name not in self.measured:
            base = self._of_base(task, group, experience)
            self.grafted.activate(group.packs)
            weights, begun = self.fingerprint(group), perf_counter()
            engine = self.engine.told if self.engine else None
            beside = self.grafted.base if base is not None else ""
            file = self.outcomes.file(weights, self.tokenizer, some, engine, beside)
            with locked(file):
                self.waiting_seconds += perf_counter() - begun
                known = self.outcomes.recall(file, experience)
                if known is None:
                    with self.together(group):
                        known = self._score(some, base), False
                    self.outcomes.keep(file, some, known[0], weights, experience, engine)
            self.measured[name], elsewhere = known
            if elsewhere:
                self.recalled.add(name)
        return self.measured[name]

    def fingerprint(self, group: Group) -> str:
        """Digest of the weights that answer, computed once, for which they are put on; of an ensemble, of its packs and
        the code of it."""
        if group.members:
            return digest(self.grafted.base, code_digest(ensemble, attach), group.names)
        name = tuple(group.names)
        if name not in self._weights:
            self.grafted.activate(group.packs)
            self._weights[name] = fingerprint(named_weights(self.grafted.model))
        return self._weights[name]

    def together(self, group: Group) -> AbstractContextManager[Any]:
        """The model as the group's ensemble, if it is one."""
        model = self.grafted.model
        return ensemble.Ensemble(model, group.members) if group.members else nullcontext()

    def _of_base(self, task: Task, group: Group, experience: int) -> list[str] | None:
        """The base's answers to the group's examples, where a scorer compares with them; None for the base's own."""
        label = compared(task)
        if label is None or not group.names:
            return None
        outcomes = self.measure(task, [Group([], range(len(task.test)))], experience)[label]
        return [outcomes[i].answer for i in group.examples]

    def _score(self, task: Task, base: list[str] | None) -> Results:
        begun = perf_counter()
        model: Any = self.grafted.model
        length, most = task.training.max_length, task.max_new_tokens
        serving = self.engine.serving(model, self.tokenizer) if self.engine else nullcontext()
        with serving as served:
            examinee = Examinee(
                model,
                self.tokenizer,
                most,
                length,
                self.allow_code,
                served=served,
                base_answers=base,
                folder=self.outcomes.folder,
            )
            outcomes = score(examinee, task.test, task.scorings)
        self.seconds += perf_counter() - begun
        return outcomes


def key(task: Task, groups: Sequence[Group]) -> Key:
    """What tells measurements of a run apart: the task, and the packs; where several answer, which example is whose."""
    if len(groups) == 1:
        return task.name, *groups[0].names
    told = [[group.names, list(group.examples)] for group in groups]
    return task.name, "mixed", digest(told)
