"""Cells that are stopped while a task trains go on with what the tasks before have shared."""

from __future__ import annotations

import json

import pytest

from cl_graft.config import RunConfig
from cl_graft.experiment import cell
from cl_graft.skillpack.format.file import SkillPack

SMALL = {"steps": 6, "batch": 8, "train_size": 48, "test_size": 8, "tasks": "math,cipher"}


@pytest.mark.parametrize(
    ("strategy", "options", "shared"),
    [
        ("replay", {"size": 20}, 1),
        ("agem", {"size": 20, "batch": 8}, 1),
        ("gem", {"size": 4}, 1),
        ("ewc", {"samples": 4}, 1),
        ("osf", {}, 0),
        ("slao", {}, 1),
        ("i_lora", {"size": 20, "rank": 2}, 2),
        ("sure", {"size": 20, "rank": 2}, 2),
        ("twin_merging", {}, 2),
        ("consensus", {}, 2),
        ("dft", {}, 0),
        ("sdft", {"rate": 0.2}, 0),
        ("lamol", {"gamma": 0.5}, 0),
        ("lora_intruders", {"learning_rate_scale": 30.0}, 0),
    ],
)
def test_a_cell_stopped_in_its_second_task_ends_with_the_same_numbers(
    strategy, options, shared, tmp_path
):
    def config(out):
        return RunConfig(
            scenario="mini",
            strategy=strategy,
            model="nano-llama",
            options={"mini": SMALL, strategy: options},
            out=tmp_path / out,
            wandb="off",
        )

    def numbers(made):
        folder = made.out / made.cell
        packs = {
            str(f.relative_to(folder)): SkillPack.load(f).digest
            for f in folder.rglob("*.safetensors")
        }
        result = json.loads((folder / "result.json").read_text())
        return packs, result["matrix"], result["pack_bytes"]

    def stop(what, done, at=""):
        if what == "training cipher":
            raise KeyboardInterrupt

    whole, stopped = config("whole"), config("stopped")
    cell.run(whole)
    with pytest.raises(KeyboardInterrupt):
        cell.run(stopped, progress=stop)
    assert not (stopped.out / stopped.cell / "result.json").exists()
    cell.run(stopped)
    assert numbers(stopped) == numbers(whole)
    assert len(numbers(whole)[0]) == 2 + shared, "two packs and what they share"
