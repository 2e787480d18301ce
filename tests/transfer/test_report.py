"""The report's arithmetic, by hand."""

from __future__ import annotations

from cl_graft.transfer import select
from cl_graft.transfer.report import histogram, markdown, summary, why_no_pair


def test_few_values_have_a_bin_each() -> None:
    assert histogram([1.0, 0.0, 1.0]) == [
        {"from": 0.0, "to": 0.0, "answers": 1},
        {"from": 1.0, "to": 1.0, "answers": 2},
    ]


def test_many_values_have_ten_equal_bins() -> None:
    """0, 1, ..., 20: bins of two, and the last holds both its bounds."""
    found = histogram([float(value) for value in range(21)])
    assert [b["answers"] for b in found] == [2] * 9 + [3]
    assert [(b["from"], b["to"]) for b in found] == [(2.0 * i, 2.0 * i + 2) for i in range(10)]


def test_counts_of_two_sources() -> None:
    def said(source: str, responses: list[str], finished: list[bool]) -> dict:
        tokens = [len(text) + 1 for text in responses]
        return {"source": source, "responses": responses, "tokens": tokens, "finished": finished}

    samples = [said("a", ["5", "5", "44"], [True, True, False]), said("b", ["", "5"], [True, True])]
    rewards = [
        {"by": "rule", "rewards": [1.0, 1.0, 0.0]},
        {"by": "reward model", "rewards": [-2.0, 0.5]},
    ]
    dropped = {"a": {}, "b": {select.FEW: 1}}
    found = summary(samples, rewards, [{"source": "a"}], [{"source": "a"}], dropped, 1, 2)
    a, b = found["sources"]["a"], found["sources"]["b"]
    assert (a["answers"], a["different"], a["empty"], a["cut off"]) == (3, 2, 0, 1)
    assert (a["right"], a["reward"], a["sft"], a["dpo"]) == (2 / 3, None, 1, 1)
    assert a["characters"] == {"mean": 4 / 3, "max": 2} and a["tokens"] == {"mean": 7 / 3, "max": 3}
    assert (b["empty"], b["right"], b["reward"], b["sft"]) == (1, None, -0.75, 0)
    assert found["duplicate prompts"] == 2
    assert why_no_pair(found) == "1 fewer than two different answers"
    lines = markdown(found).splitlines()
    assert "| a | 3 | 2 | 0 | 1 | 66.7 | – | 1.3 | 2 | 2.3 | 3 | 1 | 1 |" in lines
    assert "| b | 2 | 2 | 1 | 0 | – | -0.75 | 0.5 | 1 | 1.5 | 2 | 0 | 0 |" in lines
    assert "| -2 | 1 |" in lines
