"""Who is named in figures for papers, by which name, and in looks that every reader tells apart."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from matplotlib.colors import to_hex, to_rgb

from cl_graft.report.paper import chosen
from cl_graft.report.paper.chosen import ALL, NAMED, panels, short_names
from cl_graft.report.paper.curves import curves
from cl_graft.report.paper.sheet import REST
from cl_graft.report.protocols import TOLD, UNTOLD
from cl_graft.report.style import PALETTE
from tests.report.test_colours import apart as distance
from tests.report.test_colours import lab
from tests.report.test_paper import CROWD, FEW, drawn


def test_of_many_the_best_within_the_budget_and_the_references_are_named() -> None:
    untold, given = panels(CROWD)
    assert (untold.part, given.part) == (UNTOLD, TOLD)
    for panel in (untold, given):
        within = [line for line in panel.lines if line.part == panel.part]
        best = sorted(within, key=lambda line: -line.metric("op")[0])[:NAMED]
        named = {line.name for line in panel.named}
        references = {line.name for line in panel.lines if line.strategy in chosen.ALWAYS}
        assert named == {line.name for line in best} | references
        assert len(panel.rest) == len(panel.lines) - len(named) > 0
    assert {line.name for line in given.lines if line.strategy in chosen.ALWAYS} == {"individual"}
    assert "the other 23 and 9 are grey" in drawn("curves", "1col").caption.replace("\n", " ")


def test_of_few_all_are_named_and_an_incomplete_cell_has_no_place() -> None:
    cells = [*FEW, *(c | {"complete": False, "seed": c["seed"] + 7} for c in FEW)]
    for panel in panels(cells):
        assert len(panel.lines) <= ALL and not panel.rest
        assert all(line.complete for line in panel.lines)


def test_whom_the_author_asks_for_is_named() -> None:
    lowest = panels(CROWD)[1].rest[-1].name
    assert lowest in {line.name for line in panels(CROWD, [lowest])[1].named}
    texts = [t.get_text() for t in curves(CROWD, "1col", [lowest]).figure.axes[1].texts]
    assert lowest in texts and lowest not in [
        t.get_text() for t in drawn("curves", "1col").figure.axes[1].texts
    ]


def test_names_have_the_options_that_tell_them_apart() -> None:
    labels = {
        "lora(convention=each)": "lora (each)",
        "lora(convention=each, task_ids=inferred)": "lora (each)",
        "lora(convention=trained_on)": "lora (trained_on)",
        "svd(rank=8, scale=2)": "svd",
        "svd(rank=8, scale=2, task_ids=inferred)": "svd",
        "ewc(a=1, b=2)": "ewc (a=1)",
        "ewc(a=2, b=2, c=3)": "ewc (a=2, c=3)",
    }
    assert short_names(labels) == labels
    long = {
        "svd(rank=8, group_size=64, act_order=false)": "svd (rank=8, group_s…alse)",
        "svd": "svd",
    }
    assert short_names(long) == long
    assert max(map(len, long.values())) <= chosen.LONGEST


@pytest.mark.parametrize("wanted", [(), ("plugin_3", "plugin_9", "plugin_15", "plugin_21")])
def test_strategies_of_a_panel_differ_in_colour_and_in_marker(wanted: tuple[str, ...]) -> None:
    """For a colour-blind reader two colours may be one: see below."""
    shown = panels(CROWD, wanted)
    looks = chosen.looks(shown, short_names(c["label"] for c in CROWD))
    for panel in shown:
        own = [looks[line.name.removesuffix("(task_ids=inferred)")] for line in panel.named]
        assert len({look["color"] for look in own}) == len(own) >= NAMED
        assert len({look["marker"] for look in own}) == min(len(own), 9)
        assert chosen.GREY not in {look["color"] for look in own}


# Machado, Oliveira and Fernandes 2009, A physiologically-based model for simulation of colour vision deficiency: all of
# it missing; applied to linear RGB
DEFICIENCIES = {
    "protan": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deutan": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritan": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}


def seen(colour: str, deficiency: str) -> str:
    linear = np.array(
        [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    )
    mixed = np.clip(np.array(DEFICIENCIES[deficiency]) @ linear, 0, 1)
    return to_hex(np.where(mixed <= 0.0031308, 12.92 * mixed, 1.055 * mixed ** (1 / 2.4) - 0.055))


@pytest.mark.parametrize("deficiency", DEFICIENCIES)
def test_the_first_colours_stay_apart_for_colour_blind_readers_and_not_all_do(
    deficiency: str,
) -> None:
    """By CIEDE2000; 10 is what two lines on one page need. So the first eight are told apart by colour alone."""

    def nearest(colours: tuple[str, ...]) -> float:
        labs = [lab(seen(colour, deficiency)) for colour in colours]
        return min(distance(a, b) for a, b in itertools.combinations(labs, 2))

    assert nearest(PALETTE[:8]) > 10 > nearest(PALETTE)
    for colour in PALETTE[:8]:
        assert distance(lab(seen(colour, deficiency)), lab(seen(REST, deficiency))) > 10
