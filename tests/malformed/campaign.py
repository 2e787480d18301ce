"""Many cases, each told by the seed and its number, tried in processes that may die of one."""

from __future__ import annotations

import multiprocessing
import random
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch

from tests.malformed import judge
from tests.malformed.damage import DAMAGED
from tests.malformed.packs import Donor, pool, scratch
from tests.malformed.resealed import RESEALED

KINDS = {**DAMAGED, **RESEALED}
DONORS = 420  # valid packs that are damaged
SECONDS = 3.0  # of the processor, that no small file takes
HANGS = 20.0  # of the processor, after which nothing more is waited for


class Case(NamedTuple):
    """A malformed file, and the valid one that it was made of."""

    kind: str
    donor: Donor
    blob: bytes


class Outcome(NamedTuple):
    """How a case was answered. failure: what was wrong with that, or empty. tensors: as of `judge.judge`."""

    number: int
    kind: str
    answer: str
    failure: str
    seconds: float
    tensors: Counter[tuple[str, str]]


def case(number: int, seed: object, donors: Sequence[Donor]) -> Case:
    """The file of this number: kinds of damage take turns."""
    kind, rng = list(KINDS)[number % len(KINDS)], random.Random(f"{seed} case {number}")
    donor = rng.choice(donors)
    return Case(kind, donor, KINDS[kind](donor, donors, rng))


def attempt(number: int, seed: object, donors: Sequence[Donor], path: Path) -> Outcome:
    """Make a case and look how it is answered; nothing that it raises passes."""
    kind, donor, blob = case(number, seed, donors)
    # what was put together of two packs may be one of them
    donor = next((whole for whole in donors if whole.blob == blob), donor)
    path.unlink(missing_ok=True)  # a new file is quicker than a truncated one
    path.write_bytes(blob)
    tensors, answer, failure = Counter[tuple[str, str]](), "", ""
    begun = time.process_time()
    try:
        answer = judge.judge(path, blob, donor, kind in RESEALED, tensors)
    except BaseException as error:  # a library in Rust panics with one that is no Exception
        if isinstance(error, KeyboardInterrupt):
            raise
        where = traceback.extract_tb(error.__traceback__)[-1]
        failure = f"{type(error).__name__}: {str(error)[:300]} ({Path(where.filename).name}:{where.lineno})"
    seconds = time.process_time() - begun
    if not failure and seconds > SECONDS:
        failure = f"{seconds:.1f} s"
    return Outcome(number, kind, answer, failure, seconds, tensors)


@dataclass
class Found:
    """What came of the cases of a campaign."""

    count: int = 0
    answers: Counter[tuple[str, str]] = field(default_factory=Counter)  # by kind and answer
    tensors: Counter[tuple[str, str]] = field(default_factory=Counter)  # by codec and answer
    failures: list[tuple[int, str, str]] = field(default_factory=list)  # number, kind, what
    slowest: float = 0.0
    processor: float = 0.0  # seconds of all judgements

    def add(self, outcome: Outcome) -> None:
        self.count += 1
        if outcome.failure:
            self.failures.append((outcome.number, outcome.kind, outcome.failure))
        else:
            self.answers[outcome.kind, outcome.answer] += 1
            self.tensors += outcome.tensors
        self.slowest = max(self.slowest, outcome.seconds)
        self.processor += outcome.seconds


def inside(numbers: Sequence[int], seed: object, donors: Sequence[Donor]) -> Found:
    """Try cases in this process."""
    found = Found()
    with scratch() as folder:
        for number in numbers:
            found.add(attempt(number, seed, donors, Path(folder) / "x"))
    return found


def campaign(
    packs: int, seed: object, jobs: int, tell: Callable[[str], None] = lambda text: None
) -> Found:
    """Try so many cases, `jobs` at a time. A process that dies or hangs costs one case, which is a failure."""
    donors, found = pool(seed, DONORS), Found()
    workers = [_Worker(range(job, packs, jobs), seed, donors) for job in range(jobs)]
    while workers:
        wait([w.hears for w in workers], timeout=1.0)
        for worker in list(workers):
            for outcome in worker.outcomes():
                found.add(outcome)
                if outcome.failure:
                    tell(f"{outcome.number}, {outcome.kind}: {outcome.failure}")
                if found.count % 10_000 == 0:
                    tell(f"{found.count} of {packs}, {len(found.failures)} failures")
            if worker.done:
                workers.remove(worker)
    return found


class _Worker:
    """A process that tries cases one after the other, and is followed by another if it does not come back."""

    def __init__(self, numbers: Sequence[int], seed: object, donors: Sequence[Donor]):
        self.left, self.seed, self.donors = list(numbers)[::-1], seed, donors
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("fork")
        self.hears, says = context.Pipe(duplex=False)
        self.process = context.Process(
            target=_work, args=(says, self.left[::-1], self.seed, self.donors)
        )
        self.process.start()
        says.close()
        self.used = 0.0

    @property
    def done(self) -> bool:
        return not self.left

    def outcomes(self) -> list[Outcome]:
        """What has been said since, and what is to be said of a process that says no more."""
        found: list[Outcome] = []
        try:
            while self.hears.poll():
                found.append(self.hears.recv())
                self.left.pop()
                self.used = self._seconds()
        except EOFError:
            self.process.join()
            found += self._lost(f"the process ended with {self.process.exitcode}")
        if not self.done and self._seconds() - self.used > HANGS:
            self.process.kill()
            self.process.join()
            found += self._lost(f"no end after {HANGS:.0f} s")
        if self.done:
            self.process.join()
        return found

    def _seconds(self) -> float:
        try:
            times = psutil.Process(self.process.pid).cpu_times()
        except psutil.NoSuchProcess:
            return self.used
        return times.user + times.system

    def _lost(self, what: str) -> list[Outcome]:
        if not self.left:
            return []
        number = self.left.pop()
        self.hears.close()
        if self.left:
            self._start()
        kind = list(KINDS)[number % len(KINDS)]
        return [Outcome(number, kind, "", what, 0.0, Counter())]


def _work(says: Connection, numbers: Sequence[int], seed: Any, donors: Sequence[Donor]) -> None:
    torch.set_num_threads(1)
    with scratch() as folder:
        for number in numbers:
            says.send(attempt(number, seed, donors, Path(folder) / "x"))
