"""How answers are scored: the number, the program and the label that count, on cases worked by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cl_graft import plugins
from cl_graft.errors import UnknownName
from cl_graft.evaluation.programs import program_of
from cl_graft.evaluation.sandbox import CONSENT_VARIABLE, ConsentNeeded
from cl_graft.evaluation.scorers import Examinee, score
from cl_graft.evaluation.scorers.exact import exact
from cl_graft.evaluation.scorers.number import final_number, number
from cl_graft.task import Example

# --- the final number ---


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", None),
        ("none at all", None),
        ("-", None),
        ("7", 7),
        ("The answer is 42.", 42),
        ("3 apples and 4 pears make 7 fruits", 7),
        ("-7", -7),
        ("it falls to -3 degrees", -3),
        ("(-3)", -3),
        ("x=-2.5", -2.5),
        ("$-5", -5),
        ("2.5", 2.5),
        ("0.10", 0.1),
        ("costs $.75", 0.75),
        ("-.5", -0.5),
        ("ends with 12.", 12),
        ("1,234", 1234),
        ("1,234,567.89 dollars", 1234567.89),
        ("-1,000", -1000),
        ("1,2,3", 3),
        ("12,34", 34),
        ("in 2010, 5 of them", 5),
        ("5 - 3", 3),
        ("5-3", 3),
        ("a range of 10-12", 12),
        ("x1-2", 2),
        ("(1+2)-3", 3),
        ("50%", 50),
        ("1/2", 0.5),
        ("3/4 of it", 0.75),
        (r"$\frac{3}{4}$", 0.75),
        (r"-\dfrac34", -0.75),
        ("1 1/2 hours", 1.5),
        (r"$2\frac12$", 2.5),
        ("in 2010 3/2", 1.5),
        ("1/0", None),
        ("12/25/2020", 2020),
        ("1.5e5", 150000),
        (r"$1.5 \times 10^{5}$", 150000),
        ("2 × 10^-3", 0.002),
        ("10^5", 100000),
        ("1e999", None),
        ("-$50", -50),
        ("at -$1,200.50.", -1200.5),
        ("$200-$50", 50),
        ("\u22123 degrees", -3),
        ("$1{,}200$", 1200),
        (r"$12\,500$", 12500),
        ("- 3 apples", 3),
        (r"it is \boxed{8}, for 3 + 5 is 8 and 5 is 5", 8),
        ("#### Step 1: Count 3\n3 + 5 = 8", 8),
        ("#### 1. Boxes\n3\n#### 2. Sum\n3 + 5 = 8", 8),
        ("#### 18\n\nA farm has 5 hens.\n#### 7", 18),
        ("#### 18\n\nQuestion: 5 + 2?\nAnswer: 7", 18),
        ("so 18.\n\nQ: What is 5 + 2?\nA: 7", 18),
        ("Question: what is 6 + 12?\nAnswer: 18", 18),
        ("so 18.<|im_end|>\n7", 18),
        ("<think>maybe 7</think> 18", 18),
        ("maybe 7</think> 18", 18),
        ("18 <think>or 7, no", 18),
        ("<think>18", None),
        ("007", 7),
        ("3+4=7. #### 7", 7),
        ("#### 7", 7),
        ("####7", 7),
        ("#### -7.50", -7.5),
        ("#### 1,000", 1000),
        ("#### $18 of the 20", 18),
        ("9 then #### 3 and then 8", 3),
        ("#### 1 no: #### 2", 2),
        ("7 ####", None),
        ("#### 18\n\n####", 18),
        ("7 #### unknown", 7),
        ("7 ###", 7),
        ("3+4=7.\n#### 7\n", 7),
    ],
)
def test_the_final_number(text: str, value: float | None) -> None:
    assert final_number(text) == value


@settings(deadline=None)
@given(st.integers(-(10**12), 10**12), st.text(alphabet="abc .\n"), st.text(alphabet="abc \n"))
def test_a_number_is_found_among_words(n: int, before: str, after: str) -> None:
    assert final_number(f"{before} {n} {after}") == n
    assert final_number(f"{before} {n:,} {after}") == n
    assert final_number(f"17 {before} #### {n:,} {after} 4") == n


@settings(deadline=None)
@given(st.floats(-1e6, 1e6).map(lambda x: round(x, 4)))
def test_decimals_are_read_exactly(x: float) -> None:
    assert final_number(f"so {x:.4f} it is") == x
    assert final_number(f"so {x:,.4f} it is") == x


@settings(deadline=None)
@given(st.text())
def test_no_text_breaks_the_reader(text: str) -> None:
    found = final_number(text)
    assert found is None or isinstance(found, float)


def test_right_numbers() -> None:
    reference = Example("?", "12*10=120. #### 120")
    assert number.function(reference, "#### 120")
    assert number.function(reference, "it is 120.0")
    assert number.function(reference, "worked out otherwise: 60+60=120. #### 120")
    assert not number.function(reference, "#### 12")
    assert not number.function(reference, "120, or rather 121")
    assert not number.function(reference, "")
    assert not number.function(Example("?", "no number"), "no number")


def test_right_texts() -> None:
    assert exact.function(Example("?", "dog"), " dog\n")
    assert not exact.function(Example("?", "dog"), "Dog")
    assert not exact.function(Example("?", "dog"), "dog.")
    assert not exact.function(Example("?", "dog"), "")


# --- the program ---

BODY = "def f(x):\n    return x"


@pytest.mark.parametrize(
    ("answer", "program"),
    [
        (BODY, BODY),
        ("", ""),
        (f"```python\n{BODY}\n```", BODY + "\n"),
        (f"```\n{BODY}\n```", BODY + "\n"),
        (f"```py\n{BODY}\n```", BODY + "\n"),
        (f"```Python3 \r\n{BODY}\n```", BODY + "\n"),
        (f"Here it is:\n```python\n{BODY}\n```\nIt returns x.", BODY + "\n"),
        (f"```python\n{BODY}\n```\nor\n```python\nother\n```", BODY + "\n"),
        (f"Cut off:\n```python\n{BODY}", BODY),
        ("```python\n```", "```python\n```"),
        ("x = '```'", "x = '```'"),
    ],
)
def test_the_program_of_an_answer(answer: str, program: str) -> None:
    assert program_of(answer) == program


START = 'import math\ndef f(x):\n    """Doubles."""\n'


@pytest.mark.parametrize(
    ("answer", "program"),
    [
        ("    return 2 * x", START + "    return 2 * x"),
        ("```python\n\n    return 2 * x\n```", START + "\n    return 2 * x\n"),
        ("```python\ndef f(x):\n    return 2 * x\n```", "def f(x):\n    return 2 * x\n"),
        ("", ""),
    ],
)
def test_a_body_goes_on_from_the_function_that_was_begun(answer: str, program: str) -> None:
    assert program_of(answer, START) == program


def test_whole_functions_and_bodies_are_judged_alike() -> None:
    """What the start imports is there for a whole function that does not import it again."""
    example = Example("p", "", ("def check(g):\n    assert g(2) == 4\ncheck(f)",), setup=START)
    answers = [
        "    return 2 * x",
        "```python\ndef f(x):\n    return math.floor(2 * x)\n```",
        "    return x",
        "```python\ndef f(x):\n    return x\n```",
        "",  # the start alone returns None
    ]
    found = scores("tests", [example] * 5, answers, allow_code=True)
    assert found == [1, 1, 0, 0, 0]


# --- scorers on answers that exist already ---


def examinee(answers: Sequence[str], **changed: Any) -> Examinee:
    return Examinee(None, None, 32, 128, given=answers, **changed)  # type: ignore[arg-type]


def scores(metric: str, examples: Sequence[Example], answers: Sequence[str], **changed: Any):
    return [o.score for o in score(examinee(answers, **changed), examples, [metric])[metric]]


def test_number_and_exact() -> None:
    examples = [Example("a", "1+1=2. #### 2"), Example("b", "#### 3"), Example("c", "#### 4")]
    answers = ["#### 2", " #### 3 ", "no idea"]
    found = score(examinee(answers), examples, ["number", "exact"])
    assert [o.score for o in found["number"]] == [1, 1, 0]
    assert [o.score for o in found["exact"]] == [0, 1, 0]
    assert [o.answer for o in found["number"]] == answers
    assert list(found) == ["number", "exact"]


CODE = [
    Example("double", "", ("assert f(2) == 4", "assert f(-3) == -6")),
    Example("double", "", ("assert f(2) == 4", "assert f(-3) == -6")),
    Example("double", "", ("assert f(2) == 4",)),
    Example("double", "", ("assert f(2) == 4",)),
    Example("double", "", ("assert f(2) == K",), setup="K = 4"),
]
ANSWERS = [
    "```python\ndef f(x): return 2*x\n```",
    "def f(x): return x*x",
    "def f(x): return x*x",
    "print('all tests passed')",
    "def f(x): return K",
]


def test_programs_pass_every_hidden_test_or_fail() -> None:
    found = score(examinee(ANSWERS, allow_code=True), CODE, ["tests"])["tests"]
    assert [o.score for o in found] == [1, 0, 1, 0, 1]
    assert [o.answer for o in found] == ANSWERS
    assert [o.note.split()[0] for o in found] == ["passed", "wrong", "passed", "error", "passed"]
    assert "f(-3)" in found[1].note and "NameError" in found[3].note


def test_programs_are_not_run_without_consent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CONSENT_VARIABLE, raising=False)
    with pytest.raises(ConsentNeeded, match="--allow-code-execution"):
        scores("tests", CODE, ANSWERS)
    monkeypatch.setenv(CONSENT_VARIABLE, "1")
    assert scores("tests", CODE[2:3], ANSWERS[2:3]) == [1]


def test_a_scorer_that_does_not_exist_is_answered_with_the_nearest() -> None:
    with pytest.raises(UnknownName, match="no scorer named 'numbers'; did you mean number"):
        score(examinee(["1"]), [Example("a", "1")], ["exact", "numbers"])


def test_answers_and_examples_must_be_as_many() -> None:
    for metric in ("number", "exact"):
        with pytest.raises(ValueError):
            scores(metric, [Example("a", "1")], [])


# --- scorers that ask the model ---


def test_choice_is_the_most_likely_label(nano: tuple[Any, Any]) -> None:
    """Examples of two label sets, mixed; the model is asked for no answer in words."""
    model, tokenizer = nano
    sets = [("dog", "cat", "a"), (" 3", " 4")]
    examples = [
        Example(prompt, choices[0], choices=choices)
        for prompt in ("Q: one?\nA: ", "Q: and two more?\nA: ", "Q: x\nA: ")
        for choices in sets
    ]
    asked = Examinee(model, tokenizer, 0, 128)
    outcomes = score(asked, examples, ["choice"])["choice"]
    for example, outcome in zip(examples, outcomes, strict=True):
        fresh = replace(asked, known={})
        likely = fresh.likelihoods([(example.prompt, c) for c in example.choices])
        best = example.choices[max(range(len(likely)), key=likely.__getitem__)]
        assert outcome.answer == best
        assert outcome.score == float(best == example.completion)


def test_what_one_scorer_has_read_another_is_told(nano: tuple[Any, Any]) -> None:
    """The reference is among the choices: its likelihood is the same, to the last digit, and read once."""
    model, tokenizer = nano
    choices = ("dog", "cat")
    within = [Example(f"Q: {n}?\nA: ", choices[n % 2], choices=choices) for n in range(5)]
    among = Example(
        "Q: longer than what is read\nA: ", "bird", choices=("a much longer one", "bird")
    )
    asked, read = Examinee(model, tokenizer, 0, 24), []
    model.register_forward_pre_hook(lambda *_: read.append(1))
    together = score(asked, within, ["choice", "neg_bits_per_byte"])
    once = len(read)
    score(replace(asked, known={}), within, ["choice"])
    assert len(read) == 2 * once > 0
    values = asked.choice_likelihoods([e.prompt for e in within], choices)
    for outcome, row, example in zip(together["neg_bits_per_byte"], values, within, strict=True):
        mine = row[choices.index(example.completion)]
        assert outcome.score == mine / math.log(2) / len(example.completion)
    alone = score(replace(asked, known={}), within, ["neg_bits_per_byte"])["neg_bits_per_byte"]
    for one, other in zip(together["neg_bits_per_byte"], alone, strict=True):
        assert one.score == pytest.approx(other.score, abs=1e-5)
    # beside a longer choice less of the prompt is left: that is another likelihood
    both = score(asked, [among], ["choice", "neg_bits_per_byte"])["neg_bits_per_byte"]
    only = score(replace(asked, known={}), [among], ["neg_bits_per_byte"])["neg_bits_per_byte"]
    assert both[0].score == pytest.approx(only[0].score, abs=1e-5)


def test_bits_per_byte(nano: tuple[Any, Any]) -> None:
    """log2 of the probability over bytes, not characters; a longer text is not worse for its length."""
    model, tokenizer = nano
    examples = [Example("Q: Copy ab.\nA: ", "ab"), Example("Q: x\nA: ", "3+4=7. #### 7")]
    asked = Examinee(model, tokenizer, 0, 128)
    found = [o.score for o in score(asked, examples, ["neg_bits_per_byte"])["neg_bits_per_byte"]]
    likely = asked.likelihoods([(e.prompt, e.completion) for e in examples])
    sizes = [2, 13]
    assert found == pytest.approx([x / math.log(2) / n for x, n in zip(likely, sizes, strict=True)])
    assert all(x < 0 for x in found)


def test_bits_per_byte_of_a_cut_answer_counts_what_was_read(nano: tuple[Any, Any]) -> None:
    """Three letters of five fit beside one token of the prompt, and no end-of-sequence: their bits, their bytes."""
    model, tokenizer = nano
    long = "qzxjk"  # one token a letter
    cut = Examinee(model, tokenizer, 0, 4)
    (found,) = score(cut, [Example("Q", long)], ["neg_bits_per_byte"])["neg_bits_per_byte"]
    (likely,) = cut.likelihoods([("Q", long)])
    assert found.score == pytest.approx(likely / math.log(2) / 3)


def test_what_needs_an_answer_is_declared() -> None:
    """Where no scorer needs one, none is generated: the model may be as slow as it likes."""
    needs = {name: plugins.load("scorer", name).needs for name in plugins.names("scorer")}
    of_answers = {name for name, needed in needs.items() if needed == "answers"}
    of_texts = {"rouge_l", "edit_similarity", "sari", "first_character"}
    assert of_answers == {"number", "number_lm_eval", "math", "exact", "tests", *of_texts}
    assert needs.keys() - of_answers == {"choice", "lm_eval", "neg_bits_per_byte", "judge"}
    assert needs["judge"] == "base"  # the model's answers, beside the base's
