"""What is known of every method before it is run: by what it is listed, and what the README's table says."""

from __future__ import annotations

import pytest

from cl_graft import plugins
from cl_graft.strategy import Strategy
from cl_graft.strategy.facts import Form, facts
from tests import strategies_table
from tests.command import Call, assert_refused

NAMES = plugins.names("strategy")


def listed(call: Call, *words: str) -> list[str]:
    done = call("list", "strategies", *words)
    assert done.code == 0, done
    return [line.split()[0] for line in done.out.splitlines()]


def test_facts_of_methods_with_one_form_and_with_several() -> None:
    assert facts("joint").forms == (Form("", "latest", False, "base"),)
    assert facts("individual").forms == (Form("", "per_task", True, "base"),)
    assert facts("ewc").sources == ("1612.00796", "1805.06370")
    lora = facts("lora")
    assert lora.forms[0] == Form("trained_on", "latest", False, "model"), "its default comes first"
    assert {form.convention for form in lora.forms} == {"each", "trained_on", "summed", "merged"}
    assert lora.told == "no (`each`: yes)"
    assert lora.start == "model so far (`each`: base)"
    assert lora.keeps == "`latest` (`each`: `per_task`; `summed`: `sum`)"


@pytest.mark.parametrize("name", NAMES)
def test_where_a_method_starts_is_what_is_active_when_it_learns(name: str) -> None:
    """A class that decides that in code of its own says the same in what it declares."""
    kind = plugins.load("strategy", name)
    if "before_learning" not in vars(kind):
        assert kind.before_learning is Strategy.before_learning
        return
    for form in facts(name).forms:
        stub = object.__new__(kind)
        stub.keeps, stub.packs, stub.shared = form.keeps, ["a pack"], {}
        assert bool(stub.before_learning()) is (form.start == "model"), form


def test_strategies_are_listed_by_what_is_asked_of_one_form(call: Call) -> None:
    merged = listed(call, "--keeps", "merged")
    assert {"ties", "magmax"} <= {*merged} and "lora" not in merged
    assert {"lora", "sequential"} <= {*listed(call, "--untold", "--from", "model")}
    assert not {"lora", "ewc"} & {*listed(call, "--told", "--from", "model")}
    assert listed(call, "lora", "ewc", "ties", "--unbudgeted") == ["ewc", "ties"]
    assert "graftllm" in listed(call, "--source", "2505.18502")
    assert listed(call, "--keeps", "sum", "--told") == []
    assert len(listed(call, "--told")) < len(listed(call)) == len(NAMES)
    assert_refused(call("list", "scorers", "--told"), "scorers have none of these properties")


def test_a_table_of_strategies(call: Call) -> None:
    done = call("list", "strategies", "lora", "joint", "--markdown")
    head, _, lora, joint = done.out.strip().splitlines()
    assert head == "| strategy | keeps | told the task | trained from | budget | source |"
    assert joint == "| `joint` | `latest` | no | base | none | – |"
    assert "| held | [2106.09685](https://arxiv.org/abs/2106.09685) |" in lora


def test_the_readme_s_table_says_of_every_strategy_what_is_known_of_it() -> None:
    """`make readme` fills it in."""
    found = strategies_table.TABLE.search(strategies_table.README.read_text("utf-8"))
    assert found, "its head has other columns"
    said = strategies_table.rows(found[0])
    assert sorted(name for row in said for name in strategies_table.names(row)) == NAMES
    for row in said:
        assert row == strategies_table.filled(row)
