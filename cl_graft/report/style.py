"""How figures look, and how they are written: as PNG, as SVG, and as SVG for a dark page."""

from __future__ import annotations

import colorsys
import functools
import hashlib
import io
import re
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, TypeVar

from cl_graft.report.aggregate import groups
from cl_graft.report.protocols import Cell
from cl_graft.report.table import write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

P = ParamSpec("P")
T = TypeVar("T")
Draw = Callable[[Sequence[Cell]], "Figure"]

# First Okabe and Ito's colours, which readers with any common colour blindness tell apart (a brown
# stands in for their yellow, too light on white), then five of Paul Tol's; markers differ as well.
PALETTE = (
    *("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A5230", "#000000"),
    *("#882255", "#332288", "#999933", "#888888", "#117733"),
)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p", "h")
# The place of a strategy here is its colour and marker in every figure, and a name that is not here
# gets a place by its hash. Append only: another order would repaint the figures already published.
KNOWN = (
    *("graftllm", "lora", "model_grafting", "model_tailor", "magnitude", "task_arithmetic"),
    *("sequential", "joint", "individual", "ties", "replay", "ewc", "o_lora", "dare", "svd"),
    *("lwf", "agem", "graftllm_adaptive"),
)
LINES = ("-", "--", "-.")
FILLS = ("full", "none", "left", "top", "right", "bottom")
FRAME, GREY = "#D55E00", "#444444"
# The numbers on a heatmap are all but black or white, so that DARK does not recolour them with the rest.
INK = ("#FEFEFE", "#010101")
SHADES = 101  # of a heatmap, one a per cent
# What takes the place of a light figure's colours on a dark page: paper, ink, lines, and of PALETTE what would be too
# dark, or too near to what takes its place. No two of PALETTE are nearer than 16 by CIEDE2000, here 20.
DARK = {
    "#ffffff": "#161a20",
    "#000000": "#e3e6ea",
    "#444444": "#a3abb5",
    "#e5e5e5": "#2b323b",
    "#e8e8e8": "#2b323b",
    "#bbbbbb": "#66707c",
    "#9a9a9a": "#5a636e",
    "#0072b2": "#197ece",
    "#009e73": "#469475",
    "#cc79a7": "#cf5ca1",
    "#56b4e9": "#5ac7f8",
    "#7a5230": "#fdc2a0",
    "#882255": "#fbb8d2",
    "#332288": "#ab9cfb",
    "#117733": "#98ec9b",
}
STYLE: Any = {
    "font.size": 8.0,
    "axes.titlesize": 8.0,
    "figure.titlesize": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#E5E5E5",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.title_fontsize": 7.0,
    "hatch.linewidth": 0.5,
    "hatch.color": "#9A9A9A",
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    "svg.hashsalt": "cl-graft",  # without it the ids of an SVG's elements are random
}


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Draws under STYLE, whatever the user's own settings are; a notebook shows what is drawn, without pyplot."""

    @functools.wraps(draw)
    def drawn(*args: P.args, **more: P.kwargs) -> Figure:
        import matplotlib

        with matplotlib.rc_context(STYLE):
            figure: Any = draw(*args, **more)
        figure._repr_png_ = functools.partial(png, figure)
        return figure

    return drawn


def files_of(stem: Path) -> list[Path]:
    """What `save` writes: STEM.png, STEM.svg and dark/STEM.svg."""
    light = [stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "svg")]
    return [*light, stem.parent / "dark" / f"{stem.name}.svg"]


def save(figure: Figure, stem: Path) -> list[Path]:
    """Writes `files_of` the stem, the PNG at 150 dpi; the bytes depend on the figure and matplotlib alone."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    pixels, svg = png(figure), io.BytesIO()
    with matplotlib.rc_context(STYLE):  # by the canvas, since savefig draws twice
        figure.set_layout_engine("none")  # everything has its place now
        FigureCanvasSVG(figure).print_svg(svg, metadata={"Date": None})
    dark = darkened(svg.getvalue().decode()).encode()
    contents = zip(files_of(stem), (pixels, svg.getvalue(), dark), strict=True)
    return [write_atomic(file, data) for file, data in contents]


def png(figure: Figure) -> bytes:
    """The figure as PNG, at 150 dpi."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    data = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.set_dpi(150)
        # a tenth larger than by the default, in a third of the time
        fast = {"compress_level": 3}
        FigureCanvasAgg(figure).print_png(data, metadata={"Software": None}, pil_kwargs=fast)
    return data.getvalue()


def darkened(svg: str) -> str:
    """An SVG of matplotlib's in the colours of DARK, its heatmaps in those of `dark_shades`.

    What names no colour is black, text above all.
    """
    colours = DARK | dark_shades()
    recoloured = re.sub(r"#[0-9a-fA-F]{6}", lambda c: colours.get(c[0].lower(), c[0]), svg)
    return recoloured.replace(
        '<style type="text/css">', f'<style type="text/css">svg{{fill:{DARK["#000000"]}}}', 1
    )


def shades() -> ListedColormap:
    """The colours of a heatmap from 0 to 100 %, on a light page the darker the more."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    blues = colormaps["Blues"]
    return ListedColormap([blues(k / (SHADES - 1)) for k in range(SHADES)])


@functools.cache
def dark_shades() -> dict[str, str]:
    """{colour of `shades`: what takes its place on a dark page}, and the two of INK in each other's place.

    On a dark page it is the lighter the more, so that zeros are not what is seen first. What is as far from black as
    the light colour is from white keeps its number as well readable: (L' + 0.05) = 1.05 * 0.05 / (L + 0.05).
    """
    from matplotlib.colors import to_hex

    white, black = (ink.lower() for ink in INK)
    found = {white: black, black: white}
    for light in range(SHADES):
        colour = shades()(light)
        hue = colorsys.rgb_to_hls(*colour[:3])[0]
        wanted, low, high = 1.05 * 0.05 / (luminance(colour) + 0.05) - 0.05, 0.0, 1.0
        for _ in range(30):
            middle = (low + high) / 2
            darker = luminance(colorsys.hls_to_rgb(hue, middle, 0.55)) < wanted
            low, high = (middle, high) if darker else (low, middle)
        found[to_hex(colour)] = to_hex(colorsys.hls_to_rgb(hue, low, 0.55))
    return found


def roomy(ax: Axes, least: float = 5.0) -> None:
    """Make an axis of per cents span so many points at least: data that are all alike have no scale of their own."""
    low, high = ax.get_ylim()
    if high - low < least:
        bottom = (low + high - least) / 2
        if low > -0.1 * least:  # nothing is below zero
            bottom = max(bottom, -0.05 * least)
        ax.set_ylim(bottom, bottom + least)


class Line(Protocol):
    """What a look depends on."""

    @property
    def name(self) -> str: ...
    @property
    def strategy(self) -> str: ...
    @property
    def complete(self) -> bool: ...


def looks_of(lines: Sequence[Line]) -> dict[str, dict[str, Any]]:
    """Colour and marker by strategy; dash and fill by label within the strategy."""
    places: dict[str, int] = {}
    labels: dict[str, int] = {}
    looks: dict[str, dict[str, Any]] = {}
    for line in sorted(lines, key=lambda s: (s.strategy not in KNOWN, s.strategy, s.name)):
        if line.strategy not in places:
            place = _place(line.strategy)
            while place in places.values():  # rare, but two strategies never look the same
                place += 1
            places[line.strategy] = place
        place, nth = places[line.strategy], labels.get(line.strategy, 0)
        labels[line.strategy] = nth + 1
        looks[line.name] = {
            "color": PALETTE[place % len(PALETTE)],
            "marker": MARKERS[place % len(MARKERS)],
            "fillstyle": FILLS[nth % len(FILLS)],
            "linestyle": LINES[nth % len(LINES)] if line.complete else ":",
        }
    return looks


def _place(strategy: str) -> int:
    """13 colours and 9 markers have no common factor: 117 places that all look different."""
    if strategy in KNOWN:
        return KNOWN.index(strategy)
    rest = len(PALETTE) * len(MARKERS) - len(KNOWN)
    return len(KNOWN) + int(hashlib.sha256(strategy.encode()).hexdigest(), 16) % rest


def ink_on(rgba: Sequence[float]) -> str:
    """All but black or white, whichever has more contrast on the colour (WCAG 2.1 relative luminance)."""
    own = luminance(rgba) + 0.05
    return INK[0] if 1.05 / own > own / 0.05 else INK[1]


def luminance(rgba: Sequence[float]) -> float:
    """Relative luminance of a colour (WCAG 2.1)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgba[:3]]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def title_of(cells: Sequence[Cell]) -> str:
    return next(iter(groups(cells)))


def alike(things: Sequence[tuple[str, T]], same: Callable[[T, T], bool]) -> str:
    """A sentence that names what is drawn in one place, so that one hides another; empty where nothing is."""
    groups: list[list[tuple[str, T]]] = []
    for name, thing in things:
        near = next((g for g in groups if same(g[0][1], thing)), None)
        groups += [[(name, thing)]] if near is None else []
        if near is not None:
            near.append((name, thing))
    told = [", ".join(name for name, _ in group) for group in groups if len(group) > 1]
    return f"In one place: {'; '.join(told)}." if told else ""


def wrap(name: str, most: int) -> str:
    """A name too long for one line is broken before its options and after their commas."""
    return name if len(name) <= most else textwrap.fill(re.sub(r"(?<=\S)\(", " (", name), most)


def shortened(names: Sequence[str], most: int = 14) -> list[str]:
    """The names without their middles where they are long; whole where they would look alike so."""
    short = [n if len(n) <= most else f"{n[: most - 6]}…{n[-5:]}" for n in names]
    return [n if short.count(s) > 1 else s for n, s in zip(names, short, strict=True)]


def slant(tasks: Sequence[str]) -> dict[str, Any]:
    if len(tasks) > 6:
        return {"rotation": 90, "fontsize": 7}
    long = max(map(len, tasks)) > 6
    return {"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if long else {}
