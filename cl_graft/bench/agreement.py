"""The scorer `math` beside math-verify and lm-eval: on pairs judged by hand, and on MATH's references, spelled anew.

lm-eval is no dependency: where it is not installed (`pip install "lm-eval[math]==0.4.13"`), its columns are left out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from random import Random
from typing import Any

from cl_graft.data.readers import records
from cl_graft.evaluation.answers import equivalent
from cl_graft.evaluation.final_answer import last_box
from cl_graft.report.table import Table

PAIRS = Path(__file__).parents[2] / "tests/evaluation/math_pairs.tsv"
PACKAGES = ("math-verify", "latex2sympy2_extended", "sympy", "lm-eval", "antlr4-python3-runtime")
PATIENCE = 60  # seconds of one comparison: a busy machine should change no verdict
Pair = tuple[str, str]  # contents of two boxes
Grader = Callable[[Sequence[Pair]], list[bool]]

# Spellings that leave an answer what it is, each with the pattern that it needs.
SPELLINGS: dict[str, Callable[[str], str]] = {
    "blanks": lambda s: re.sub(r"(?<=[\d}])(?!,\\!|,\d{3})([-+=,])(?=[\d\\x(])", r" \1 ", s),
    "dfrac": lambda s: s.replace("\\frac", "\\dfrac"),
    "a/b": lambda s: re.sub(r"^(-?)\\frac\{(\d+)\}\{(\d+)\}$", r"\1\2/\3", s),
    "thousands": lambda s: re.sub(r"^(-?\d{1,3})(\d{3})$", r"\1,\2", s),
    "left and right": lambda s: re.sub(r"^([(\[])([^()\[\]]*)([)\]])$", r"\\left\1\2\\right\3", s),
    "x =": lambda s: re.sub(r"^-?\d+$", r"x = \g<0>", s),
    ".0": lambda s: re.sub(r"^-?\d+$", r"\g<0>.0", s),
    "unit": lambda s: re.sub(r"^\d+$", r"\g<0>\\text{ units}", s),
    "no unit": lambda s: re.sub(
        r"\s*\\(?:text|mbox)\s*\{ *(?![ap]\.m)[a-z][ a-z.]*\}(?:\^\d)?$|\^\\circ$|\\%$", "", s
    ),
    "no text": lambda s: re.sub(r"^\\text\{([A-Za-z()]+)\}$", r"\1", s),
    "bmatrix": lambda s: s.replace("{pmatrix}", "{bmatrix}"),
}


def bench_agreement(
    data_dir: Path | None, some: int = 5000, say: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """{"versions", "accepted", "differences"}: how many pairs each grader accepts, right ones and wrong ones.

    some: how many of MATH's references. Raises DataError where MATH's test set is not in the data directory.
    """
    rows = records(data_dir, "math/test.jsonl", {"solution": str})[:some]
    graders = {"cl-graft math": ours, "math-verify": math_verify, **lm_eval()}
    by_hand = [
        line.split("\t")
        for line in PAIRS.read_text("utf-8").split("\n")
        if line[:1] not in ("", "#")
    ]
    references = [box for row in rows if (box := last_box(row["solution"])) is not None]
    rng = Random(0)
    spelled = [made for box in references if (made := _spelled(box, rng))]
    wrong = [pair for box in references if (pair := _wrong(box))]
    questions = {
        "by hand, right": [(r, a) for r, a, right in by_hand if right == "1"],
        "by hand, wrong": [(r, a) for r, a, right in by_hand if right == "0"],
        "itself": [(box, box) for box in references],
        **{f"spelled: {how}": [p for h, p in spelled if h == how] for how in SPELLINGS},
        "another last digit": wrong,
    }
    different = list(dict.fromkeys(pair for pairs in questions.values() for pair in pairs))
    accepted: dict[str, dict[str, list[bool]]] = {}
    for name, grade in graders.items():
        say(name)
        told = dict(zip(different, grade(different), strict=True))
        accepted[name] = {what: [told[pair] for pair in pairs] for what, pairs in questions.items()}
    return {
        "versions": {name: _version(name) for name in PACKAGES},
        "accepted": {
            what: {"of": len(pairs), **{name: sum(accepted[name][what]) for name in graders}}
            for what, pairs in questions.items()
            if pairs
        },
        "differences": [
            {"question": what, "reference": pair[0], "answer": pair[1]}
            | {name: accepted[name][what][k] for name in graders}
            for what, pairs in questions.items()
            for k, pair in enumerate(pairs)
            if len({accepted[name][what][k] for name in graders}) > 1
        ],
    }


def table(figures: dict[str, Any]) -> Table:
    """A row for each kind of pair: how many of them each grader accepts."""
    names = [name for name in next(iter(figures["accepted"].values())) if name != "of"]
    rows = tuple(
        (what, f"{told['of']:,}", *(f"{told[name]:,}" for name in names))
        for what, told in figures["accepted"].items()
    )
    told = ", ".join(f"{name} {number}" for name, number in figures["versions"].items())
    note = f"Pairs that each accepts; of `wrong` and `another last digit` 0 is right, of the others all. {told}."
    return Table("Equal answers to MATH", ("Pairs", "Of them", *names), rows, note)


def ours(pairs: Sequence[Pair]) -> list[bool]:
    return equivalent([(rf"$\boxed{{{a}}}$", rf"$\boxed{{{b}}}$") for a, b in pairs])


def math_verify(pairs: Sequence[Pair]) -> list[bool]:
    """The verdicts of `verify(parse(reference), parse(answer))`, as lm-eval's `minerva_math` asks it."""
    from math_verify import parse, verify

    @cache
    def read(text: str) -> Any:
        return parse(rf"$\boxed{{{text}}}$", parsing_timeout=PATIENCE)

    def same(reference: str, answer: str) -> bool:
        try:
            return bool(verify(read(reference), read(answer), timeout_seconds=PATIENCE))
        except Exception:
            return False

    return [same(*pair) for pair in pairs]


def lm_eval() -> dict[str, Grader]:
    """The graders of lm-eval's tasks `hendrycks_math` and `minerva_math`; none where it is not installed."""
    try:
        from lm_eval.tasks.hendrycks_math import utils as hendrycks
        from lm_eval.tasks.minerva_math import utils as minerva
    except (ImportError, PackageNotFoundError, AssertionError):
        return {}

    def by_hendrycks(pairs: Sequence[Pair]) -> list[bool]:
        return [bool(hendrycks.is_equiv(a, b)) for a, b in pairs]

    def by_minerva(pairs: Sequence[Pair]) -> list[bool]:
        plain = minerva.normalize_final_answer
        return [bool(minerva.is_equiv(plain(b), plain(a))) for a, b in pairs]

    return {"lm-eval hendrycks_math": by_hendrycks, "lm-eval minerva_math": by_minerva}


def _spelled(box: str, rng: Random) -> tuple[str, Pair] | None:
    """One of the spellings that change this reference, drawn at random."""
    changed = {
        how: text for how, spell in SPELLINGS.items() if (text := spell(box)) not in (box, "")
    }
    if not changed:
        return None
    how = rng.choice(sorted(changed))
    return how, (box, changed[how])


def _wrong(box: str) -> Pair | None:
    """The reference with its last digit one higher."""
    last = re.search(r"\d(?=\D*$)", box)
    if not last:
        return None
    return box, box[: last.start()] + str((int(last[0]) + 1) % 10) + box[last.end() :]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
