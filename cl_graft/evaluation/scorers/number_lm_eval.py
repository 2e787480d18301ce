"""1 where lm-evaluation-harness's task gsm8k says so (version 3, lm-eval 0.4.13): for figures beside published ones."""

from __future__ import annotations

import re
from typing import Literal

from cl_graft.evaluation.scorers.base import scorer
from cl_graft.task import Example

STOPS = ("Question:", "</s>", "<|im_end|>")
IGNORED = (r",", r"\$", r"(?s).*#### ", r"\.$")


@scorer(convention="lm-eval 0.4.13, gsm8k {filter}")
def number_lm_eval(
    example: Example,
    answer: str,
    *,
    filter: Literal["strict-match", "flexible-extract"] = "strict-match",
) -> bool:
    """filter: what is read of the answer, `strict-match` (after `#### `) or `flexible-extract` (the last number)."""
    for stop in STOPS:
        answer = answer.split(stop, 1)[0]
    return _plain(extracted(answer, filter)) == _plain(example.completion)


def extracted(answer: str, filter: str) -> str:
    """What the filter of that name takes out of an answer, as text; `[invalid]` where there is nothing."""
    if filter == "strict-match":
        found = re.findall(r"#### (\-?[0-9\.\,]+)", answer)[:1]
    else:
        pairs = re.findall(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", answer)[-1:]
        found = [first or second for first, second in pairs]
    return found[0].strip() if found else "[invalid]"


def _plain(text: str) -> str:
    for pattern in IGNORED:
        text = re.sub(pattern, "", text)
    return text.lower()
