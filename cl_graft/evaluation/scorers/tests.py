"""1 if the program passes every hidden test in the sandbox: pass@1 (Chen et al. 2021, arXiv 2107.03374)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial

from cl_graft.evaluation import _child, sandbox
from cl_graft.evaluation.sandbox import Outcome, run_asserts, run_many
from cl_graft.evaluation.scorers.base import Scored, scorer
from cl_graft.store.digests import code_digest
from cl_graft.task import Example

Job = tuple[str, tuple[str, ...], str]  # program, tests, setup

_verdicts: dict[Job, Outcome] = {}  # the same program with the same tests is run once a process


def program_of(answer: str, setup: str = "") -> str:
    """The program in an answer: its first fenced block, closed or cut off, if it has one, else all of it.

    One that begins indented is the body of the function that `setup` ends with, and goes on from there.
    """
    fenced = re.search(r"```\w*[ \t]*\r?\n(.*?)(?:```|\Z)", answer, re.DOTALL)
    program = fenced[1] if fenced else answer
    first = next((line for line in program.split("\n") if line.strip()), "")
    return setup + program if first[:1].isspace() else program


def _programs_at_a_time() -> int:
    """The number of programs: one a thread of the cell, and one that begins or ends while the others compute."""
    import torch

    return torch.get_num_threads() + 1


def _judge(jobs: Sequence[Job]) -> dict[Job, Outcome]:
    """The sandbox's outcome of each job.

    A time-out may be the machine's fault, or that of the programs beside it, rather than the program's own: it is
    tried again, by itself, and never remembered.
    """
    new = [job for job in dict.fromkeys(jobs) if job not in _verdicts]
    outcomes = run_many([partial(run_asserts, *job) for job in new], _programs_at_a_time())
    judged = dict(zip(new, outcomes, strict=True))
    for job, outcome in judged.items():
        if outcome.reason == "timeout":
            judged[job] = run_asserts(*job)
    _verdicts.update({job: o for job, o in judged.items() if o.reason != "timeout"})
    return {job: judged.get(job) or _verdicts[job] for job in jobs}


@scorer(
    together=True,
    consent=True,
    reads=("tests",),
    identity={"code": code_digest(sandbox, _child)},
)
def tests(examples: Sequence[Example], answers: Sequence[str]) -> list[Scored]:
    """Programs run a few at a time, and each is judged from outside."""
    jobs = [
        (program_of(a, e.setup), tuple(e.tests), e.setup)
        for e, a in zip(examples, answers, strict=True)
    ]
    outcomes = _judge(jobs)
    return [
        Scored(float(o.passed), answer, f"{o.reason} {o.detail}".strip())
        for o, answer in zip((outcomes[job] for job in jobs), answers, strict=True)
    ]
