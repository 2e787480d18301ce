"""1 if the program passes every hidden test in the sandbox: pass@1 (Chen et al. 2021, arXiv 2107.03374)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from cl_graft.evaluation import _child, final_answer, programs, sandbox
from cl_graft.evaluation.programs import program_of
from cl_graft.evaluation.sandbox import Outcome, run_asserts, run_many
from cl_graft.evaluation.scorers.base import Scored, scorer
from cl_graft.store.digests import code_digest
from cl_graft.task import Example

Job = tuple[str, tuple[str, ...], str]  # program, tests, setup

_verdicts: dict[Job, Outcome] = {}  # the same program with the same tests is run once a process


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
    convention="pass@1 of one answer: all its Python blocks, or the text cut at the benchmark's stop strings",
    identity={"code": code_digest(sandbox, _child, programs, final_answer)},
)
def tests(examples: Sequence[Example], answers: Sequence[str]) -> list[Scored]:
    """Programs run a few at a time, and each is judged from outside."""
    jobs = [
        (program_of(a, e.setup, e.tests), tuple(e.tests), e.setup)
        for e, a in zip(examples, answers, strict=True)
    ]
    outcomes = _judge(jobs)
    return [
        Scored(float(o.passed), answer, f"{o.reason} {o.detail}".strip())
        for o, answer in zip((outcomes[job] for job in jobs), answers, strict=True)
    ]
