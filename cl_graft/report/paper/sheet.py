"""The sheet that figures for a paper are drawn on: two widths, one type, and files for LaTeX, a page and a slide.

ICML's style has columns of 3.25 inches and 6.75 of text. A figure is as wide as either, so that its type is printed at
its own size: 7 points, and 6 for what is written on a grid.
"""

from __future__ import annotations

import functools
import io
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import numpy as np

from cl_graft.matrix import FloatArray
from cl_graft.report import style
from cl_graft.report.aggregate import Estimate, Line
from cl_graft.report.paper.chosen import Looks, Panel
from cl_graft.report.style import FRAME, darkened, ink_on, roomy, shades
from cl_graft.report.table import tex, write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

P = ParamSpec("P")
D = TypeVar("D")  # Drawn, or nothing

WIDTHS = {"1col": 3.25, "2col": 6.75}  # inches
DPI = 300
TYPE, SMALL = 7.0, 6.0  # points; the second on a grid and at its edges
REST = "#BBBBBB"  # of strategies that are not named
STYLE: Any = style.STYLE | {
    "font.size": TYPE,
    **{f"{what}.labelsize": TYPE for what in ("axes", "xtick", "ytick")},
    **{name: TYPE for name in ("axes.titlesize", "figure.titlesize")},
    "legend.fontsize": SMALL,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "grid.linewidth": 0.4,
    "lines.linewidth": 1.1,
    "lines.markersize": 4.0,
    "axes.labelpad": 2.0,
    "axes.titlepad": 4.0,
    "legend.handlelength": 1.6,
    "legend.columnspacing": 1.2,
    "legend.handletextpad": 0.5,
    "pdf.fonttype": 42,  # TrueType, which publishers ask for, and text that can be found
    "pdf.compression": 9,
}


@dataclass(frozen=True)
class Drawn:
    """A figure, and the caption that says what is on it: plain text, to be escaped."""

    figure: Figure
    caption: str


def styled(draw: Callable[P, D]) -> Callable[P, D]:
    """Draws under STYLE, whatever the user's own settings are."""

    @functools.wraps(draw)
    def drawn(*args: P.args, **more: P.kwargs) -> D:
        import matplotlib

        with matplotlib.rc_context(STYLE):
            return draw(*args, **more)

    return drawn


def axes(width: str, count: int, height: float, most: int = 3) -> tuple[Figure, list[Axes]]:
    """A figure of one of WIDTHS with so many panels, `height` inches each: below one another in a column, else side by
    side, by twos where there are more than `most`."""
    from matplotlib.figure import Figure

    across = 1 if width == "1col" else count if count <= most else 2
    down = -(-count // across)
    figure = Figure(figsize=(WIDTHS[width], down * height), layout="constrained")
    engine: Any = figure.get_layout_engine()
    engine.set(w_pad=0.03, h_pad=0.03)
    found = list(figure.subplots(down, across, squeeze=False).flat)
    for ax in found[count:]:
        ax.remove()
    return figure, found[:count]


def legend(figure: Figure, handles: Sequence[Any], width: str) -> None:
    """A legend below all panels, in as many columns as its names leave room for; the figure grows by its height."""
    longest = max(len(str(handle.get_label())) for handle in handles)
    columns = max(1, int(WIDTHS[width] / (0.048 * longest + 0.38)))
    rows = -(-len(handles) // columns)
    figure.set_figheight(figure.get_figheight() + 0.12 * rows + 0.08)
    figure.legend(handles=handles, loc="outside lower center", ncols=-(-len(handles) // rows))


def key(looks: Looks, rest: bool, joined: bool = False) -> list[Any]:
    """Handles of a legend for names and their looks, and for what is grey. joined: by lines."""
    from matplotlib.lines import Line2D

    dash = {} if joined else {"linestyle": "none"}
    handles = [Line2D([], [], **look | dash, label=name) for name, look in looks.items()]
    grey: Any = {"color": REST, "marker": "o", "markersize": 2.5, "linestyle": "none"}
    return handles + ([Line2D([], [], **grey, label="others")] if rest else [])


def scattered(
    ax: Axes,
    panel: Panel,
    places: Mapping[str, tuple[Estimate, Estimate]],
    short: Mapping[str, str],
    looks: Looks,
) -> None:
    """A point with whiskers for each line of a panel, in per cent. places: x and y of each, as shares of 1."""
    grey: Any = {"color": REST, "elinewidth": 0.4, "markersize": 2.5, "zorder": 1}
    points: list[tuple[Sequence[Line], Any]] = [(panel.rest, grey | {"marker": "o"})]
    for line in reversed(panel.named):
        points.append(([line], looks[short[line.name]] | {"elinewidth": 0.8, "zorder": 3}))
    for lines, look in points:
        if lines:
            x, y = (100 * np.array([places[s.name][axis] for s in lines]).T for axis in (0, 1))
            bars: Any = {"xerr": _bars(x[1]), "yerr": _bars(y[1])}
            ax.errorbar(x[0], y[0], **bars, **look | {"linestyle": "none"})
    roomy(ax)
    ax.grid()


def grid(
    ax: Axes, values: FloatArray, texts: Sequence[Sequence[str]], framed: set[tuple[int, int]]
) -> None:
    """Per cents (rows, columns) as shades, the first row on top, with a text on each. framed: places (row, column)."""
    from matplotlib.patches import Rectangle

    colours = shades()
    look: Any = {"cmap": colours, "vmin": 0, "vmax": 100, "edgecolors": "white", "linewidth": 0.6}
    ax.pcolormesh(np.ma.masked_invalid(values), **look)
    for (i, j), value in np.ndenumerate(values):
        ink = "#444444" if np.isnan(value) else ink_on(colours(value / 100.0))
        more: Any = {"ha": "center", "va": "center_baseline", "fontsize": SMALL, "in_layout": False}
        ax.text(j + 0.5, i + 0.5, texts[i][j], color=ink, **more)
        if (i, j) in framed:
            ax.add_patch(Rectangle((j, i), 1, 1, fill=False, edgecolor=FRAME, linewidth=1.0))
    ax.set_ylim(len(values), 0)
    ax.spines[:].set_visible(False)


def _bars(errors: FloatArray) -> FloatArray | None:
    return None if np.isnan(errors).all() else errors


def files_of(stem: Path) -> list[Path]:
    """What `save` writes for a stem: STEM-1col and STEM-2col as .pdf, .png, .svg and dark/....svg, and STEM.tex."""
    files = []
    for width in WIDTHS:
        name = f"{stem.name}-{width}"
        files += [stem.with_name(f"{name}.{kind}") for kind in ("pdf", "png", "svg")]
        files.append(stem.parent / "dark" / f"{name}.svg")
    return [*files, stem.with_name(f"{stem.name}.tex")]


def save(draw: Callable[[str], Drawn | None], stem: Path, label: str) -> list[Path]:
    """Writes `files_of` the stem, of what is drawn at each of WIDTHS; the bytes depend on that and matplotlib alone.

    Where there is nothing to draw, none of an earlier report is left. label: what LaTeX refers to the figure by.
    """
    drawn = [found for width in WIDTHS if (found := draw(width))]
    if not drawn:
        for file in files_of(stem):
            file.unlink(missing_ok=True)
        return []
    contents = [data for one in drawn for data in _printed(one.figure)]
    captions = [one.caption for one in drawn]
    contents.append(environment(stem.name, captions, label).encode())
    return [write_atomic(file, data) for file, data in zip(files_of(stem), contents, strict=True)]


def _printed(figure: Figure) -> list[bytes]:
    """The figure as PDF, PNG, SVG, and SVG for a dark page."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_pdf import FigureCanvasPdf
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    pdf, png, svg = io.BytesIO(), io.BytesIO(), io.BytesIO()
    with matplotlib.rc_context(STYLE):  # by the canvases, since savefig draws twice
        figure.set_dpi(DPI)
        FigureCanvasAgg(figure).print_png(png, metadata={"Software": None})
        figure.set_layout_engine("none")  # everything has its place now
        figure.set_dpi(72)
        FigureCanvasPdf(figure).print_pdf(pdf, metadata={"CreationDate": None})
        FigureCanvasSVG(figure).print_svg(svg, metadata={"Date": None})
    text = svg.getvalue()
    return [pdf.getvalue(), png.getvalue(), text, darkened(text.decode()).encode()]


def filled(text: str) -> str:
    """Plain text as lines of LaTeX."""
    return textwrap.fill(tex(text), 110, break_long_words=False, break_on_hyphens=False)


def environment(name: str, captions: Sequence[str], label: str) -> str:
    """A figure of LaTeX for each of WIDTHS, the second as a comment. captions: of each."""
    made = []
    for (width, _), caption in zip(WIDTHS.items(), captions, strict=True):
        kind, room = ("figure", r"\columnwidth") if width == "1col" else ("figure*", r"\textwidth")
        made.append(
            "\n".join(
                [
                    rf"\begin{{{kind}}}[t]",
                    r"\centering",
                    rf"\includegraphics[width={room}]{{{name}-{width}}}",
                    rf"\caption{{{filled(caption)}}}",
                    rf"\label{{fig:{label}}}",
                    rf"\end{{{kind}}}",
                ]
            )
        )
    wide = "\n".join(f"% {line}" for line in made[1].split("\n"))
    head = "% needs \\usepackage{graphicx}, and \\graphicspath{{FOLDER/}} for the folder that this file is in"
    return f"{head}\n{made[0]}\n% over both columns:\n{wide}\n"
