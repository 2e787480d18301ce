"""1 if the final number equals the reference's: GSM8K's mark, else a box, else the last number (arXiv 2110.14168)."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

from cl_graft.evaluation import final_answer
from cl_graft.evaluation.final_answer import first_answer, last_box, marked
from cl_graft.evaluation.scorers.base import scorer
from cl_graft.ranges import NotNegative
from cl_graft.store.digests import code_digest
from cl_graft.task import Example

# A comma, `{,}` or `\,` between groups of three belongs to the number; elsewhere a comma ends it.
_PLAIN = (
    r"(?P<plain>(?:\d{1,3}(?:(?:,|\{,\}|\\,|\u202f)\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<![\w.])\.\d+)"
    r"(?P<power>[eE][+-]?\d{1,3}(?!\w)|\s*(?:\\times|\\cdot|[*×x])\s*10\s*\^\s*\{?[-−]?\d{1,3}\}?)?"
)
_FRACTION = (
    r"(?:(?P<whole>\d+)\s*)?\\[dt]?frac\s*(?:\{\s*(?P<a>\d+)\s*\}|(?P<b>\d))\s*(?:\{\s*(?P<c>\d+)\s*\}|(?P<d>\d))"
    r"|(?:(?<![\d.,])(?P<full>\d+) )?(?<![\d./,])(?P<over>\d+)/(?P<under>\d+)(?![\d/]|[.,]\d)"
)
# A minus right after a digit, a letter or a bracket is an operator; it may stand before a currency's sign.
_SIGN = (
    r"(?:(?<![\w)}])(?P<sign>[-−])(?:\\?[$€£]\s?)?(?=[\d.\\])|(?<![\w)}])\\?[$€£](?P<inner>[-−]))?"
)
NUMBER = re.compile(
    rf"{_SIGN}(?<!\^)(?<!\^\{{)(?:(?P<base>\d+)\^\{{?(?P<exponent>[-−]?\d{{1,3}})\}}?|{_FRACTION}|{_PLAIN})"
    r"(?P<percent>\s*\\?%)?"
)


class Number(NamedTuple):
    """A number of a text, and whether a per-cent sign follows it."""

    value: float
    percent: bool

    def equals(self, other: Number, tolerance: float) -> bool:
        """Whether both are the same: 50 % is 50 % and 0.5, and 50 where that has no sign of its own."""
        readings = [self.value]
        readings += [self.value / 100] if self.percent > other.percent else []
        readings += [self.value * 100] if self.percent < other.percent else []
        return any(v == other.value or abs(v - other.value) <= tolerance for v in readings)


def numbers(text: str) -> list[Number]:
    """The numbers of a text in their order: decimals, powers, fractions, mixed numbers, signs before currencies."""
    found = (_read(match) for match in NUMBER.finditer(text))
    return [number for number in found if number and math.isfinite(number.value)]


def _read(match: re.Match[str]) -> Number | None:
    part = match.groupdict()
    try:
        value = _value(part)
    except (ValueError, ArithmeticError):
        return None
    return Number(-value if part["sign"] or part["inner"] else value, bool(part["percent"]))


def _value(part: dict[str, str | None]) -> float:
    if part["base"]:
        return float(part["base"]) ** int((part["exponent"] or "").replace("−", "-"))
    over, under = part["a"] or part["b"] or part["over"], part["c"] or part["d"] or part["under"]
    if over and under:
        share, whole = int(over) / int(under), int(part["whole"] or part["full"] or 0)
        # 1 1/2 is one number, 2010 3/2 are two
        return whole + share if share < 1 else share
    power = re.sub(r"[\s{}]", "", part["power"] or "").replace("−", "-")
    power = re.sub(r"^(?:\\times|\\cdot|[*×x])10\^", "e", power)
    return float(re.sub(r"[^\d.]", "", part["plain"] or "") + power)


def _stated(text: str) -> list[Number]:
    """The numbers of what a text states as its answer: the line after a mark, a box, or else all of it."""
    line, box = marked(text), last_box(text)
    for part in (line and line.rsplit("=", 1)[-1], box):
        if part and (found := numbers(part)):
            return found[:1] if part is not box else found[-1:]
    return numbers(text)


def final(text: str) -> Number | None:
    """The final number of the first answer in a text; None without one, and where a mark is cut off before it."""
    text = first_answer(text).rstrip()
    if text.endswith("####") and marked(text) is None:
        return None
    found = _stated(text)
    return found[-1] if found else None


def final_number(text: str) -> float | None:
    """The value of `final`."""
    found = final(text)
    return found.value if found else None


def _flaw(example: Example) -> str:
    """Why the completion is no reference: it has to come to one number."""
    text = example.completion
    part = marked(text) or last_box(text) or text.strip().rsplit("\n", 1)[-1]
    found = list(dict.fromkeys(numbers(part.rsplit("=", 1)[-1])))
    if not found:
        return f"no number in its completion {text[-40:]!r}"
    if len(found) > 1:
        told = ", ".join(f"{number.value:g}" for number in found)
        return f"several numbers ({told}) at the end of its completion {text[-40:]!r}, not one"
    return ""


@scorer(
    flaw=_flaw,
    convention="the number after the first ####, else in the last box, else the last number",
    identity={"code": code_digest(final_answer)},
)
def number(example: Example, answer: str, *, tolerance: NotNegative = 0.0) -> bool:
    """tolerance: the numbers may differ by so much."""
    given, right = final(answer), final(example.completion)
    return given is not None and right is not None and given.equals(right, tolerance)
