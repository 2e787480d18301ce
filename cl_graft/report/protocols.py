"""Who is told the task of a test prompt, and who holds the budget: what may be compared with what.

A cell is the object that `cl-graft report DIR --json` prints; all of this is told from what it recorded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cl_graft.config import RunConfig
from cl_graft.report.table import UNMEASURED
from cl_graft.store.digests import digest

Cell = Mapping[str, Any]
ROUTING = [name for name in RunConfig.model_fields if name.startswith("router")]
GIVEN, NOT_NEEDED = "given", "not needed"  # of `protocol`
PROTOCOLS = (
    "Task IDs: given where the method is told, at test, which task a prompt is of; inferred where a router tells it "
    "from the prompt; not needed where all prompts are answered alike. Being told is the easier problem: compare like "
    "with like. Budget: none where the method may keep what it likes, as references do."
)
WHO = ("Strategy", "Task IDs", "Budget")  # the first columns of a table whose rows are lines
UNTOLD, TOLD, UNKNOWN = "Not told the task at test", "Told the task at test", "Not tested yet"
FREE = ", without a budget"
PARTS = [told + size for told in (UNTOLD, TOLD, UNKNOWN) for size in ("", FREE)]  # in their order


def protocol(cell: Cell) -> str:
    """Whether the method is told the task of a test prompt: given, inferred (by which router), or not needed.

    Not needed where all tasks are answered alike; unmeasured where nothing has been answered yet.
    """
    told = cell.get("routing") or []
    if not any(counts for row in told for counts in row.values()):
        return NOT_NEEDED if told else UNMEASURED
    config = cell["config"]
    if config.get("task_ids", GIVEN) == GIVEN:
        return GIVEN
    asked = {name: config.get(name, RunConfig.model_fields[name].default) for name in ROUTING}
    how = [RunConfig.short(asked["router"])]
    if (k := asked["router_top_k"]) > 1:
        how.append(f"{asked['router_combine']} of {k}")
    if asked["router_reject"]:
        how.append(f"{asked['router_reject']:g} to the base")
    return f"inferred ({', '.join(how)})"


def part(cell: Cell) -> str:
    """One of PARTS: by whether the method is told the task of a test prompt, and whether it holds the budget."""
    told = {GIVEN: TOLD, UNMEASURED: UNKNOWN}.get(protocol(cell), UNTOLD)
    return told + ("" if cell["budgeted"] else FREE)


def held(cell: Cell) -> str:
    """The budget that a cell holds, or none."""
    return cell["budget"] if cell["budgeted"] else "none"


def titled(name: str, cell: Cell) -> str:
    """A line's name where nothing else tells that its method is told the task; a label says what was inferred."""
    return f"{name}, told the task" if protocol(cell) == GIVEN else name


def distinct(cells: Sequence[Cell]) -> list[Cell]:
    """The cells without those that are another one again: a method that answers all prompts alike has nothing to infer,
    and so its cell with a router is its cell without."""
    whole = {_experiment(cell) for cell in cells if not _nothing_to_infer(cell)}
    return [c for c in cells if not (_nothing_to_infer(c) and _experiment(c) in whole)]


def _nothing_to_infer(cell: Cell) -> bool:
    return protocol(cell) == NOT_NEEDED and cell.get("config", {}).get("task_ids", GIVEN) != GIVEN


def _experiment(cell: Cell) -> str:
    """The cell's config but for routing, as text."""
    routed = ("task_ids", *ROUTING)
    return digest({k: v for k, v in cell.get("config", {}).items() if k not in routed})
