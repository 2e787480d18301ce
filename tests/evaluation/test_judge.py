"""The scorer `judge`: both orders, ties, grades, cost, what is kept; win rates at equal length."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from scipy.special import expit

from cl_graft.errors import CLGraftError
from cl_graft.evaluation import judges
from cl_graft.evaluation.endpoint import EndpointError
from cl_graft.evaluation.examiner import Examiner, Group
from cl_graft.evaluation.outcomes import Outcomes
from cl_graft.evaluation.scorers import Examinee, Scored, judge_of, score
from cl_graft.evaluation.win_rate import Compared, length_controlled
from cl_graft.skillpack.codecs.exact import exact
from cl_graft.skillpack.format.file import SkillPack
from cl_graft.skillpack.live.grafted import Grafted
from cl_graft.task import Example, Scoring, Task
from tests.openai_server import late, running

EXAMPLES = [Example(f"say {n}", "right") for n in range(4)]


def between(text: str, name: str) -> str:
    return text.partition(f"<{name}>\n")[2].partition(f"\n</{name}>")[0]


def says(choose: Callable[[str, str], str]) -> Callable[[str, dict[str, Any]], Any]:
    """A judge whose words follow from the two answers in their places (the second empty where there is one)."""

    def answer(path: str, body: dict[str, Any]) -> Any:
        assert path == "/v1/chat/completions" and body["temperature"] == 0
        (turn,) = body["messages"]
        text = turn["content"]
        one = between(text, "answer A") or between(text, "answer")
        said = choose(one, between(text, "answer B"))
        usage = {"prompt_tokens": len(text.split()), "completion_tokens": 3}
        return {"choices": [{"message": {"role": "assistant", "content": said}}], "usage": usage}

    return answer


def longer(a: str, b: str) -> str:
    if len(a) == len(b):
        return "Neither [[A]] nor [[B]]: [[C]]"
    return "I think so. [[A]]" if len(a) > len(b) else "[[B]]"


def judged(
    url: str,
    answers: list[str],
    base: list[str] | None = None,
    folder: Path | None = None,
    **more: Any,
) -> list[Scored]:
    examinee = Examinee(
        None,
        None,
        8,
        64,
        given=answers,
        base_answers=base,
        folder=folder,  # type: ignore[arg-type]
    )
    options = {"judge": url, "model": "j"} | more
    (found,) = score(examinee, EXAMPLES, [Scoring("judge", options)]).values()
    return found


def test_each_pair_is_judged_in_both_orders() -> None:
    with running(says(longer)) as server:
        found = judged(server.url, ["long", "s", "same", "like"], ["s", "long", "size", "like"])
        assert [one.score for one in found] == [1, 0, 0.5, 0.5]
        told = [Compared.of(one.note) for one in found]
        assert [(t.first, t.second, t.length, t.other, t.calls) for t in told if t] == [
            ("won", "won", 4, 1, 2),
            ("lost", "lost", 1, 4, 2),
            ("tied", "tied", 4, 4, 2),
            ("tied", "tied", 4, 4, 0),  # nobody is asked of two answers that are alike
        ]
        assert len(server.asked) == 6 and told[0] and told[0].written == 6
        sizes = [len(body["messages"][0]["content"].split()) for _, body, _ in server.asked]
        assert sum(t.read for t in told if t) == sum(sizes)
    with running(says(lambda a, b: "[[A]]")) as server:  # it likes the first place
        found = judged(server.url, ["x"] * 4, ["y"] * 4)
        assert {one.score for one in found} == {0.5}
        assert Compared.of(found[0].note)[:2] == ("won", "lost")  # type: ignore[index]
    tied_then_won = says(lambda a, b: "[[C]]" if a == "x" else "[[B]]")
    with running(tied_then_won) as server:
        assert {one.score for one in judged(server.url, ["x"] * 4, ["y"] * 4)} == {0.75}


def test_the_base_itself_ties_and_an_answer_alone_is_graded() -> None:
    with running(says(lambda a, b: f"<think>[[9]]</think> [[{len(a)}]]")) as server:
        assert [one.score for one in judged(server.url, ["a", "b", "c", "d"])] == [0.5] * 4
        assert not server.asked
        alone = judged(server.url, ["a", "bb", "ccc", "d" * 10], mode="single")
        assert [one.score for one in alone] == [0.1, 0.2, 0.3, 1.0]
        assert alone[3].note.startswith("grade 10; 1 call, ") and alone[3].answer == "d" * 10
        turns = [message["content"] for asked in server.asked for message in asked[1]["messages"]]
        assert (
            sorted(f"say {i}" in turn for i in range(4) for turn in turns)
            == [False] * 12 + [True] * 4
        )
        assert not any("right\n" in turn for turn in turns)
        judged(server.url, ["a"] * 4, mode="single", reference=True)
        assert "<reference>\nright\n</reference>" in server.asked[-1][1]["messages"][0]["content"]


def test_what_was_judged_is_kept_by_all_that_decides_it(tmp_path: Path) -> None:
    left = [3]

    def tires(a: str, b: str) -> str:
        left[0] -= 1
        return longer(a, b) if left[0] >= 0 else "As a language model I like\nboth."

    answers, base = ["long", "s", "a", "bb"], ["s", "long", "bb", "a"]
    with running(says(tires)) as server:
        with pytest.raises(CLGraftError) as raised:
            judged(server.url, answers, base, tmp_path)
        words = str(raised.value)
        assert (
            "says 'As a language model I like both.' where it should end with one of [[A]]" in words
        )
        assert "what it judged before is kept; choose another by judge.model" in words
        assert len(list((tmp_path / "judgements").iterdir())) == 3
        left[0], before = 100, len(server.asked)
        found = judged(server.url, answers, base, tmp_path)
        assert [one.score for one in found] == [1, 0, 0, 1] and len(server.asked) - before == 5
        before = len(server.asked)
        assert judged(server.url, answers, base, tmp_path) == found  # costs are those of then
        assert len(server.asked) == before
        judged(server.url, answers, base, tmp_path, model="another")
        judged(server.url, answers, base, tmp_path, reference=True)
        judged(server.url, ["other"] * 4, base, tmp_path)
        assert len(server.asked) == before + 3 * 8
        for file in (tmp_path / "judgements").iterdir():
            file.write_text('{"said": "[[A')  # torn
        assert judged(server.url, answers, base, tmp_path) == found


def test_words_without_a_verdict_count_half_where_that_is_asked(tmp_path: Path) -> None:
    with running(says(lambda a, b: "[[A]] or [[D]]" if b == "y" else "hm")) as server:
        found = judged(server.url, ["x"] * 4, ["y"] * 4, tmp_path, unclear="half")
        assert [one.score for one in found] == [0.75] * 4
        assert found[0].note.startswith("won first, unclear second")
        asked = len(server.asked)
        with pytest.raises(CLGraftError, match="set judge.unclear=half"):
            judged(server.url, ["x"] * 4, ["y"] * 4, mode="single")
        alone = judged(server.url, ["x"] * 4, mode="single", unclear="half")
        assert {one.score for one in alone} == {0.5} and len(server.asked) > asked


@pytest.mark.parametrize(
    "answer",
    [
        {"choices": []},
        {"choices": [{"message": None}]},
        {"choices": [{"message": {"content": 7}}]},
        b"no",
    ],
)
def test_a_judge_that_answers_something_else(answer: Any) -> None:
    no_answer = pytest.raises(EndpointError, match="no answer of an OpenAI-compatible server")
    with running(lambda path, body: answer) as server, no_answer:
        judged(server.url, ["x"] * 4, ["y"] * 4)


def test_a_judge_that_is_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judges, "SECONDS", 0.2)
    with running(late(1)) as server, pytest.raises(EndpointError, match="did not answer within"):
        judged(server.url, ["x"] * 4, ["y"] * 4)


def test_options_that_do_not_go_together() -> None:
    for options, words in [
        ({}, "has nobody to judge; set judge.judge to"),
        ({"judge": "http://localhost:8000/v1"}, "names a server and no model; set judge.model"),
        (
            {"judge": "nano-llama", "model": "x"},
            "is a model of a server, and judge.judge=nano-llama",
        ),
        ({"judge": "nona-llama"}, "no model named 'nona-llama'; did you mean nano-llama"),
        ({"judge": "file://x", "model": "x"}, "no address of an OpenAI-compatible server"),
    ]:
        with pytest.raises(CLGraftError, match=words):
            judges.identity(**{"judge": "", "model": ""} | options)
    assert judge_of(Scoring("judge")) is None  # it has no base to compare a sampled answer with


def test_a_model_of_this_machine_judges_by_the_likeliest_verdict(tmp_path: Path) -> None:
    found = judged("nano-llama", ["x"] * 4, ["y"] * 4, tmp_path, model="")
    told = [Compared.of(one.note) for one in found]
    assert all(t and t.calls == 2 and t.read > 100 and not t.written for t in told)
    assert {one.score for one in found} <= {0, 0.25, 0.5, 0.75, 1}
    kept = sorted((tmp_path / "judgements").iterdir())
    times = [file.stat().st_mtime_ns for file in kept]
    assert (
        len(kept) == 8 and judged("nano-llama", ["x"] * 4, ["y"] * 4, tmp_path, model="") == found
    )
    assert [file.stat().st_mtime_ns for file in kept] == times
    (alone, *_) = judged("nano-llama", ["x"] * 4, folder=tmp_path, model="", mode="single")
    assert alone.note.startswith("grade ") and alone.score * 10 in range(1, 11)


def test_answers_of_packs_are_compared_with_the_bases(
    nano: tuple[Any, Any], tmp_path: Path
) -> None:
    """Also where different packs answer parts of a task, and where the base was not measured before."""
    model, tokenizer = nano
    delta = {"lm_head.weight": exact(0.1 * model.lm_head.weight.detach().roll(1, 0))}
    examples = [Example(f"{n + 17} * 2 =", "1") for n in range(4)]
    seen: list[tuple[str, str]] = []

    def notes(a: str, b: str) -> str:
        seen.append((a, b))
        return "[[A]]"

    with running(says(notes)) as server:
        scoring = Scoring("judge", {"judge": server.url, "model": "j"}, "judged")
        task = Task("t", examples, examples, "exact", also=(scoring,), max_new_tokens=8)
        examiner = Examiner(Grafted(model), tokenizer, Outcomes(tmp_path, "c"), False)
        pack = SkillPack(delta, "t", "m", {}, examiner.grafted.base, {})
        half = [Group([pack], [0, 3]), Group([], [1, 2])]
        mixed = examiner.measure(task, half, 1)["judged"]
        base = examiner.measure(task, [Group([], range(4))], 0)["judged"]
        tuned = examiner.measure(task, [Group([pack], range(4))], 1)["judged"]
    own, other = [one.answer for one in tuned], [one.answer for one in base]
    assert own != other and [one.answer for one in mixed] == [own[0], *other[1:3], own[3]]
    assert {one.score for one in base} == {0.5}
    assert {*seen} == {
        p for a, b in zip(own, other, strict=True) if a != b for p in ((a, b), (b, a))
    }
    lengths = [Compared.of(one.note)[2:4] for one in tuned]  # type: ignore[index]
    assert lengths == [(len(a), len(b)) for a, b in zip(own, other, strict=True)]


def test_a_win_rate_at_equal_length() -> None:
    """Fitted on preferences that follow the model exactly, the regression gives back what they were made of."""
    random = Random(0)
    lengths = [random.randrange(10, 900) for _ in range(4000)]
    others = [random.randrange(10, 900) for _ in range(4000)]
    apart = [a - b for a, b in zip(lengths, others, strict=True)]
    spread = math.sqrt(sum(d * d for d in apart) / 4000 - (sum(apart) / 4000) ** 2)
    won = [float(expit(0.4 + 1.5 * math.tanh(d / spread))) for d in apart]
    assert length_controlled(won, lengths, others) == pytest.approx(expit(0.4), abs=1e-3)
    assert sum(won) / 4000 != pytest.approx(expit(0.4), abs=0.01)
    # whoever wins by length alone wins half at equal length
    by_length = [float(d > 0) for d in apart]
    assert length_controlled(by_length, lengths, others) == pytest.approx(0.5, abs=0.02)
    swapped = length_controlled([1 - w for w in won], others, lengths)
    assert swapped == pytest.approx(1 - expit(0.4), abs=1e-3)


def test_win_rates_without_lengths_to_tell_apart() -> None:
    assert length_controlled([1, 1], [3, 9], [5, 5]) == 1 and length_controlled([0], [3], [5]) == 0
    assert length_controlled([1, 0, 0.5, 0.5], [7] * 4, [5] * 4) == 0.5
    for wrong in (([], [], []), ([1.0], [1], [1, 2])):
        with pytest.raises(ValueError, match="at least one preference"):
            length_controlled(*wrong)


def test_a_judge_in_a_cell(call: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "asks.py").write_text(
        "from cl_graft.task import Example, Scenario, Scoring, Task, Training\n\n\n"
        "def asks(*, seed, data_dir=None):\n"
        '    """Options: none."""\n'
        "    rows = [Example(f'{a} + {a} =', f' {2 * a}') for a in range(24)]\n"
        "    recipe = Training(steps=6, batch=4, learning_rate=3e-3)\n"
        "    task = Task('sums', rows[:20], rows[20:], 'exact', also=(Scoring('judge', label='judged'),),\n"
        "        max_new_tokens=4, training=recipe)\n"
        "    return Scenario('asks', (task,))\n"
    )
    words = [
        "run",
        "--scenario",
        str(tmp_path / "asks.py"),
        "--strategy",
        "sequential",
        "--wandb",
        "off",
    ]
    words += ["--model", "nano-llama", "--budget", "100%", "--out", str(tmp_path / "out")]
    assert "has nobody to judge; set judge.judge to" in call(*words).reason
    with running(says(longer)) as server:
        nobody = [*words, "--set", f"judge.judge={server.url}"]
        assert "names a server and no model; set judge.model" in call(*nobody).reason
    words += ["--set", "judge.model=j"]
    away = call(*words, "--set", f"judge.judge={server.url}").reason
    assert "cannot be reached" in away and not (tmp_path / "out").exists()
    with running(says(longer)) as server:
        words += ["--set", f"judge.judge={server.url}"]
        assert call(*words).code == 0
    result = json.loads(next((tmp_path / "out").glob("*/result.json")).read_text())
    (row0, row1) = result["extra_matrices"]["judged"]
    assert row0 == [0.5] and 0 <= row1[0] <= 1 and server.asked
    (equal0, equal1) = result["extra_matrices"]["judged at equal length"]
    assert equal0 == [0.5] and 0 <= equal1[0] <= 1
    told = result["conventions"]["sums"]["judged"]
    assert told == f"pairwise by {server.url} j, temperature 0"
