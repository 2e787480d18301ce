"""Critical-difference plot: mean ranks on a line, with bars over those that were not told apart (Demsar 2006)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cl_graft.report.paper.chosen import short_names
from cl_graft.report.paper.sheet import SMALL, WIDTHS, Drawn, styled
from cl_graft.report.ranks import ALPHA, LEAST, Ranks
from cl_graft.report.style import GREY

if TYPE_CHECKING:
    from matplotlib.axes import Axes

AXIS, ROW, BAR = 0.42, 0.115, 0.075  # inches: from the top to the axis, of a name, of a bar
LETTER = 0.048  # inches of SMALL type, about
MOST = 5  # bars, of which more would be a wall
CAPTION = (
    "Mean ranks by overall performance (OP), the best to the left. A block is a scenario, with an order of its tasks "
    "and a model, and counts by the mean over its seeds and budgets."
)


@styled
def critical(ranks: Mapping[str, Ranks], width: str, names: Sequence[str] = ()) -> Drawn | None:
    """An axis of ranks for each of UNTOLD and TOLD, of two strategies or more over two blocks or more; None without.

    names: all labels of the report, by which names are short.
    """
    from matplotlib.figure import Figure

    shown = {p: r for p, r in ranks.items() if len(r.names) > 1 and len(r.blocks) > 1}
    if not shown:
        return None
    short = short_names({*names, *(name for r in shown.values() for name in r.names)})
    down = width == "1col"
    heights = [AXIS + 0.15 + BAR * len(bars(r)) + ROW * _half(r) for r in shown.values()]
    size = (WIDTHS[width], sum(heights) if down else max(heights))
    figure = Figure(figsize=size)  # everything is placed in inches
    wide = size[0] if down else size[0] / len(shown)
    for k, ((part, found), height) in enumerate(zip(shown.items(), heights, strict=True)):
        left = 0.0 if down else k * wide
        low = size[1] - (sum(heights[: k + 1]) if down else height)
        ax = figure.add_axes((left / size[0], low / size[1], wide / size[0], height / size[1]))
        ax.set_xlim(0, wide)
        ax.set_ylim(height, 0)
        ax.axis("off")
        ax.text(wide / 2, 0.02, part.removesuffix(" at test"), ha="center", va="top")
        _draw(ax, found, [short[name] for name in found.names], wide)
    return Drawn(figure, " ".join([CAPTION, *(_told(part, r) for part, r in shown.items())]))


def bars(found: Ranks) -> list[tuple[int, int]]:
    """First and last places under the bars that are drawn: those of `alike`, or the best's alone of more than MOST."""
    runs = found.alike()
    return runs if len(runs) <= MOST else [run for run in runs if run[0] == 0]


def _half(found: Ranks) -> int:
    """How many names stand to the left."""
    return -(-len(found.names) // 2)


def _draw(ax: Axes, found: Ranks, names: Sequence[str], wide: float) -> None:
    """The critical difference, the axis, bars, and names with ranks to both sides; in inches, y downwards."""
    count, half = len(names), _half(found)
    texts = [f"{name}  {r:.1f}" for name, r in zip(names[:half], found.ranks, strict=False)]
    texts += [f"{r:.1f}  {name}" for name, r in zip(names[half:], found.ranks[half:], strict=True)]
    left = min(LETTER * max(map(len, texts[:half])) + 0.14, 0.42 * wide)
    right = wide - min(LETTER * max(map(len, texts[half:])) + 0.14, 0.42 * wide)
    ink: Any = {"color": "black", "linewidth": 0.8, "solid_capstyle": "butt"}
    small: Any = {"fontsize": SMALL, "va": "center"}

    def at(rank: float) -> float:
        return left + (right - left) * (rank - 1) / (count - 1)

    ax.plot([at(1), at(count)], [AXIS, AXIS], **ink)
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100) if (count - 1) / s <= 8)
    between = [t for t in range(step, count, step) if min(t - 1, count - t) >= step / 2]
    for tick in [1, *between, count]:
        ax.plot([at(tick)] * 2, [AXIS - 0.04, AXIS], **ink)
        ax.text(at(tick), AXIS - 0.09, str(tick), ha="center", **small)
    if found.tested:
        ends = [at(1), at(1 + min(found.critical, count - 1))]
        ax.plot(ends, [0.22, 0.22], **ink)
        for x in ends:
            ax.plot([x, x], [0.2, 0.24], **ink)
        ax.text(at(1) - 0.04, 0.22, f"CD {found.critical:.2f}", ha="right", **small)
    runs = bars(found)
    for k, (first, last) in enumerate(runs):
        y = AXIS + 0.06 + BAR * k
        ends = [at(found.ranks[first]) - 0.02, at(found.ranks[last]) + 0.02]
        ax.plot(ends, [y, y], color="black", linewidth=2.0, solid_capstyle="butt", zorder=3)
    for k, (rank, text) in enumerate(zip(found.ranks, texts, strict=True)):
        y = AXIS + 0.08 + BAR * len(runs) + ROW * ((k if k < half else count - 1 - k) + 0.5)
        x, side, gap = (left - 0.06, "right", -0.03) if k < half else (right + 0.06, "left", 0.03)
        ax.plot([at(rank), at(rank), x], [AXIS, y, y], color=GREY, linewidth=0.4, zorder=2)
        ax.text(x + gap, y, text, ha=side, **small)


def _told(part: str, found: Ranks) -> str:
    """What the plot of one part shows, and what it cannot."""
    n = len(found.blocks)
    scenarios, orders, models = (len({block[k] for block in found.blocks}) for k in range(3))
    text = f"{part}: {n} blocks ({scenarios} scenario{'s' if scenarios > 1 else ''}"
    text += f", {orders} orders of tasks" if orders > scenarios else ""
    text += f", {models} models)." if models > 1 else ")."
    if not found.tested:
        why = f"fewer than {LEAST} blocks" if n < LEAST else "two strategies"
        text += f" No test: {why} cannot tell whether ranks differ by more than chance."
    else:
        p = "< 0.001" if found.p < 0.001 else f"= {found.p:.3f}"
        text += f" Friedman's test with Iman and Davenport's F: p {p}. "
        text += f"Critical difference (CD) by Nemenyi at {ALPHA:g}: {found.critical:.2f}. "
        if found.p >= ALPHA:
            text += "No difference was found, so nothing is told apart."
        elif len(bars(found)) == len(found.alike()):
            text += "Bars join what is not told apart."
        else:
            text += "The bar joins what is not told apart from the best; other pairs are, where they differ by CD."
        if scenarios < n:
            text += (
                " Blocks of one scenario share test examples, which the test takes as independent."
            )
    if found.without:
        text += f" Not ranked, for want of a block: {', '.join(found.without)}."
    return text
