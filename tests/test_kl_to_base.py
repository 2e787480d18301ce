"""A cell measures KL to the base after each task, and a run that was stopped goes on to the same."""

from __future__ import annotations

import csv
import json
import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from cl_graft import plugins
from cl_graft.config import RunConfig
from cl_graft.evaluation.divergence import Moved, mean_per_token
from cl_graft.experiment import cache
from cl_graft.experiment.cell import run
from cl_graft.models.load import load
from cl_graft.skillpack.format.file import SkillPack
from cl_graft.skillpack.live.grafted import Grafted
from cl_graft.store.record import CellFolder
from cl_graft.store.result import collect
from cl_graft.tracking import of_experience
from tests.evaluation.test_divergence import brute

SMALL = {"steps": 6, "batch": 8, "train_size": 48, "test_size": 4, "tasks": "math,cipher"}


def config(out: Path, strategy: str = "sequential", **more: Any) -> RunConfig:
    fields: dict[str, Any] = {"options": {"mini": SMALL}, "wandb": "off", "threads": 1}
    return RunConfig(
        scenario="mini", strategy=strategy, model="nano-llama", out=out, **fields, **more
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, dict[str, Any]]:
    """A cell that is done, and its result; copy its folder before you change it."""
    made = config(tmp_path_factory.mktemp("out"), track=["csv"])
    return made, run(made)


@pytest.fixture
def halfway(whole: tuple[RunConfig, dict[str, Any]], tmp_path: Path) -> RunConfig:
    """The same cell, without its last experience and without what was kept for other cells."""
    made = config(tmp_path, track=["csv"])
    shutil.copytree(whole[0].out / whole[0].cell, made.out / made.cell)
    for name in ("result.json", "experiences/02/experience.json"):
        (made.out / made.cell / name).unlink()
    return made


def test_it_is_of_what_answers_after_each_task_on_that_tasks_test_examples(
    whole: tuple[RunConfig, dict[str, Any]],
) -> None:
    """Against two models by brute force: the base, and the base with the pack of the experience on."""
    made, result = whole
    base, tokenizer = load("nano-llama")
    tuned = deepcopy(base)
    grafted = Grafted(tuned)
    folder = CellFolder(made.out / made.cell)
    for number, task in enumerate(plugins.load("scenario", "mini")(seed=0, **SMALL).tasks, 1):
        grafted.activate([SkillPack.load(folder.pack_path(number, task.name))])
        by_hand = mean_per_token(
            [Moved(*brute(base, tuned, tokenizer, (e.prompt, e.completion))) for e in task.test]
        )
        told = result["kl_to_base"][number - 1]
        assert by_hand is not None and told["tokens"] == by_hand["tokens"] and told["n"] == 4
        for way in ("forward", "reverse"):
            assert told[way] == pytest.approx(by_hand[way], rel=1e-4)
            assert told[way]["value"] > 0.01


def test_records_trackers_and_the_cache_tell_it(
    whole: tuple[RunConfig, dict[str, Any]],
) -> None:
    made, result = whole
    folder = CellFolder(made.out / made.cell)
    records = folder.experiences()
    assert [r["kl_to_base"] for r in records] == [None, *result["kl_to_base"]]
    first = result["kl_to_base"][0]["forward"]
    assert of_experience(records[1])["kl_to_base/forward"] == first["value"]
    assert not any(key.startswith("kl") for key in of_experience(records[0]))
    with (folder.path / "tracking/scores.csv").open(newline="") as file:
        rows = [r for r in csv.DictReader(file) if r["metric"] == "kl_to_base forward"]
    assert [(r["experience"], r["task"]) for r in rows] == [("1", "math"), ("2", "cipher")]
    assert [float(rows[0][key]) for key in ("value", "stderr", "n")] == [*first.values(), 4]
    kept = [e for e in cache.entries(made.store) if e.kind == "divergence"]
    assert sorted(e.about.split()[0] for e in kept) == ["cipher", "math"]
    assert all(e.current for e in kept)


def test_a_stopped_run_goes_on_to_the_same(
    whole: tuple[RunConfig, dict[str, Any]], halfway: RunConfig
) -> None:
    assert run(halfway)["kl_to_base"] == whole[1]["kl_to_base"]
    files = list(halfway.store.glob("divergences/*.jsonl"))
    assert len(files) == 1, "of the first task it is in the record"


def test_a_cell_that_an_earlier_version_began_goes_on(
    whole: tuple[RunConfig, dict[str, Any]], halfway: RunConfig
) -> None:
    """Its first experience has no such field and stays unmeasured; so a report of it says."""
    file = halfway.out / halfway.cell / "experiences/01/experience.json"
    record = json.loads(file.read_text())
    del record["kl_to_base"]
    file.write_text(json.dumps(record))
    assert collect(halfway.out / halfway.cell)["kl_to_base"] == [None]
    result = run(halfway)
    assert result["kl_to_base"] == [None, whole[1]["kl_to_base"][1]]


def test_methods_with_the_same_weights_share_it(whole: tuple[RunConfig, dict[str, Any]]) -> None:
    """The first task of a method with a pack a task ends in the weights of plain fine-tuning."""
    made, result = whole
    before = set(made.store.glob("divergences/*.jsonl"))
    other = run(config(made.out, "individual"))
    assert other["kl_to_base"][0] == result["kl_to_base"][0]
    assert len(set(made.store.glob("divergences/*.jsonl")) - before) == 1
