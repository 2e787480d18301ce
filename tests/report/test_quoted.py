"""Published figures stand beside a stream that is theirs, and beside no other."""

from __future__ import annotations

import json
import re

import pytest

from cl_graft import plugins
from cl_graft.report.quoted import FILE, published, quoted
from cl_graft.report.tables import write_tables
from tests.report.test_tables import cell

SETTINGS = json.loads(FILE.read_text())
ORDER_1 = ["dbpedia", "amazon", "yahoo", "agnews"]


def of(scenario, tasks):
    grid = [[0.5] * len(tasks) for _ in range(len(tasks) + 1)]
    config = {"scenario": scenario, "strategy": "lora"}
    return cell("lora", grid, tasks=list(tasks), scenario=scenario, config=config)


def test_a_figure_of_one_order_is_of_this_order_and_a_mean_of_any():
    methods = {
        order: [r["op"] for r in published(of("standard_cl", order))]
        for order in map(tuple, (ORDER_1, ORDER_1[::-1]))
    }
    first, other = methods.values()
    assert 78.37 in first and 75.8 in first
    assert 78.37 not in other and 75.8 in other
    assert not published(of("standard_cl", ORDER_1[:2])), "another stream"
    assert not published(of("mini", ["math", "code"])) and published(
        of("math_code", ["math", "code"])
    )


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: f"{s['scenario']}-{s['ordered']}")
def test_every_setting_is_a_stream_that_is_here_and_names_its_source(setting):
    made = plugins.load("scenario", setting["scenario"])
    orders = getattr(__import__(made.__module__, fromlist=["x"]), "ORDERS", None)
    if orders:
        known = [list(order) for order in orders.values()]
        held = known if setting["ordered"] else [sorted(order) for order in known]
        assert (setting["tasks"] if setting["ordered"] else sorted(setting["tasks"])) in held
    for row in setting["rows"]:
        assert {*row} == {"method", "model", "op", "bwt", "setting", "source"}
        assert 0 < row["op"] < 100 and re.search(r"arXiv \d{4}\.\d{5}|O-LoRA, logs", row["source"])


def test_the_table_says_that_it_is_quoted(tmp_path):
    cells = [of("standard_cl", ORDER_1)]
    (table,) = quoted(cells)
    assert table.title.startswith("Quoted: ") and "not measured here" in table.note
    write_tables(cells, tmp_path)
    (file,) = tmp_path.glob("*-quoted.md")
    assert (
        "| O-LoRA | T5-large | 78.37 | – | 7,600 test rows a task | cmnfriend/O-LoRA, logs of order 1 |"
        in file.read_text()
    )
