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

CHARACTERS = 2048  # of an answer's end: where the final answer is
SECONDS = (
    60.0  # for one pair, start of the process included: far above what math-verify allows itself
)


def final_part(text: str) -> str:
    """Where the final answer of a text is: what follows the last `####` (GSM8K's mark), or else its end.

    Per-cent signs are taken out, as the MATH benchmark's own comparison does (Hendrycks et al. 2021).
    """
    last = text.rsplit("####", 1)[-1] if "####" in text else text
    return last[-CHARACTERS:].replace("\\%", "").replace("%", "")


def equivalent(pairs: Sequence[tuple[str, str]]) -> list[bool]:
    """Whether the final answers of each (reference, answer) are equal as numbers, expressions, intervals, sets, ...

    The final answer is the last `\\boxed{...}`, or else the last formula or number. What cannot be read, or takes
    too long, is not equal to anything.
    """
    verdicts: list[bool] = []
    while len(verdicts) < len(pairs):  # another process after each one that had to be killed
        with _judge() as judge:
            for reference, answer in pairs[len(verdicts) :]:
                verdict = _ask(judge, final_part(reference), final_part(answer))
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
