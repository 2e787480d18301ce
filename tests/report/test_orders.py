"""Averages over published orders: one line a strategy, with the interval that three orders leave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cl_graft.bench.report import make
from cl_graft.report import find, page
from cl_graft.report.orders import over_orders
from cl_graft.report.overview import overview
from cl_graft.report.tables import write_tables
from tests.report.test_overview import reported, right
from tests.report.test_tables import cell, rows_of

ORDERS = {
    1: ["dbpedia", "amazon", "yahoo", "agnews"],
    2: ["dbpedia", "amazon", "agnews", "yahoo"],
    3: ["yahoo", "amazon", "agnews", "dbpedia"],
}


def learned(label: str, order: int, op: float, seed: int = 0, **options: Any) -> dict[str, Any]:
    config = {
        "scenario": "standard_cl",
        "strategy": label,
        "seed": seed,
        "options": {"standard_cl": {"order": order, **options}},
    }
    told = "".join(f", {k}={v}" for k, v in options.items())
    name = f"standard_cl(order={order}{told})"
    rows = [[op if task < learned else 0.1 for task in range(4)] for learned in range(5)]
    return cell(label, rows, seed=seed, tasks=ORDERS[order], config=config, scenario=name)


def test_three_orders_are_one_line_with_students_interval() -> None:
    """Orders of 70, 72 and 77: mean 73, standard deviation sqrt(13), t of 2 degrees of freedom 4.303: 73 ± 8.96.

    Order 1 has two seeds, of which it is the mean.
    """
    cells = [learned("lora", 1, 0.68), learned("lora", 1, 0.72, seed=1)]
    cells += [learned("lora", 2, 0.72), learned("lora", 3, 0.77), learned("ties", 1, 0.5)]
    ((name, table),) = over_orders(cells).items()
    assert name == "standard_cl, 3 orders" and table.title == f"Over orders · {name}"
    assert table.columns[3:] == ("OP", "BWT", "FM", "Order 1", "Order 2", "Order 3", "Seeds")
    rows = rows_of(table)
    assert rows["lora"]["OP"] == "73.0 [64.0, 82.0]"
    assert [rows["lora"][f"Order {k}"] for k in (1, 2, 3)] == ["70.0", "72.0", "77.0"]
    assert rows["lora"]["Seeds"] == "1 to 2"
    assert (rows["ties"]["OP"], rows["ties"]["Order 1"], rows["ties"]["Order 2"]) == (
        "–",
        "50.0",
        "–",
    )


def test_one_order_or_other_options_are_no_average() -> None:
    assert not over_orders([learned("lora", 1, 0.5), learned("lora", 1, 0.6, seed=1)])
    assert not over_orders([learned("lora", 1, 0.5), learned("lora", 2, 0.6, steps=9)])
    cut = {**learned("lora", 2, 0.5), "complete": False}
    assert not over_orders([learned("lora", 1, 0.5), cut])


def test_orders_by_number_are_one_column_of_the_overview() -> None:
    cells = [learned("lora", order, 0.5 + order / 10) for order in ORDERS]
    made = overview(reported(cells), right)
    assert made.columns[5:-1] == ("standard_cl, 3 orders",)
    assert rows_of(made)["lora"]["standard_cl, 3 orders"].startswith("70.0 [")


def test_a_list_of_tasks_is_called_by_its_tasks() -> None:
    cells = [learned("lora", order, 0.5) for order in (1, 2)]
    for made in cells:
        tasks = ",".join(made["tasks"])
        made["config"] = {**made["config"], "options": {"standard_cl": {"order": tasks}}}
    (table,) = over_orders(cells).values()
    assert table.columns[6] == "dbpedia → amazon → yahoo → agnews"


def test_the_table_is_written_beside_the_others(tmp_path: Path) -> None:
    write_tables([learned("lora", order, 0.5) for order in ORDERS], tmp_path)
    assert [f.name for f in tmp_path.glob("*-orders.md")] == ["standard-cl-3-orders-orders.md"]
    assert "| lora |" in (tmp_path / "standard-cl-3-orders-orders.md").read_text("utf-8")


@pytest.mark.parametrize("orders", [(1,), (1, 2)])
def test_a_report_of_one_order_has_no_such_file(tmp_path: Path, orders: tuple[int, ...]) -> None:
    write_tables([learned("lora", order, 0.5) for order in orders], tmp_path)
    assert len(list(tmp_path.glob("*-orders.csv"))) == len(orders) - 1


def test_the_page_shows_it_below_the_overview(tmp_path: Path) -> None:
    make(tmp_path, cells=2, examples=4, strategies=1, scenarios=2)
    found = find([tmp_path])
    for order, f in enumerate(found, 1):
        f.cell["tasks"] = sorted(f.cell["tasks"], reverse=order == 2)
        f.cell["scenario"] = f"drawn(order={order})"
        f.cell["config"] |= {"scenario": "drawn", "options": {"drawn": {"order": order}}}
    text = page.write(found, tmp_path / "report", right).read_text("utf-8")
    shown = text.split('<section id="overview">')[1].split("</section>")[0]
    assert "Over orders · drawn, 2 orders" in shown and shown.count("<table") == 2
    assert "Order 1" in shown and "Order 2" in shown and "drawn-2-orders-orders.csv" in shown
    text = page.write(found[:1], tmp_path / "one", right).read_text("utf-8")
    assert "Over orders" not in text
