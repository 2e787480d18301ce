"""General ability is measured by what answers: each pack of a method that is told the task, a router's choice, a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cl_graft.config import RunConfig
from cl_graft.evaluation.examiner import Examiner
from cl_graft.evaluation.scorers import Examinee, score
from cl_graft.experiment import cell
from cl_graft.models.load import load
from cl_graft.skillpack.format.file import SkillPack
from cl_graft.store.files import read_json
from cl_graft.store.record import CellFolder
from cl_graft.task import Task

BITS = '''
"""`mini`, with general ability in bits per byte: what a model of 60 k parameters says is never right."""

from dataclasses import replace
from cl_graft import plugins


def bits(*, seed, data_dir=None):
    made = plugins.load("scenario", "mini")(seed=seed, **OPTIONS)
    return replace(made, name="bits", general=replace(made.general, score="neg_bits_per_byte"))
'''
SMALL = {"steps": 20, "batch": 8, "train_size": 48, "test_size": 24, "tasks": "math,cipher"}


def config(out: Path, strategy: str = "individual", **more: Any) -> RunConfig:
    scenario = out / "bits.py"
    scenario.write_text(BITS.replace("OPTIONS", repr(SMALL)))
    plain = {"scenario": str(scenario), "model": "nano-llama", "wandb": "off", "threads": 1}
    return RunConfig(strategy=strategy, out=out, track=["csv"], **plain, **more)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("out")


@pytest.fixture(scope="module")
def scored() -> list[tuple[str, int]]:
    """Each task that was scored, and how many examples, in the run of `told`."""
    return []


@pytest.fixture(scope="module")
def told(out: Path, scored: list[tuple[str, int]]) -> dict[str, Any]:
    """A method that is told the task."""
    scores = Examiner._score

    def counted(self: Examiner, task: Task, *base: Any) -> Any:
        scored.append((task.name, len(task.test)))
        return scores(self, task, *base)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Examiner, "_score", counted)
        return cell.run(config(out))


@pytest.fixture(scope="module")
def general() -> Task:
    from cl_graft import plugins

    made = plugins.load("scenario", "mini")(seed=0, **SMALL).general
    assert made
    return made


def score_of(model: Any, tokenizer: Any, general: Task) -> float:
    with torch.no_grad():
        examinee = Examinee(model, tokenizer, 8, 512, False)
        (outcomes,) = score(examinee, general.test, ["neg_bits_per_byte"]).values()
    return sum(o.score for o in outcomes) / len(outcomes)


def test_each_pack_is_on_when_it_is_measured(
    told: dict[str, Any], out: Path, general: Task
) -> None:
    """Against the base with the pack's delta added here by hand."""
    folder = CellFolder(out / config(out).cell)
    by_hand = []
    for experience, task in enumerate(told["tasks"], 1):
        model, tokenizer = load("nano-llama")
        pack = SkillPack.load(folder.pack_path(experience, task))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in pack.tensors:
                    parameter.copy_((parameter.float() + pack.delta(name)).to(parameter.dtype))
        by_hand.append(score_of(model, tokenizer, general))
    base = score_of(*load("nano-llama"), general)
    assert told["general_packs"] == [[None, None], [by_hand[0], None], by_hand]
    assert told["general"] == [base, by_hand[0], sum(by_hand) / 2]
    assert len({base, *by_hand}) == 3, "the packs change it, each otherwise"


def test_a_pack_is_measured_once(told: dict[str, Any], scored: list[tuple[str, int]]) -> None:
    assert scored.count(("general", 24)) == 1 + len(told["tasks"])
    assert all(count == 24 for _, count in scored)


def test_what_was_measured_is_told_line_by_line(told: dict[str, Any], out: Path) -> None:
    folder = CellFolder(out / config(out).cell)
    record = folder.experiences()[-1]
    assert list(record["general"]) == ["math", "cipher"] == list(record["general_active"])
    assert [len(packs) for packs in record["general_active"].values()] == [1, 1]
    assert "general" not in record["routing"], "nobody chose a task for these prompts"
    text = (folder.experience_path(2) / "examples.jsonl").read_text()
    assert text.count('"task": "general:general with cipher"') == 24
    assert '"task": "general:general",' not in text
    told_at = [
        line.split(",")[:2]
        for line in (folder.path / "tracking/scores.csv").read_text().splitlines()
    ]
    assert [task for at, task in told_at if at == "2" and task.startswith("general")] == [
        "general with math",
        "general with cipher",
    ]


def test_a_router_answers_general_prompts_and_its_packs_are_measured_too(
    told: dict[str, Any], out: Path
) -> None:
    routed = cell.run(config(out, task_ids="inferred"))
    assert routed["general_packs"] == told["general_packs"], "they are the same packs"
    folder = CellFolder(out / config(out, task_ids="inferred").cell)
    for record in folder.experiences()[1:]:
        assert list(record["general"])[0] == ""
        assert sum(record["routing"]["general"].values()) == 24
    chosen = folder.experiences()[-1]["general"][""]["score"]["value"]
    assert routed["general"][-1] == chosen
    assert routed["general"][1] == routed["general_packs"][1][0], "one pack, nothing to choose"


def test_one_model_for_all_prompts_has_no_ability_by_pack(out: Path) -> None:
    alike = cell.run(config(out, "sequential"))
    assert alike["general_packs"] == [[None, None]] * 3
    assert None not in alike["general"]


def test_a_whole_cell_gives_its_general_outcomes_back(told: dict[str, Any], out: Path) -> None:
    """Its last experience taken away, it is measured again from there and comes to the same."""
    folder = CellFolder(out / config(out).cell)
    for name in ("result.json", "experiences/02/experience.json"):
        (folder.path / name).unlink()
    again = cell.run(config(out))
    assert read_json(folder.path / "result.json") == again
    for key in ("general", "general_packs", "matrix"):
        assert again[key] == told[key]
