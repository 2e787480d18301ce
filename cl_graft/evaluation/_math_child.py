"""The far side of the scorer `math`: answers of a model in, verdicts of math-verify out. Started by answers.py only.

One JSON list [reference, answer] a line in, one JSON boolean a line out. A process of its own because an answer can
name a number that fills any memory, or that no signal interrupts: this process may be killed. What is parsed is
never run: math-verify hands to Python's own parser only what is made of digits and operators.
"""

from __future__ import annotations

import json
import logging
import resource
import signal
import sys

MEMORY = 4 << 30  # bytes of address space
SECONDS = 3  # of the processor, for one pair: not of the clock, for a busy machine should change no verdict


class TooLong(BaseException):
    """The processor time of one pair is spent; no `except Exception` of a library swallows it."""


def main() -> None:
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    wanted = MEMORY if most == resource.RLIM_INFINITY else min(MEMORY, most)
    resource.setrlimit(resource.RLIMIT_AS, (wanted, most))
    logging.disable()
    from math_verify import parse, verify

    signal.signal(signal.SIGPROF, _stop)
    for line in sys.stdin:
        reference, answer = json.loads(line)
        try:
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            gold, given = (parse(text, parsing_timeout=None) for text in (reference, answer))
            same = bool(gold and given) and verify(
                gold, given, float_rounding=12, allow_set_relation_comp=True, timeout_seconds=None
            )
        except (Exception, MemoryError, RecursionError, TooLong):
            same = False
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(bool(same)), flush=True)


def _stop(*_: object) -> None:
    raise TooLong


if __name__ == "__main__":
    main()
