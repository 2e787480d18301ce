"""Scorers as plug-ins: what one is given and may return, its options and consent, where it is found, what it is known by."""

from __future__ import annotations

import json
import math
import re
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from cl_graft import plugins
from cl_graft.errors import CLGraftError, UnknownName
from cl_graft.evaluation.outcomes import Outcomes, scored_by, scorers_are_as_then
from cl_graft.evaluation.sandbox import CONSENT_VARIABLE, ConsentNeeded, Outcome
from cl_graft.evaluation.scorers import (
    Examinee,
    Scored,
    conventions,
    described,
    judge_of,
    resolved,
    score,
    scorer,
)
from cl_graft.evaluation.scorers import tests as programs
from cl_graft.store.digests import data_fingerprint
from cl_graft.task import Example, Scenario, Scoring, Task
from tests.command import Call, assert_refused
from tests.refusals import one_sentence

EXAMPLES = [Example("a", "10"), Example("b", "20"), Example("c", "x")]


def examinee(answers: Sequence[str], **changed: Any) -> Examinee:
    return Examinee(None, None, 32, 128, given=answers, **changed)  # type: ignore[arg-type]


# --- what a scorer is ---


def test_one_answer_at_a_time_or_all_together() -> None:
    @scorer()
    def length(example, answer, *, factor: float = 1.0):
        return factor * len(answer)

    @scorer(together=True)
    def rank(examples, answers):
        return [
            Scored(sorted(answers).index(a), a.upper(), e.prompt)
            for e, a in zip(examples, answers, strict=True)
        ]

    said = examinee(["bb", "a", ""])
    assert length.score(said, EXAMPLES) == [Scored(2, "bb"), Scored(1, "a"), Scored(0, "")]
    assert [s.score for s in length.score(said, EXAMPLES, factor=0.5)] == [1, 0.5, 0]
    assert rank.score(said, EXAMPLES) == [
        Scored(2, "BB", "a"),
        Scored(1, "A", "b"),
        Scored(0, "", "c"),
    ]


@pytest.mark.parametrize("needs", ["likelihoods", "model"])
def test_one_that_needs_no_answer_is_given_the_examinee(needs: Any) -> None:
    @scorer(needs=needs)
    def limit(examinee, examples):
        return [examinee.max_length] * len(examples)

    assert limit.score(examinee([]), EXAMPLES) == [Scored(128, "")] * 3


def test_answers_are_generated_once_for_all_scorers_and_not_where_none_needs_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def answers(self: Examinee, examples: Sequence[Example]) -> Sequence[str]:
        asked.append(self.given is None)
        return self.given if self.given is not None else [e.completion for e in examples]

    monkeypatch.setattr(Examinee, "answers", answers)
    model = Examinee(None, None, 32, 128)  # type: ignore[arg-type]
    assert score(model, EXAMPLES, ["number", "exact"])["exact"] == [
        Scored(1, e.completion) for e in EXAMPLES
    ]
    assert asked.count(True) == 1
    assert score(model, [], ["choice"]) == {"choice": []}
    assert asked.count(True) == 1


@pytest.mark.parametrize(
    ("returned", "told"),
    [
        ([1.0], "gives 1 scores for 3 examples"),
        ([1.0, math.nan, 0.0], "gives nan for the answer 'b'"),
        ([1.0, "right", 0.0], "gives 'right' for the answer 'b'"),
        ([1.0, None, 0.0], "gives None for the answer 'b'"),
        ([1.0, Scored(math.inf, "b"), 0.0], "gives inf for the answer 'b'"),
    ],
)
def test_scores_that_are_none_are_refused(returned: list, told: str) -> None:
    @scorer(together=True)
    def odd(examples, answers):
        return returned

    message = one_sentence(lambda: odd.score(examinee(["a", "b", "c"]), EXAMPLES))
    assert "the scorer 'odd'" in message and told in message


@pytest.mark.parametrize(
    "text", ["mine = 3", "def mine(example, answer): return 1", "class mine: score = needs = 1"]
)
def test_what_is_no_scorer_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "mine.py").write_text(text)
    message = one_sentence(lambda: plugins.load("scorer", str(tmp_path / "mine.py")))
    assert "'mine' is no scorer; make it one by @scorer()" in message


def test_base_and_private_files_are_none() -> None:
    assert plugins.names("scorer") == [
        "choice",
        "edit_similarity",
        "exact",
        "first_character",
        "judge",
        "lm_eval",
        "math",
        "neg_bits_per_byte",
        "number",
        "number_lm_eval",
        "rouge_l",
        "sari",
        "tests",
    ]
    with pytest.raises(UnknownName):
        plugins.load("scorer", "base")


# --- options ---


def test_options_are_read_off_the_signature_and_given_by_a_scoring() -> None:
    number = plugins.load("scorer", "number")
    assert plugins.options(number) == {"tolerance": 0.0}
    near = Scoring("number", {"tolerance": 0.5})
    found = score(examinee(["10.5", "20.51", "x"]), EXAMPLES, ["number", near])
    assert [s.score for s in found["number"]] == [0, 0, 0]
    assert [s.score for s in found["number(tolerance=0.5)"]] == [1, 0, 0]


@pytest.mark.parametrize(
    ("options", "told"),
    [({"tolerence": 1}, "did you mean tolerance"), ({"tolerance": "much"}, "should be float")],
)
def test_wrong_options_are_refused(options: dict[str, Any], told: str) -> None:
    message = one_sentence(
        lambda: score(examinee(["1"] * 3), EXAMPLES, [Scoring("number", options)])
    )
    assert told in message


def test_a_scoring_is_called_by_its_scorer_and_what_was_set() -> None:
    assert Scoring("number").label == "number"
    assert Scoring("./folder/mine.py", {"b": 1, "a": "x"}).label == "mine(a=x, b=1)"
    assert Scoring("./sums.py:own").label == "own"
    task = Task("t", [], [], Scoring("number", {"tolerance": 1}), also=("number",))
    assert task.metrics == ("number(tolerance=1)", "number")
    with pytest.raises(CLGraftError, match="two scorers of one name"):
        Task("t", [], [], "number", also=("number",))


def stream(*scorings: str | Scoring) -> Scenario:
    return Scenario("s", (Task("t", [], [], scorings[0], also=scorings[1:]),))


def test_options_are_part_of_the_data_s_fingerprint() -> None:
    plain = data_fingerprint(stream("number"))
    assert plain == data_fingerprint(stream(Scoring("number")))
    named = Scoring("number", {"tolerance": 1}, "number")
    assert plain != data_fingerprint(stream(named))
    made, used = resolved(stream("number"), "mini", {"number": {"tolerance": 1}})
    assert data_fingerprint(made) == data_fingerprint(stream(named))
    assert (made.tasks[0].metrics, used) == (("number",), {"number"})


# --- what cannot be scored ---


@pytest.mark.parametrize(
    ("completion", "flaw"),
    [
        ("no idea", "no number in its completion 'no idea'"),
        ("3 or 4", "several numbers (3, 4) at the end of its completion '3 or 4', not one"),
        ("#### 3, 5", "several numbers (3, 5)"),
        ("it is 12:30", "several numbers (12, 30)"),
        (r"so \boxed{x}", "no number"),
    ],
)
def test_a_reference_that_is_not_one_number_is_refused_when_it_is_loaded(
    completion: str, flaw: str
) -> None:
    examples = [Example("a", "6+12=18"), Example("b", completion)]
    made = Scenario("s", (Task("t", [], examples, "exact", also=("number",)),))
    message = one_sentence(lambda: resolved(made, "mini", {}))
    assert message.startswith("test example 1 (from 0) of task 't' cannot be scored by 'number'")
    assert flaw in message


@pytest.mark.parametrize(
    "completion",
    ["7", "-3/4", "50%", "6+12=18", "#### 1,200", "2 and 3 are 5.\n#### 5", r"\boxed{1\frac12}"],
)
def test_one_number_is_a_reference_in_any_spelling(completion: str) -> None:
    assert plugins.load("scorer", "number").flaw(Example("a", completion)) == ""


# --- conventions ---


def test_every_scorer_of_ours_says_what_its_figures_are_to_be_compared_with() -> None:
    for name in plugins.names("scorer"):
        options = {"judge": "nano-llama"} if name == "judge" else {}
        assert described(Scoring(name, options))["convention"], name
    tasks = (Task("t", [], [], "number", also=("number:lm-eval",)), Task("u", [], [], "exact"))
    assert conventions(Scenario("s", tasks)) == {
        "t": {
            "number": "the number after the first ####, else in the last box, else the last number",
            "number:lm-eval": "lm-eval 0.4.13, gsm8k strict-match",
        },
        "u": {"exact": "the whole text, capital and small letters told apart"},
    }


# --- consent ---


def test_without_consent_nothing_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CONSENT_VARIABLE, raising=False)

    @scorer(consent=True)
    def runs(example, answer):
        raise AssertionError("it was run")

    with pytest.raises(ConsentNeeded, match="the scorer 'runs' runs code .*--allow-code-execution"):
        runs.score(examinee(["a"] * 3), EXAMPLES)


def test_who_judges_an_answer_in_words() -> None:
    assert judge_of(Scoring("number", {"tolerance": 1})) == Scoring("number", {"tolerance": 1})
    assert judge_of(Scoring("choice")) == Scoring("exact")
    assert judge_of(Scoring("neg_bits_per_byte")) is None


# --- programs, a few at a time ---


@pytest.fixture
def outcomes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Programs are not run but told how they end: `END`, or `first,second` by attempt. Yields those that were run."""
    ran: list[str] = []
    lock = threading.Lock()

    def run(program: str, tests: Any, setup: str) -> Outcome:
        with lock:
            ends = program.split(",")
            reason = ends[min(ran.count(program), len(ends) - 1)]
            ran.append(program)
        return Outcome(reason == "passed", reason)

    monkeypatch.setattr(programs, "run_asserts", run)
    monkeypatch.setattr(programs, "_verdicts", {})
    yield ran


def test_a_time_out_is_tried_again_and_never_remembered(outcomes: list[str]) -> None:
    def scored() -> list[Scored]:
        said = ["timeout", "passed", "timeout,passed", "passed", "error"]
        example = Example("p", "", ("assert True",))
        return score(examinee(said, allow_code=True), [example] * 5, ["tests"])["tests"]

    assert [s.score for s in scored()] == [0, 1, 1, 1, 0]
    assert sorted(outcomes) == ["error", "passed", *["timeout"] * 2, *["timeout,passed"] * 2]
    assert [s.note for s in scored()] == ["timeout", "passed", "passed", "passed", "error"]
    assert outcomes.count("timeout") == 4 and len(outcomes) == 8


def test_real_programs_end_the_same_in_the_same_order() -> None:
    """One after the other, as a plain loop, and a few at a time."""
    from cl_graft.evaluation.sandbox import run_asserts

    bodies = ["return x", "return 2 * x", "raise KeyError(x)", "import os; os._exit(0)"] * 2
    said = [f"def f(x):\n    {body}\n# {i}" for i, body in enumerate(bodies)]
    examples = [Example("p", "", (f"assert f({i}) == {2 * i}",)) for i in range(1, 9)]
    alone = [run_asserts(a, e.tests) for a, e in zip(said, examples, strict=True)]
    found = score(examinee(said, allow_code=True), examples, ["tests"])["tests"]
    assert found == [
        Scored(float(o.passed), a, f"{o.reason} {o.detail}".strip())
        for o, a in zip(alone, said, strict=True)
    ]
    assert [s.score for s in found] == [0, 1, 0, 0] * 2


# --- where it is found, and what it is known by ---

MINE = '''"""Half right."""
from cl_graft.evaluation.scorers import scorer


@scorer(identity={"judge": 1}, convention="a half, here {half}")
def mine(example, answer, *, half: float = 0.5):
    """half: the score."""
    return half
'''


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(MINE)
    return tmp_path / "mine.py"


def test_by_path(mine: Path) -> None:
    assert score(examinee(["a"]), EXAMPLES[:1], [str(mine)]) == {"mine": [Scored(0.5, "a")]}
    assert plugins.about("scorer", str(mine)) == "Half right."
    assert described(Scoring(str(mine))) == {
        "scorer": "mine",
        "convention": "a half, here 0.5",
        "options": {"half": 0.5},
        "identity": {"judge": 1},
        "sources": plugins.sources_of(mine),
    }


def test_at_an_entry_point(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = mine.parent / "far-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: far\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[cl_graft.scorers]\nfar_mine = mine:mine\n")
    monkeypatch.syspath_prepend(str(mine.parent))
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    assert "far_mine" in plugins.names("scorer")
    assert plugins.origin("scorer", "far_mine") == "far 1.0"
    assert plugins.sources("scorer", "far_mine") == plugins.sources_of(mine)
    assert score(examinee(["a"]), EXAMPLES[:1], ["far_mine"])["far_mine"] == [Scored(0.5, "a")]
    sys.modules.pop("mine", None)


def test_in_a_scenario_s_own_file_before_all_others(tmp_path: Path) -> None:
    host = tmp_path / "host.py"
    body = "from cl_graft.evaluation.scorers.exact import exact\n"
    body += "def host(*, seed, data_dir=None): ...\n"
    host.write_text(MINE.replace("def mine", "def number") + body)
    (tmp_path / "beside.py").write_text(MINE.replace("mine", "beside"))
    made, used = resolved(stream("number", "exact", "beside.py"), str(host), {})
    own, exact, beside = made.tasks[0].scorings
    assert own.name == f"{host}:number" and plugins.load("scorer", own.name).identity
    assert plugins.sources("scorer", own.name) == plugins.sources_of(host)
    assert (exact.name, beside.name) == ("exact", str(tmp_path / "beside.py"))
    assert made.tasks[0].metrics == ("number", "exact", "beside")
    assert used == {"number", "exact", "beside"}


def test_an_unknown_one_is_answered_with_the_nearest() -> None:
    with pytest.raises(UnknownName, match="no scorer named 'numbr'; did you mean number"):
        resolved(stream("numbr"), "mini", {})


def test_outcomes_are_kept_under_all_that_a_scorer_is(mine: Path, nano: tuple[Any, Any]) -> None:
    def key(*scorings: str | Scoring) -> str:
        task = stream(*scorings).tasks[0]
        return Outcomes(mine.parent).file("weights", nano[1], task).name

    keys = [
        key(str(mine)),
        key(Scoring(str(mine), {"half": 0.25})),
        key(Scoring(str(mine), {}, "x")),
    ]
    then = scored_by(stream(str(mine)).tasks[0])
    assert json.loads(json.dumps(then)) == then and scorers_are_as_then(then)
    mine.write_text(MINE + "# edited\n")
    assert not scorers_are_as_then(then)
    keys.append(key(str(mine)))
    mine.write_text(MINE.replace('"judge": 1', '"judge": 2'))
    keys.append(key(str(mine)))
    assert len(set(keys)) == 5
    mine.unlink()
    assert not scorers_are_as_then(then)


def test_what_a_scorer_of_ours_is_made_of() -> None:
    """Its file alone: not the one whose name its import of the standard library shares."""
    for name in plugins.names("scorer"):
        assert list(plugins.sources("scorer", name)) == [f"cl_graft/evaluation/scorers/{name}.py"]


# --- by the command line ---

STREAM = '''
from cl_graft.evaluation.scorers import scorer
from cl_graft.task import Example, Scenario, Scoring, Task, Training


@scorer(consent={consent})
def length(example, answer, *, per: float = 100.0):
    """per: characters that are worth 1."""
    return len(example.prompt + answer) / per


def own(*, seed, data_dir=None):
    examples = [Example(f"{{a}}+1=", f"{{a + 1}}") for a in range(8)]
    near = Scoring("number", {{"tolerance": 1000.0}})
    recipe = Training(steps=2, batch=4, max_length=32)
    task = Task("one", examples, examples, "{name}", also=(near,), max_new_tokens=4, training=recipe)
    return Scenario("own", (task,))
'''
COMMAND = ["--model", "nano-llama", "--wandb", "off", "--out", "out"]
RUN = ["run", "--scenario", "own.py", "--strategy", "sequential", *COMMAND]


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(CONSENT_VARIABLE, raising=False)
    Path("own.py").write_text(STREAM.format(consent=False, name="length"))
    return Path("own.py")


def test_a_scenario_with_a_scorer_of_its_own_is_run(own: Path, call: Call) -> None:
    assert call(*RUN).code == 0
    assert call(*RUN, "--set", "length.per=50").code == 0
    results = [json.loads(f.read_text()) for f in Path("out").glob("*/result.json")]
    one, two = sorted(results, key=lambda result: len(result["label"]))
    assert one["conventions"] == {
        "one": {
            "length": "",
            "number(tolerance=1000.0)": "the number after the first ####, else in the last box, else the last number",
        }
    }
    assert (one["label"], two["label"]) == ("sequential", "sequential(scoring.length.per=50)")
    assert one["extra_matrices"].keys() == {"number(tolerance=1000.0)"}
    for row, twice in zip(one["matrix"], two["matrix"], strict=True):
        assert row[0] > 0 and twice[0] == pytest.approx(2 * row[0])
    cells = [json.loads(f.read_text()) for f in Path("out").glob("*/cell.json")]
    for cell in cells:
        assert cell["sources"]["scorers"].keys() == {"own.py:length", "number"}
        assert cell["sources"]["scorers"]["own.py:length"] == plugins.sources_of(own)


def test_a_cell_of_an_edited_scorer_is_refused(own: Path, call: Call) -> None:
    Path("mine.py").write_text(MINE)
    own.write_text(STREAM.format(consent=False, name="./mine.py"))
    assert call(*RUN).code == 0
    Path("mine.py").write_text(MINE + "# edited\n")
    assert_refused(call(*RUN), "another mine.py than there is now", "--out")


@pytest.mark.parametrize(
    ("name", "words", "told"),
    [
        ("lenght", (), ("no scorer named 'lenght'",)),
        ("numbr", (), ("no scorer named 'numbr'", "number")),
        ("./none.py", (), ("there is no file ./none.py",)),
        ("length", ("--set", "length.pre=3"), ("'pre'", "per")),
        ("length", ("--set", "length.per=much"), ("length.per='much'", "float")),
        ("length", ("--set", "lengt.per=3"), ("'lengt'", "did you mean length")),
        ("length", ("--set", "choice.x=3"), ("'choice'", "length", "number")),
    ],
)
def test_a_wrong_name_or_option_is_refused_before_anything_is_computed(
    own: Path, call: Call, name: str, words: tuple[str, ...], told: tuple[str, ...]
) -> None:
    own.write_text(STREAM.format(consent=False, name=name))
    assert_refused(call(*RUN, *words), *told)
    assert not Path("out").exists()


def test_so_it_is_by_validate(own: Path, call: Call) -> None:
    text = "scenarios: [own.py]\nstrategies: [sequential]\nmodels: [nano-llama]\nscoring: {length.pre: 3}\n"
    Path("sweep.yaml").write_text(text)
    assert_refused(call("validate", "sweep.yaml"), "no option of scorer length named 'pre'", "per")
    Path("sweep.yaml").write_text(text.replace("pre", "per"))
    done = call("validate", "sweep.yaml")
    assert done.code == 0 and "1 cells" in done.out


def test_a_scorer_that_needs_consent_is_refused_without(own: Path, call: Call) -> None:
    own.write_text(STREAM.format(consent=True, name="length"))
    assert_refused(call(*RUN), "scoring task 'one' runs code", "--allow-code-execution")
    assert not Path("out").exists()


def test_scorers_are_listed(own: Path, call: Call) -> None:
    Path("mine.py").write_text(MINE)
    done = call("list", "scorers", "--verbose")
    assert done.code == 0
    assert re.search(
        r"^number +cl_graft/evaluation/scorers/number\.py +1 if the final", done.out, re.M
    )
    assert "    --set number.tolerance=0.0\n" in done.out
    done = call("list", "scorers", "./mine.py", "--verbose")
    assert (
        "Half right." in done.out and "    --set mine.half=0.5\n    half: the score.\n" in done.out
    )
