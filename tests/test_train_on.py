"""A task trained on another model's answers, from a folder that `transfer build` made."""

from __future__ import annotations

import json

import pytest

from cl_graft.config import RunConfig
from cl_graft.errors import CLGraftError, UnknownName
from cl_graft.experiment import cell
from cl_graft.experiment.identity import inputs
from cl_graft.experiment.prepare import prepare
from cl_graft.task import Example, Pair
from cl_graft.transfer import folder

SFT = [{"prompt": f"Q: {i}+1?\nA: ", "completion": f"#### {i + 1}"} for i in range(8)]
DPO = [{"prompt": r["prompt"], "chosen": r["completion"], "rejected": "#### 0"} for r in SFT[:4]]


def built(out, sft=SFT, dpo=DPO):
    """A finished build, as far as reading it goes."""
    out.mkdir()
    folder.begin(out, {part: {} for part in folder.PARTS})
    for name in folder.FILES:
        rows = {folder.SFT: sft, folder.DPO: dpo}.get(name, [])
        (out / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder.finish(out)
    return out


def config(tmp_path, data, dpo=False, **more):
    sizes = {
        "steps": 2,
        "batch": 4,
        "train_size": 16,
        "test_size": 4,
        "tasks": "math,cipher",
        "dpo": dpo,
    }
    return RunConfig(
        scenario="mini",
        strategy="individual",
        model="nano-llama",
        options={"mini": sizes},
        out=tmp_path / "out",
        wandb="off",
        train_on=data,
        **more,
    )


def test_rows_and_pairs_take_the_place_of_the_tasks_own(tmp_path):
    scenario, *_ = prepare(config(tmp_path, {"math": built(tmp_path / "m")}))
    math, cipher = scenario.tasks
    assert math.train == tuple(Example(r["prompt"], r["completion"]) for r in SFT)
    assert math.pairs == tuple(Pair(**r) for r in DPO)
    assert len(cipher.train) == 16 and cipher.pairs == ()
    assert len(math.test) == 4, "what is measured stays"


def test_another_data_set_is_another_cell_and_other_training(tmp_path):
    wanted = [
        config(tmp_path, {}),
        config(tmp_path, {"math": built(tmp_path / "one")}),
        config(tmp_path, {"math": built(tmp_path / "two", sft=SFT[:4])}),
    ]
    assert len({c.cell for c in wanted}) == 3
    for one in wanted[1:]:
        cell.run(one)
    rows = sorted(
        json.loads(f.read_text())["rows"]
        for f in (tmp_path / "out").glob("cache/stages/*/stage.json")
    )
    assert rows == [4, 8, 16], "cipher is trained once, math twice"


def test_a_preference_half_trains_on_the_given_pairs(tmp_path):
    found = cell.run(
        config(tmp_path, {"math": built(tmp_path / "m"), "cipher": built(tmp_path / "c")}, dpo=True)
    )
    assert found["complete"]
    about = [
        json.loads(f.read_text()) for f in (tmp_path / "out").glob("cache/stages/*/stage.json")
    ]
    assert sorted((a["config"]["kind"], a["rows"]) for a in about) == [
        ("dpo", 4),
        ("dpo", 4),
        ("sft", 8),
        ("sft", 8),
    ]
    assert not (tmp_path / "out" / "cache" / "pairs").exists(), "nothing is sampled"


def test_what_cannot_be_trained_on_is_refused_before_anything_starts(tmp_path):
    good = built(tmp_path / "good")
    with pytest.raises(UnknownName, match="did you mean math"):
        prepare(config(tmp_path, {"maths": good}))
    with pytest.raises(CLGraftError, match="no preference pairs for task 'math'"):
        prepare(config(tmp_path, {"math": built(tmp_path / "none", dpo=[])}, dpo=True))
    with pytest.raises(CLGraftError, match="holds no build.json"):
        prepare(config(tmp_path, {"math": tmp_path}))
    (good / folder.SFT).write_text("{}")
    with pytest.raises(CLGraftError, match="not as the build left it"):
        prepare(config(tmp_path, {"math": good}))


def test_a_folder_that_holds_test_prompts_is_refused(tmp_path):
    """Made from a file of prompts, it may hold anything; pairs count, too."""
    asked = prepare(config(tmp_path, {}))[0].tasks[0].test[:2]
    rows = [{"prompt": e.prompt, "completion": "#### 1"} for e in asked]
    with pytest.raises(CLGraftError, match="trains task 'math' on 2 of its own test prompts"):
        prepare(config(tmp_path, {"math": built(tmp_path / "sft", sft=[*SFT, *rows])}))
    pair = {"prompt": asked[0].prompt, "chosen": "#### 1", "rejected": "#### 0"}
    with pytest.raises(CLGraftError, match="on 1 of its own test prompts; build it again"):
        prepare(config(tmp_path, {"math": built(tmp_path / "dpo", dpo=[*DPO, pair])}, dpo=True))


def test_each_seed_may_have_a_folder_of_its_own_and_one_name_in_tables(tmp_path):
    built(tmp_path / "m-0")
    built(tmp_path / "m-1", sft=SFT[:4])
    cells = [config(tmp_path, {"math": tmp_path / "m-{seed}"}, seed=seed) for seed in (0, 1)]
    assert [len(prepare(one)[0].tasks[0].train) for one in cells] == [8, 4]
    assert inputs(cells[0])["data"] != inputs(cells[1])["data"]
    assert cells[0].label == cells[1].label and cells[0].cell != cells[1].cell
