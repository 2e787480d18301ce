"""When two final answers are the same: cases worked by hand, real references, and answers that mean harm."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from threading import Thread

import pytest

from cl_graft.evaluation.answers import equivalent
from cl_graft.evaluation.math_forms import final_part, form, settled
from cl_graft.evaluation.scorers import Examinee, score
from cl_graft.task import Example
from tests.real import DATA, needs_data

SAME = [
    (r"\boxed{\frac{1}{2}}", "0.5"),
    (r"\boxed{\frac{1}{2}}", r"so we get $\frac12$"),
    (r"\boxed{\frac{1}{2}}", "The answer is 1/2."),
    (r"\boxed{\frac{1}{2}}", r"\boxed{\dfrac{2}{4}}"),
    (r"\boxed{\sqrt{8}}", r"\boxed{2\sqrt{2}}"),
    (r"\boxed{0.001}", r"\boxed{10^{-3}}"),
    (r"\boxed{(x+1)^2}", r"\boxed{x^2+2x+1}"),
    (r"\boxed{[1,2)}", r"\boxed{[1, 2)}"),
    (r"\boxed{\{1,2\}}", r"\boxed{\{2,1\}}"),
    (r"\boxed{(1,2)}", r"\boxed{(1, 2)}"),
    (r"\boxed{5\text{ cm}}", r"\boxed{5}"),
    (r"\boxed{5}", r"it is $5\text{ cm}$"),
    (r"\boxed{x=3}", r"\boxed{3}"),
    (r"\boxed{50\%}", r"\boxed{50}"),
    (r"\boxed{1234}", "1,234"),
    ("48+24=72. #### 72", r"\boxed{72}"),
    ("#### 72", "48+24 = 72 clips. The answer is 72."),
    ("#### 18", "She makes $18 every day."),
    ("#### 1,234", "#### 1234"),
    ("#### 5", "5.0"),
    ("#### -3", "It falls to -3 degrees"),
    (r"\boxed{\text{east}}", r"\boxed{\text{east}}"),
    (r"\boxed{\begin{pmatrix}1\\2\end{pmatrix}}", r"\boxed{\begin{pmatrix} 1 \\ 2 \end{pmatrix}}"),
]
DIFFERENT = [
    (r"\boxed{\frac{1}{2}}", r"\boxed{\frac{1}{3}}"),
    (r"\boxed{\frac{1}{2}}", "2"),
    (r"\boxed{[1,2)}", r"\boxed{(1,2]}"),
    (r"\boxed{\{1,2\}}", r"\boxed{\{1,3\}}"),
    (r"\boxed{(1,2)}", r"\boxed{(2,1)}"),
    (r"\boxed{\pi}", r"\boxed{3.14}"),
    (r"\boxed{x+1}", r"\boxed{x-1}"),
    (r"\boxed{\text{east}}", r"\boxed{\text{west}}"),
    ("#### 72", "#### 73"),
    ("#### 72", "first 72, then 73"),
    ("#### 1,234", "234"),
    ("#### 7", "no idea"),
    ("#### 7", ""),
]


def test_answers_that_are_the_same_in_another_form() -> None:
    verdicts = equivalent(SAME)
    assert [pair for pair, same in zip(SAME, verdicts, strict=True) if not same] == []


def test_answers_that_are_not() -> None:
    verdicts = equivalent(DIFFERENT)
    assert [pair for pair, same in zip(DIFFERENT, verdicts, strict=True) if same] == []


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (r"so $\boxed{7}$, no: $\boxed{8}$", "8"),
        (r"$\boxed{\frac{1}{2}}$ is $\boxed{0.5", r"\frac{1}{2}"),
        (r"$\boxed{\{1,2\}}$", r"\{1,2\}"),
        (r"$\boxed 5$", "5"),
        (r"$\fbox{5}$", "5"),
        ("#### Solution\n$\\boxed{8}$\n#### Check\n3 + 5 = 8 and 8 - 5 = 3", "8"),
        ("#### 1 no: #### 2 eggs", "2 eggs"),
        ("#### 8\nfor 3 + 5 = 8, and 5 = 5", "8"),
        ("#### Step 1\n3 boxes", None),
        (r"<think>\boxed{7}</think> \boxed{8}", "8"),
        (r"<think>\boxed{7}", None),
        ("\\boxed{8}\n\nProblem: What is 3 + 4?\nSolution: \\boxed{7}", "8"),
        ("Question 1: no, 2 is\nQuestion 2: \\boxed{8}", "8"),
        (r"Final Answer: The final answer is $\frac{1}{2}$. I hope it is correct.", r"\frac{1}{2}"),
        ("The answer is 1.5. Indeed 3/2 = 1.5.", "1.5"),
        ("**Answer: even**", "even"),
        ("6 of them", None),
    ],
)
def test_where_the_final_answer_is(text: str, part: str | None) -> None:
    assert final_part(text) == part


PAIRS = [
    line.split("\t")
    for line in Path(__file__).with_name("math_pairs.tsv").read_text("utf-8").split("\n")
    if line and not line.startswith("#")
]


def test_pairs_judged_by_hand() -> None:
    """Forms of MATH's references: what a teacher who holds the first would say of the second."""
    assert len(PAIRS) >= 200
    boxed = [(rf"so $\boxed{{{r}}}$.", rf"It is $\boxed{{{a}}}$.") for r, a, _ in PAIRS]
    found = equivalent(boxed)
    wrong = [pair for pair, same in zip(PAIRS, found, strict=True) if same != (pair[2] == "1")]
    assert wrong == []


@pytest.mark.parametrize(
    ("reference", "answer", "verdict"),
    [
        (r"\text{MAKE}", "KAME", False),
        (r"2516_8", r"2516_{8}", True),
        (r"2516_8", "2516", False),
        (r"9\text{ a.m.}", "9:00 AM", True),
        (r"9\text{ a.m.}", "9", False),
        (r"\text{twelve}", "12", False),
        (r"12\text{ cm}", "12 m", False),
        (r"12\text{ cm}", r"12 \text{ bars}", True),
        (r"\frac34", "0.75", None),
        ("ab", "ba", None),
    ],
)
def test_what_is_no_formula_is_settled_by_its_spelling(
    reference: str, answer: str, verdict: bool | None
) -> None:
    assert settled(form(reference), form(answer)) is verdict


HOSTILE = {
    "a tower of powers": r"\boxed{9^{9^{9^{9}}}}",
    "a number of 4,000 digits": r"\boxed{" + "9" * 4000 + "}",
    "fractions in fractions": r"\boxed{" + r"\frac{1}{" * 150 + "1" + "}" * 150 + "}",
    "brackets": "(" * 3000 + "1" + ")" * 3000,
    "what is no text": "\x00\ud800",
    "Python": "__import__('os').system('touch /tmp/never')",
}


def test_hostile_answers_are_wrong_and_the_next_one_is_judged_all_the_same() -> None:
    pairs = [("7", answer) for answer in HOSTILE.values()]
    verdicts = equivalent([pair for hostile in pairs for pair in (hostile, ("7", "7"))])
    assert verdicts == [False, True] * len(HOSTILE)


def test_a_judge_that_dies_or_hangs_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer whose judging cannot be interrupted: the process is killed, the answer counts as wrong."""
    from cl_graft.evaluation import answers

    asked = answers._ask

    def hanging(judge, reference, answer):
        if answer == "hang":
            judge.kill()
        return asked(judge, reference, answer)

    monkeypatch.setattr(answers, "_ask", hanging)
    assert equivalent([("1", "1"), ("2", "hang"), ("3", "hang"), ("4", "4")]) == [
        True,
        False,
        False,
        True,
    ]


def test_it_works_in_a_thread_where_math_verify_itself_refuses() -> None:
    found: list[bool] = []
    thread = Thread(target=lambda: found.extend(equivalent([("1/2", "0.5")])))
    thread.start()
    thread.join()
    assert found == [True]


def test_the_scorer() -> None:
    examples = [Example("p", r"thus \boxed{\frac12}"), Example("q", "#### 7")]
    examinee = Examinee(None, None, 8, 8, given=["0.5", "8"])  # type: ignore[arg-type]
    found = score(examinee, examples, ["math"])["math"]
    assert [o.score for o in found] == [1.0, 0.0] and [o.answer for o in found] == ["0.5", "8"]


# --- real references ---


real = needs_data("math", "gsm8k")


def references(name: str, field: str) -> list[str]:
    lines = (DATA / name).read_text("utf-8").split("\n")
    return [json.loads(line)[field] for line in lines if line]


@real
def test_every_reference_of_math_equals_itself() -> None:
    """Among the 5,000 are 90 with several boxes, and one that numbers its questions."""
    solutions = references("math/test.jsonl", "solution")
    assert sum(solution.count("\\boxed") > 1 for solution in solutions) == 90
    assert sum(equivalent([(s, s) for s in solutions])) == len(solutions) == 5000


@real
def test_references_of_math_equal_hardly_any_other() -> None:
    """Neighbours in a random order: only small numbers, which many problems share, coincide."""
    solutions = Random(0).sample(references("math/test.jsonl", "solution"), 150)
    pairs = list(zip(solutions, solutions[1:] + solutions[:1], strict=True))
    assert sum(equivalent(pairs)) <= 8


@real
def test_references_of_gsm8k_equal_their_number_in_a_box() -> None:
    solutions = Random(0).sample(references("gsm8k/test.jsonl", "answer"), 150)
    boxed = [rf"So it is $\boxed{{{s.rsplit('#### ', 1)[1]}}}$." for s in solutions]
    assert all(equivalent(list(zip(solutions, boxed, strict=True))))
