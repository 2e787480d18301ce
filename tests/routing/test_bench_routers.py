"""The benchmark of routers: its figures by hand, and what it writes."""

from __future__ import annotations

import json

import pytest
import torch

from cl_graft.bench.routers import Asked, _rejected, markdown, write
from cl_graft.evaluation.features import Features
from cl_graft.routing.base import View
from cl_graft.skillpack.live.grafted import Grafted
from tests.routing.test_routers import router


def test_the_roc_by_hand() -> None:
    """Own prompts score 3 and 4, strange ones 1 and 3.5: three of four pairs are in order."""
    own = torch.tensor([[3.0, 0.0], [1.0, 4.0]])
    strange = torch.tensor([[1.0, 0.0], [3.5, 1.0]])
    held = torch.arange(101.0)[:, None] / 20
    found = _rejected(own, strange, held)
    assert found["AUC"] == 0.75
    assert found["own to the base at 0.05"] == 0.0
    lower = _rejected(own, strange, held + 2.9)  # its 5 % lie at 3.15
    assert lower["own to the base at 0.05"] == 0.5 == lower["strange to the base at 0.05"]


def test_what_is_measured_of_a_router(nano, tiny_scenario, tmp_path) -> None:
    """Two tasks that lie apart; of scores only those under the pack that was chosen count."""
    model, tokenizer = nano
    view = View(Grafted(model), tokenizer, Features(model, tokenizer), [])
    count = len(tiny_scenario.tasks[0].test)
    scores = [[[1.0] * count, [0.0] * count], [[0.0] * count, [0.5] * count]]
    asked = Asked(view, tiny_scenario.tasks, ["zzz ### 99"] * 3, scores, 0)
    found = asked.figures(router("centroids"))
    assert found["accuracy"] == pytest.approx(
        (found["accuracy, math"] + found["accuracy, cipher"]) / 2
    )
    lost = 100 * (1 - found["accuracy, math"]) + 50 * (1 - found["accuracy, cipher"])
    assert found["points lost"] == pytest.approx(lost / 2)
    assert found["bytes"] > 2 * 8 * 48 and found["time over a forward"] > 0
    figures = {name: [value, None] for name, value in found.items()}
    row = {"stream": "mini", "router": "centroids", "seeds": 1, "figures": figures}
    write([row], tmp_path, "first")
    write([row | {"stream": "amazon and yelp"}], tmp_path, "second")
    kept = json.loads((tmp_path / "routers.json").read_text())
    assert [kept[n]["made_by"]["command"] for n in ("mini", "amazon and yelp")] == [
        "first",
        "second",
    ]
    text = (tmp_path / "routers.md").read_text()
    assert markdown([row]) in text and "## amazon and yelp" in text


def test_a_misspelt_stream_is_answered_with_the_nearest(call) -> None:
    done = call("bench", "routers", "--only", "amazon and yelb")
    assert done.code == 1 and "did you mean amazon and yelp" in done.err
