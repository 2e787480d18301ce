"""Strategies by scenarios, a grid of scores, with the mean rank of each."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cl_graft.report.overview import Standing
from cl_graft.report.paper.chosen import ALWAYS, short_names
from cl_graft.report.paper.sheet import SMALL, WIDTHS, Drawn, grid, styled
from cl_graft.report.protocols import FREE, TOLD, UNTOLD
from cl_graft.report.ranks import Ranks
from cl_graft.report.style import shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST = {"1col": 15, "2col": 60}  # rows of a part
ROW = 0.112  # inches
CAPTION = (
    "{} Rank: by OP among methods of the same protocol that hold the budget, the mean over {}. Methods below a line "
    "have no budget, and no rank."
)


@dataclass(frozen=True)
class Scores:
    """Every strategy's scores by column, of scenarios or of the tasks of the only one.

    of: what the columns are, as a caption says it. columns: their names. standings: the base and every strategy, as
    `overview` has them. ranks: of UNTOLD and TOLD.
    """

    of: str
    columns: tuple[str, ...]
    standings: Sequence[Standing]
    ranks: Mapping[str, Ranks]

    def rows(self, part: str) -> list[tuple[Standing, float]]:
        """Strategies of UNTOLD or TOLD with their mean ranks, best first; those without a budget last, without any."""
        known = dict(zip(self.ranks[part].names, self.ranks[part].ranks, strict=True))
        own = [s for s in self.standings if s.part in (part, part + FREE)]
        placed = [(s, math.nan if s.part != part else known.get(s.who[0], math.nan)) for s in own]
        return sorted(placed, key=lambda row: (row[0].part != part, math.isnan(row[1]), row[1]))


@styled
def standing(scores: Scores, width: str, wanted: Collection[str] = ()) -> Drawn:
    """The grids of those that are not told the task and of those that are; the lowest of many are left out."""
    from matplotlib.figure import Figure

    parts = [part for part in (UNTOLD, TOLD) if scores.rows(part)]
    short = short_names(s.who[0] for part in parts for s, _ in scores.rows(part))
    shown = {part: _some(scores.rows(part), MOST[width], wanted) for part in parts}
    hidden = [len(scores.rows(part)) - len(rows) for part, rows in shown.items()]
    sizes = [len(rows) + 1 for rows in shown.values()]
    down = width == "1col"
    room, longest = _room(scores, width), max(map(len, shortened(scores.columns, 22)))
    turned = 0.05 * longest > room
    above = 0.32 + (0.05 * longest if turned else 0.1)
    height = ROW * (sum(sizes) if down else max(sizes)) + above * (len(parts) if down else 1)
    figure = Figure(figsize=(WIDTHS[width], height), layout="constrained")
    shape = (len(parts), 1) if down else (1, len(parts))
    ratios: Any = {"height_ratios": sizes} if down else {}
    places = list(figure.subplots(*shape, squeeze=False, **ratios).flat)
    for ax, part in zip(places, parts, strict=True):
        rows = shown[part]
        _draw(ax, scores, rows, short, room, 0 if down else max(sizes))
        ax.tick_params("x", rotation=90 if turned else 0)
        ax.set_title(part.removesuffix(" at test"), pad=6)
    blocks = max(len(ranks.blocks) for ranks in scores.ranks.values())
    over = "one block" if blocks == 1 else f"{blocks} blocks"
    told = CAPTION.format(scores.of, f"{over} (scenario, order of tasks, model)")
    if any(hidden):
        told += f" The {' and '.join(str(n) for n in hidden if n)} lowest are left out."
    return Drawn(figure, told)


def _some(
    rows: Sequence[tuple[Standing, float]], most: int, wanted: Collection[str]
) -> list[tuple[Standing, float]]:
    """Rows of the first, the references, and who is wanted."""
    return [
        (s, rank)
        for k, (s, rank) in enumerate(rows)
        if k < most or s.who[0].partition("(")[0] in {*ALWAYS, *wanted} or s.who[0] in wanted
    ]


def _room(scores: Scores, width: str) -> float:
    """Inches of a column, beside names of the usual length."""
    parts = {s.part.removesuffix(FREE) for s in scores.standings if s.part}
    across = 1 if width == "1col" else len(parts)
    return (WIDTHS[width] / across - 1.1) / (len(scores.columns) + 1)


def _draw(
    ax: Axes,
    scores: Scores,
    rows: Sequence[tuple[Standing, float]],
    short: Mapping[str, str],
    room: float,
    least: int,
) -> None:
    base = scores.standings[0]
    every = [base, *(s for s, _ in rows)]
    values = np.array([[math.nan if x is None else 100 * x.mean for x in s.scores] for s in every])
    spec = ".1f" if room >= 0.26 else ".0f" if room >= 0.15 else ""  # shades tell the rest
    texts = [["" if math.isnan(x) or not spec else f"{x:{spec}}" for x in row] for row in values]
    grid(ax, values, texts, set())
    count = len(scores.columns)
    note: Any = {"va": "center_baseline", "ha": "center", "fontsize": SMALL}
    for k, (_, rank) in enumerate(rows, 1):
        ax.text(count + 0.5, k + 0.5, "–" if math.isnan(rank) else f"{rank:.1f}", **note)
    edges = [1] + [k for k, (s, _) in enumerate(rows, 1) if s.part.endswith(FREE)][:1]
    for edge in edges:
        ax.axhline(edge, color="#444444", linewidth=0.6)
    ax.set_xlim(0, count + 1)
    ax.set_ylim(max(len(every), least), 0)
    ax.set_yticks(np.arange(len(every)) + 0.5, ["base model", *(short[s.who[0]] for s, _ in rows)])
    names = [*shortened(scores.columns, 22), "rank"]
    ax.set_xticks(np.arange(count + 1) + 0.5, names)
    ax.xaxis.tick_top()
    ax.tick_params(length=0, labelsize=SMALL, pad=2)
