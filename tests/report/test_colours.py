"""Colours of figures and pages: numbers on them can be read, and they stay apart, in light and dark."""

from __future__ import annotations

import itertools
import math
import re
from importlib import resources
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_hex, to_rgb

from cl_graft.report.style import DARK, PALETTE, dark_shades, darkened, ink_on, shades

TEMPLATES = resources.files("cl_graft.report.page").joinpath("templates")


def luminance(colour: Any) -> float:
    parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


def lab(colour: str) -> tuple[float, float, float]:
    """CIELAB of an sRGB colour, under D65 (IEC 61966-2-1)."""
    parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    xyz = np.array(
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    ) @ np.array(parts)
    x, y, z = (
        math.cbrt(t) if t > 216 / 24389 else (24389 / 27 * t + 16) / 116
        for t in xyz / [0.9505, 1.0, 1.089]
    )
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


def apart(one: tuple[float, float, float], other: tuple[float, float, float]) -> float:
    """How different two CIELAB colours look: CIEDE2000 (Sharma, Wu and Dalal 2005, equations 2 to 22)."""
    (light1, a1, b1), (light2, a2, b2) = one, other
    pale = (math.hypot(a1, b1) + math.hypot(a2, b2)) / 2
    more = 1.5 - 0.5 * math.sqrt(pale**7 / (pale**7 + 25**7))
    chroma1, chroma2 = math.hypot(more * a1, b1), math.hypot(more * a2, b2)
    hue1, hue2 = (math.degrees(math.atan2(b, more * a)) % 360 for a, b in ((a1, b1), (a2, b2)))
    turn = (hue2 - hue1 + 180) % 360 - 180 if chroma1 * chroma2 else 0.0
    hue = hue1 + turn / 2 if chroma1 * chroma2 else hue1 + hue2
    light, chroma = (light1 + light2) / 2, (chroma1 + chroma2) / 2

    def cos(degrees: float) -> float:
        return math.cos(math.radians(degrees))

    t = 1 - 0.17 * cos(hue - 30) + 0.24 * cos(2 * hue) + 0.32 * cos(3 * hue + 6)
    t -= 0.2 * cos(4 * hue - 63)
    in_light = (light2 - light1) / (1 + 0.015 * (light - 50) ** 2 / math.hypot(20**0.5, light - 50))
    in_chroma = (chroma2 - chroma1) / (1 + 0.045 * chroma)
    in_hue = 2 * math.sqrt(chroma1 * chroma2) * math.sin(math.radians(turn / 2))
    in_hue /= 1 + 0.015 * chroma * t
    blue = 60 * math.exp(-(((hue % 360 - 275) / 25) ** 2))
    mixed = -2 * math.sqrt(chroma**7 / (chroma**7 + 25**7)) * math.sin(math.radians(blue))
    return math.sqrt(in_light**2 + in_chroma**2 + in_hue**2 + mixed * in_chroma * in_hue)


def colours(scheme: str) -> dict[str, Any]:
    """The page's colours as red, green and blue of 0 to 1, and what else its style sheet names."""
    css = TEMPLATES.joinpath("style.css").read_text("utf-8")
    light, dark = re.findall(r":root \{(.*?)\}", css, re.DOTALL)
    found: dict[str, Any] = {}
    for name, value in re.findall(r"--(\w+): ([^;]+);", light + (dark if scheme == "dark" else "")):
        if value.startswith("#"):
            found[name] = np.array([int(value[k : k + 2], 16) / 255 for k in (1, 3, 5)])
        elif re.fullmatch(r"\d+, \d+, \d+", value):
            found[name] = np.array([int(part) / 255 for part in value.split(",")])
        elif name == "most":
            found[name] = float(value)
    return found


def contrast(one: Any, other: Any) -> float:
    """WCAG 2.1."""
    a, b = sorted((luminance(one), luminance(other)))
    return (b + 0.05) / (a + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_numbers_on_a_tint_can_be_read(scheme: str) -> None:
    """4.5 is what small text needs, whatever the score; tints of what was lost or gained end at a half."""
    css = colours(scheme)
    for score in np.linspace(0, 1, 21):
        paper = css["card"] + score * css["most"] * (css["heat"] - css["card"])
        assert contrast(css["ink"], paper) >= 4.5, score
    scale = [css["card"] + score * (css["heat"] - css["card"]) for score in np.linspace(0, 1, 21)]
    steps = np.diff([luminance(colour) for colour in scale])
    assert (steps > 0).all() if scheme == "dark" else (steps < 0).all(), "zero is as the page is"
    for tint in ("better", "worse"):
        (most,) = re.findall(
            r"\[d\.tint\|abs, ([\d.]+)\]\|min", TEMPLATES.joinpath("macros.html").read_text("utf-8")
        )
        paper = css["card"] + float(most) * (css[tint] - css["card"])
        assert contrast(css["ink"], paper) >= 4.5, tint
    for ink in ("muted", "best", "wrong", "accent"):
        assert contrast(css[ink], css["card"]) >= 4.5, ink


def test_colours_of_outcomes_stay_apart() -> None:
    css = TEMPLATES.joinpath("style.css").read_text("utf-8")
    found = re.findall(r"\.o-\w+ \{ --o: (#\w+);", css)
    assert len(found) == 5
    assert min(apart(lab(a), lab(b)) for a, b in itertools.combinations(found, 2)) >= 16


def test_on_a_dark_page_ink_is_light_and_numbers_keep_their_contrast() -> None:
    svg = (
        '<svg><style type="text/css">*{}</style><path fill="#FFFFFF"/><path fill="#010101"/></svg>'
    )
    dark = darkened(svg)
    assert f"svg{{fill:{DARK['#000000']}}}" in dark
    assert f'"{DARK["#ffffff"]}"' in dark and '"#fefefe"' in dark
    assert luminance(DARK["#000000"]) > 0.7 > 0.02 > luminance(DARK["#ffffff"])
    for light, colour in DARK.items():
        if light in map(str.lower, PALETTE):
            paper = luminance(DARK["#ffffff"]) + 0.05
            assert (luminance(colour) + 0.05) / paper >= 3, light  # WCAG 2.1 on graphics


def test_on_a_dark_page_the_least_is_the_darkest_and_every_number_can_be_read() -> None:
    """The colours of 0 to 100 % get lighter; each has black or white on it, as on a light page the other way round."""
    replaced = dark_shades()
    lights = [to_hex(colour) for colour in shades().colors]
    scale = [luminance(replaced[light]) for light in lights]
    assert len(scale) == 101 and scale == sorted(scale)
    assert scale[0] < luminance(DARK["#ffffff"])  # zero is no brighter than the page
    for light, own in zip(lights, scale, strict=True):
        ink = luminance(replaced[ink_on(to_rgb(light)).lower()])
        least, most = sorted((own, ink))
        assert (most + 0.05) / (least + 0.05) >= 4.4, light


@pytest.mark.parametrize(
    ("one", "other", "known"),
    [
        ((50.0, 2.6772, -79.7751), (50.0, 0.0, -82.7485), 2.0425),
        ((50.0, 3.1571, -77.2803), (50.0, 0.0, -82.7485), 2.8615),
        ((50.0, 2.5, 0.0), (73.0, 25.0, -18.0), 27.1492),
        ((50.0, 2.5, 0.0), (61.0, -5.0, 29.0), 22.8977),
        ((60.2574, -34.0099, 36.2677), (60.4626, -34.1751, 39.4387), 1.2644),
        ((2.0776, 0.0795, -1.135), (0.9033, -0.0636, -0.5514), 0.9082),
    ],
)
def test_the_distance_of_colours_is_that_of_its_published_examples(
    one: Any, other: Any, known: float
) -> None:
    """Pairs of table 1 of Sharma, Wu and Dalal 2005."""
    assert apart(one, other) == pytest.approx(known, abs=1e-4)
    assert apart(other, one) == pytest.approx(known, abs=1e-4)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_of_strategies_stay_apart(scheme: str) -> None:
    """From each other, and from the page; on a dark page two pinks were 3 apart, and two blues 5."""
    dark = scheme == "dark"
    seen = {c: DARK.get(c.lower(), c) if dark else c for c in (*PALETTE, "#FFFFFF")}
    least, *pair = min(
        (apart(lab(seen[a]), lab(seen[b])), a, b) for a, b in itertools.combinations(seen, 2)
    )
    assert least >= (20 if dark else 16), pair
