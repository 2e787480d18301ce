"""The far side of the scorer `math`: answers of a model in, verdicts of math-verify out. Started by answers.py only.

One JSON list [reference, answer] a line in, one JSON boolean a line out. A process of its own because an answer can
name a number that fills any memory, or that no signal interrupts: this process may be killed. What is parsed is
never run: math-verify hands to Python's own parser only what is made of digits and operators.
"""

from __future__ import annotations

import json
import logging
import resource
import sys

MEMORY = 4 << 30  # bytes of address space
SECONDS = 5  # of one parse or one comparison


def main() -> None:
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    wanted = MEMORY if most == resource.RLIM_INFINITY else min(MEMORY, most)
    resource.setrlimit(resource.RLIMIT_AS, (wanted, most))
    logging.disable()
    from math_verify import parse, verify

    for line in sys.stdin:
        reference, answer = json.loads(line)
        try:
            gold, given = (parse(text, parsing_timeout=SECONDS) for text in (reference, answer))
            same = bool(gold and given) and verify(
                gold, given, allow_set_relation_comp=True, timeout_seconds=SECONDS
            )
        except (Exception, MemoryError, RecursionError):
            same = False
        print(json.dumps(bool(same)), flush=True)


if __name__ == "__main__":
    main()
