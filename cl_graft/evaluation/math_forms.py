"""Final answers to math problems as text: one spelling for what is written alike, and what is no number at all.

Words, times of day, numbers of another base and letters in an order are compared as they are written; a parser of
formulas would multiply their letters.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from cl_graft.evaluation.final_answer import first_answer, last_box, marked

CHARACTERS = 2048  # of an answer's end: where the final answer is

_WRAPPED = r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|mbox|hbox|mathrm|mathbf|mathit|mathsf|operatorname)\*?\s*\{([^{}]*)\}"
_SAID = re.compile(
    r"(?:final answer(?: to this problem)?|answer) (?:is|=)[: ]+(.+)|^[*_#\s]*(?:final )?answer[*_]*:[*_ ]*(.+)",
    re.IGNORECASE | re.MULTILINE,
)
# Measures by one name; other words after a number ("students") tell no two answers apart.
_MEASURES = {
    spelling: name
    for name, spellings in {
        "mm": "mm millimeter millimeters",
        "cm": "cm centimeter centimeters centimetre centimetres",
        "m": "m meter meters metre metres",
        "km": "km kilometer kilometers",
        "in": "in inch inches",
        "ft": "ft foot feet",
        "yd": "yd yard yards",
        "mi": "mi mile miles",
        "s": "s sec second seconds",
        "min": "min minute minutes",
        "h": "h hr hrs hour hours",
        "day": "day days",
        "week": "week weeks",
        "year": "year years",
        "g": "g gm gram grams",
        "kg": "kg kilogram kilograms",
        "lb": "lb lbs pound pounds",
        "oz": "oz ounce ounces",
        "$": "dollar dollars usd",
        "cent": "cent cents",
        "rad": "rad radian radians",
        "deg": "degree degrees",
    }.items()
    for spelling in spellings.split()
}
_MULTIPLES = "hundred|thousand|million|billion|trillion|dozen"
_FUNCTIONS = set(
    [
        "sqrt",
        "pi",
        "sin",
        "cos",
        "tan",
        "cot",
        "sec",
        "csc",
        "log",
        "ln",
        "exp",
        "arcsin",
        "arccos",
        "arctan",
        "inf",
        "infinity",
        "infty",
        "theta",
        "alpha",
        "beta",
        "and",
        "or",
    ]
)
_SHORT_WORDS = {"odd", "yes", "no", "all", "one", "two", "six", "ten"}
_BARE = r"(?:(?:square|cubic|sq\.?|cu\.?) )?[A-Za-z]+\.?"
_UNIT = re.compile(
    rf"^(?P<value>.*(?:[\d)}}\]]|\\[a-z]+))\s*(?:\x00(?P<wrapped>[^\x00]*)\x01|(?<=\d)\s+(?P<bare>{_BARE}))"
    r"(?:\^\{?(?P<power>\d)\}?)?\.?$",
    re.DOTALL,
)


class Form(NamedTuple):
    """A final answer in one spelling. words: it as words where it is no formula. unit: the measure that was cut off."""

    formula: str
    words: str
    unit: str
    percent: bool


def final_part(text: str) -> str | None:
    """What a text states as its final answer: its last box, the line after a mark, or after "answer is"; else None."""
    text = first_answer(text)
    if (box := last_box(text)) is not None:
        return box
    if (line := marked(text)) is not None:
        return line
    said = [first or second for first, second in _SAID.findall(text)]
    if not said:
        return None
    line = re.sub(r"\.?\s*I hope (?:it|this) is correct.*", "", said[-1], flags=re.IGNORECASE)
    formulas = re.findall(r"\$([^$]+)\$|\\\((.+?)\\\)", line)
    if len(formulas) == 1:
        return "".join(formulas[0])
    return (
        re.split(r"\.(?:\s|$)", line.strip().strip("*_"))[0].strip("*_ ") if not formulas else line
    )


def form(part: str) -> Form:
    """The spelling of a final answer without layout, currency, degrees, and a unit at its end."""
    text = part.strip().replace("−", "-").replace("\n", " ")
    dollars = bool(re.match(r"-?\s*\\\$", text))
    text = re.sub(r"(?<!\\)\\[()\[\]]|(?<!\\)\$|\\\$|\\(?:displaystyle|limits)", " ", text)
    text = re.sub(r"\\(?:left|right|[bB]igg?[lr]?)(?![a-zA-Z])\.?", "", text)
    text = re.sub(r"(?<=\d)(?:\{,\}|,\\!|\\,|\u202f)(?=\d{3}(?!\d))", "", text)
    text = re.sub(r"(?<!\\)\\[,;:!> ]|\\q?quad(?![a-zA-Z])|~", " ", text)
    text = re.sub(r"\^\s*\{?\s*\\circ\s*\}?|\\degree|°|\^\s*o(?![a-z])", "", text)
    text = re.sub(r"\\[dtc]frac", r"\\frac", text)
    text = re.sub(r"\\frac\s*(\d)\s*(\d)(?!\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac\s*(\d)\s*\{", r"\\frac{\1}{", text)
    text = re.sub(r"(\\frac\s*\{[^{}]*\})\s*(\d)", r"\1{\2}", text)
    text = re.sub(r"\\frac\s*(\\pi|\d)\s*(\d)(?!\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\sqrt\s*(\d)", r"\\sqrt{\1}", text)
    percent = bool(re.search(r"\\?%\s*\.?$", text))
    text = re.sub(r"\\?%", "", text)
    text = re.sub(r"\\(?:ne|neq)(?![a-z])", r"\\ne", text)
    text = re.sub(r"\\l(?:e|eq|eqslant)(?![a-z])|≤", r"\\le ", text)
    text = re.sub(r"\\g(?:e|eq|eqslant)(?![a-z])|≥", r"\\ge ", text)
    text = re.sub(_WRAPPED, lambda m: f"\x00{m[1]}\x01", text)
    text = re.sub(r"\x00\s*(?:,?\s*and|or)\s*\x01", ",", text)
    text = re.sub(r",\s*,", ",", text).strip().rstrip(".,;").strip()
    text, unit = _without_unit(text)
    words = _words(text) if _is_words(text) else ""
    return Form(_formula(text), words, unit or "$" * dollars, percent)


def _without_unit(text: str) -> tuple[str, str]:
    found = _UNIT.match(text)
    if not found:
        return text, ""
    unit = (found["wrapped"] or found["bare"] or "").strip(" .").lower()
    names = unit.split()
    known = [_MEASURES[name] for name in re.split(r"[^a-z]+", unit) if name in _MEASURES]
    if re.search(rf"\b(?:{_MULTIPLES}|[ap]\.?m)\b", unit) or not re.search("[a-z]", unit):
        return text, ""
    if found["bare"] and (not known and (len(unit) < 4 or set(names) & _FUNCTIONS)):
        return text, ""
    square = {"square": "2", "sq": "2", "cubic": "3", "cu": "3"}
    power = found["power"] or next((square[name] for name in names if name in square), "")
    return found["value"].strip(), " ".join(known) + f"^{power}" * bool(power)


def _is_words(text: str) -> bool:
    """Whether it is read as words: text that is no formula's, a time of day, a number with a base, or capitals."""
    if re.search(r"\x00[^\x01]*[A-Za-z][^\x01]*\x01", text) or re.search(
        r"\d\s*[ap]\.?\s?m\b", text, re.I
    ):
        return True
    if re.fullmatch(r"-?[0-9A-Fa-f.]+\s*_\s*\{?\s*\w+\s*\}?", text) or re.fullmatch(
        r"\d+\s*:\s*\d+", text
    ):
        return True
    plain = re.sub(r"\\(?:begin|end)\{\w+\*?\}|\\[a-zA-Z]+", " ", text)
    if re.search(r"[A-Z]{2,}", plain) or re.fullmatch(r"\(?[A-Z]\)?", plain.strip()):
        return True
    bare = set(re.findall(r"[a-z]{4,}", plain.lower())) - _FUNCTIONS
    return plain.strip().lower() in _SHORT_WORDS or any(re.search("[aeiou]", word) for word in bare)


def _words(text: str) -> str:
    text = re.sub(r"\\[a-zA-Z]+", " ", text).lower()
    text = re.sub(r"([ap])\.?\s?m\b\.?", r"\1m", text)
    text = re.sub(r":00(?=\s*[ap]m)", "", text)
    text = re.sub(r"\b(?:and|or|the|an?(?= [a-z]{3}))\b", " ", text)
    return re.sub(r"[^a-z0-9:/_+<>=-]|(?<![\d\s(])-(?=[a-z])", "", text)


def _formula(text: str) -> str:
    text = re.sub(r"[\x00\x01]", "", text)
    if re.fullmatch(r"-?\d{1,3}(?:,\d{3})+(?:\.\d+)?", text):
        text = text.replace(",", "")
    text = re.sub(r"(?<![\\a-zA-Z])sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}", text)
    text = re.sub(r"(?<![\\a-zA-Z])(pi|infty)(?![a-z])", r"\\\1", text)
    text = re.sub(r"(?<![\\a-zA-Z])inf(?:inity)?(?![a-z])|∞", r"\\infty", text)
    text = text.replace("**", "^").replace("*", r"\cdot ").replace("π", r"\pi ")
    return re.sub(r"\s+", " ", text).strip()


def settled(reference: Form, given: Form) -> bool | None:
    """Whether two forms are the same where spelling tells; None where it takes a parser of formulas."""
    measures = zip(reference.unit.split("^"), given.unit.split("^"), strict=False)
    if any(right and mine and right != mine for right, mine in measures):
        return False
    if reference.words or given.words:
        return (reference.words or _words(reference.formula)) == (
            given.words or _words(given.formula)
        )
    if not reference.formula or not given.formula:
        return False
    if re.sub(r"\s", "", reference.formula) == re.sub(r"\s", "", given.formula):
        return True
    return None
