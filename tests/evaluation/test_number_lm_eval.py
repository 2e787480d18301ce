"""`number:lm-eval` is lm-eval's task gsm8k: by hand, on what lm-eval 0.4.13 said of 320 answers, and beside it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cl_graft import plugins
from cl_graft.evaluation.scorers import Examinee, score
from cl_graft.evaluation.scorers.number_lm_eval import IGNORED, STOPS, extracted, number_lm_eval
from cl_graft.task import Example, Scoring

# answer, reference, strict-match: extracted and right, flexible-extract: extracted and right
RECORDED = [
    json.loads(line)
    for line in Path(__file__).with_name("lm_eval_gsm8k.jsonl").read_text("utf-8").split("\n")
    if line
]


def cut(answer: str) -> str:
    for stop in STOPS:
        answer = answer.split(stop)[0]
    return answer


def test_it_is_what_lm_eval_said() -> None:
    assert len(RECORDED) == 320
    for answer, reference, strict, strict_right, flexible, flexible_right in RECORDED:
        example = Example("?", reference)
        assert extracted(cut(answer), "strict-match") == strict, answer
        assert extracted(cut(answer), "flexible-extract") == flexible, answer
        assert number_lm_eval.function(example, answer) == bool(strict_right), answer
        by = number_lm_eval.function(example, answer, filter="flexible-extract")
        assert by == bool(flexible_right), answer


@pytest.mark.parametrize(
    ("answer", "strict", "flexible", "ours"),
    [
        ("#### 18", 1, 1, 1),
        ("The answer is 18.", 0, 1, 1),
        ("#### $18", 0, 1, 1),
        ("####18", 0, 1, 1),
        ("#### 18.00", 0, 0, 1),
        ("so 18...", 0, 0, 1),  # the dots are the last run of digits and marks
        ("#### 18 and then 7", 1, 0, 1),
        ("18\n\nQuestion: 5 + 2?\nAnswer: 7", 0, 1, 1),
    ],
)
def test_by_hand(answer: str, strict: int, flexible: int, ours: int) -> None:
    examinee = Examinee(None, None, 8, 8, given=[answer])  # type: ignore[arg-type]
    by = ["number:lm-eval", Scoring("number:lm-eval", {"filter": "flexible-extract"}), "number"]
    found = score(examinee, [Example("?", "#### 18")], by)
    assert [outcomes[0].score for outcomes in found.values()] == [strict, flexible, ours]
    assert list(found) == [
        "number:lm-eval",
        "number:lm-eval(filter=flexible-extract)",
        "number",
    ]


def test_it_is_found_by_both_names() -> None:
    assert plugins.load("scorer", "number:lm-eval") is plugins.load("scorer", "number_lm_eval")
    assert plugins.sources("scorer", "number:lm-eval") == plugins.sources(
        "scorer", "number_lm_eval"
    )


def test_it_is_lm_eval_s_own_task() -> None:
    package = pytest.importorskip(
        "lm_eval", reason="lm-eval is not installed: pip install lm-eval==0.4.13"
    )
    import yaml
    from lm_eval.api.metrics import exact_match_hf_evaluate
    from lm_eval.filters.extraction import RegexFilter

    file = Path(package.__file__).parent / "tasks/gsm8k/gsm8k.yaml"
    task = yaml.safe_load(file.read_text("utf-8"))
    (metric,) = task["metric_list"]
    assert task["generation_kwargs"]["until"] == list(STOPS)
    assert metric["regexes_to_ignore"] == list(IGNORED)
    keys = ("regexes_to_ignore", "ignore_case", "ignore_punctuation")
    how = {key: metric[key] for key in keys}
    for answer, reference, *told in RECORDED:
        seen = []
        for filters in task["filter_list"]:
            given = {k: v for k, v in filters["filter"][0].items() if k != "function"}
            ((text,),) = RegexFilter(**given).apply([[cut(answer)]], [{}])
            right = exact_match_hf_evaluate([text], [reference], **how)["exact_match"]
            seen += [text, int(right)]
        assert seen == told, answer
