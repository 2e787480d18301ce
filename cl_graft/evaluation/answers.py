"""Whether two answers to a math problem are the same, by Hugging Face's math-verify in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from selectors import EVENT_READ, DefaultSelector

from cl_graft.errors import CLGraftError
from cl_graft.evaluation.final_answer import first_answer
from cl_graft.evaluation.math_forms import CHARACTERS, final_part, form, settled

SECONDS = (
    60.0  # for one pair, start of the process included: far above what math-verify allows itself
)


def equivalent(pairs: Sequence[tuple[str, str]]) -> list[bool]:
    """Whether the final answers of each (reference, answer) are equal as numbers, expressions, intervals, sets, ...

    Where the spelling does not tell, math-verify does. What cannot be read, or takes too long, is not equal to
    anything.
    """
    asked = [_to_parse(reference, answer) for reference, answer in pairs]
    questions = [question for one in asked if not isinstance(one, bool) for question in one]
    verdicts = iter(_parsed_alike(questions))
    return [one if isinstance(one, bool) else any([next(verdicts) for _ in one]) for one in asked]


def _to_parse(reference: str, answer: str) -> bool | list[tuple[str, str]]:
    """The verdict where spelling gives it, else the formulas of which one pair has to be equal."""
    parts = final_part(reference), final_part(answer)
    if None in parts:
        whole = (first_answer(text)[-CHARACTERS:] for text in (reference, answer))
        texts = [
            f"${form(p).formula}$" if p is not None else _plain(w)
            for p, w in zip(parts, whole, strict=True)
        ]
        return [(texts[0], texts[1])]
    right, given = (form(part or "") for part in parts)
    if (verdict := settled(right, given)) is not None:
        return verdict
    questions = [(f"${right.formula}$", f"${given.formula}$")]
    if right.percent != given.percent:
        shares = [
            rf"$\frac{{{f.formula}}}{{100}}$" if f.percent else f"${f.formula}$"
            for f in (right, given)
        ]
        questions.append((shares[0], shares[1]))
    return questions


def _plain(text: str) -> str:
    """A text without per-cent signs, as the MATH benchmark's own comparison has it (Hendrycks et al. 2021)."""
    return text.replace("\\%", "").replace("%", "")


def _parsed_alike(pairs: Sequence[tuple[str, str]]) -> list[bool]:
    """math-verify's verdicts, in a process that is replaced whenever it had to be killed."""
    verdicts: list[bool] = []
    while len(verdicts) < len(pairs):
        with _judge() as judge:
            for reference, answer in pairs[len(verdicts) :]:
                verdict = _ask(judge, reference, answer)
                verdicts.append(bool(verdict))
                if verdict is None:
                    break
    return verdicts


@contextmanager
def _judge() -> Iterator[subprocess.Popen[bytes]]:
    child = Path(__file__).with_name("_math_child.py")
    judge = subprocess.Popen(
        [sys.executable, "-I", "-B", str(child)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        if _ask(judge, "1", "1") is not True:
            raise CLGraftError(
                "the scorer 'math' cannot start math-verify; install it with `pip install math-verify`."
            )
        yield judge
    finally:
        judge.kill()
        judge.communicate()


def _ask(judge: subprocess.Popen[bytes], reference: str, answer: str) -> bool | None:
    """The verdict; None where the process died or did not answer in time."""
    assert judge.stdin and judge.stdout
    try:
        judge.stdin.write(json.dumps([reference, answer]).encode() + b"\n")
        judge.stdin.flush()
    except BrokenPipeError:
        return None
    with DefaultSelector() as selector:
        selector.register(judge.stdout, EVENT_READ)
        line = judge.stdout.readline() if selector.select(SECONDS) else b""
    return json.loads(line) if line else None
