"""A run that was stopped, anywhere and by anything, goes on to the numbers it would have had."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import subprocess
from collections.abc import Iterator
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

import pytest

import cl_graft
from cl_graft.config import RunConfig
from cl_graft.experiment.cell import run
from cl_graft.skillpack.format.file import SkillPack, TruncatedPack, WrongBase
from cl_graft.store.files import RecordError, write_text
from cl_graft.store.record import CellFolder
from cl_graft.store.result import collect
from tests import kills

MOVING = '''
from dataclasses import replace
from cl_graft import plugins


def moving(*, seed, data_dir=None, train_size: int = 32):
    """Two tasks of `mini` in bits per byte, a score that every step of training moves."""
    make = plugins.load("scenario", "mini")
    made = make(seed=seed, tasks="math,cipher", steps=4, batch=8, train_size=train_size, test_size=8)
    return replace(made, tasks=tuple(replace(t, score="neg_bits_per_byte") for t in made.tasks))
'''

# Dies once, where the file `die` says, when one pack is there already.
MORTAL = """
import os
from pathlib import Path
from cl_graft import Strategy

WISH = Path(__file__).with_name("die")


def die(where):
    if WISH.exists() and WISH.read_text() == where:
        WISH.unlink()
        os._exit(9)


class mortal(Strategy):
    keeps = "latest"

    def learn(self, task, context):
        kept = context.top_magnitude(self.fine_tune(task, context))
        if self.packs:
            die("trained")
        return kept

    def measure(self, task, number):
        if len(self.packs) == 2:
            die("packed")
        return super().measure(task, number)
"""


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("plugins")
    files = {"moving": folder / "moving.py", "mortal": folder / "mortal.py"}
    files["moving"].write_text(MOVING)
    files["mortal"].write_text(MORTAL)
    return files


def config(plugin: dict[str, Path], strategy: str, out: Path, **fields: Any) -> RunConfig:
    return RunConfig(
        scenario=str(plugin["moving"]),
        strategy=strategy,
        model="nano-llama",
        out=out,
        wandb="off",
        **fields,
    )


def cell(made: RunConfig) -> Path:
    return made.out / made.cell


def numbers(folder: Path) -> tuple[Any, ...]:
    """All that must not depend on how often a run was stopped."""
    result = json.loads((folder / "result.json").read_text())
    packs = {f.name: SkillPack.load(f).digest for f in (folder / "packs").rglob("*.safetensors")}
    return packs, {key: result[key] for key in kills.RESULT}


def files(folder: Path) -> dict[str, bytes]:
    """All but what says how it went when somebody tried last."""
    how = ("state.json", "traceback.txt")
    found = [f for f in folder.rglob("*") if f.is_file() and f.name not in how]
    return {str(f.relative_to(folder)): f.read_bytes() for f in found}


def forget_the_end(folder: Path, whole: int) -> None:
    """What is on disk when a run was stopped after `whole` stages, less the training that runs share."""
    (folder / "result.json").unlink()
    shutil.rmtree(folder.parent / "stages", ignore_errors=True)
    for stage in sorted((folder / "experiences").iterdir())[whole:]:
        shutil.rmtree(stage)
        for pack in (folder / "packs").glob(f"{stage.name}-*"):
            pack.unlink()


@pytest.fixture(scope="module")
def graftllm(plugin: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole cell; copy it before you change it."""
    made = config(plugin, "graftllm", tmp_path_factory.mktemp("whole"))
    run(made)
    return cell(made)


@pytest.fixture
def halfway(plugin: dict[str, Path], graftllm: Path, tmp_path: Path) -> RunConfig:
    """The same cell, stopped when the base and the first of two tasks were done."""
    made = config(plugin, "graftllm", tmp_path)
    shutil.copytree(graftllm, cell(made))
    forget_the_end(cell(made), 2)
    return made


# --- the same numbers --------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_numbers_and_another_seed_others(
    plugin: dict[str, Path], graftllm: Path, tmp_path: Path
) -> None:
    again, other = (config(plugin, "graftllm", tmp_path, seed=seed) for seed in (0, 1))
    run(again)
    run(other)
    assert numbers(cell(again)) == numbers(graftllm)
    assert numbers(cell(other))[1]["matrix"] != numbers(graftllm)[1]["matrix"]
    assert not set(numbers(cell(other))[0].values()) & set(numbers(graftllm)[0].values())


def test_the_result_is_the_last_file_that_is_written(
    plugin: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a kill leaves half-written is swept by who goes on with the cell, and nobody goes on with a complete one."""
    begun: list[str] = []

    def noted(path: Path, text: str) -> None:
        begun.append(path.name)
        write_text(path, text)

    monkeypatch.setattr("cl_graft.store.files.write_text", noted)
    made = config(plugin, "magnitude", tmp_path)
    run(made)
    assert begun[-2:] == ["state.json", "result.json"]
    assert json.loads((cell(made) / "state.json").read_text())["state"] == "done"


def test_a_cell_that_was_killed_before_its_last_file_waits(tmp_path: Path) -> None:
    folder = CellFolder(tmp_path / "cell")
    with folder.lock():
        folder.mark("done")
        assert folder.state()["state"] == "running"
    assert folder.state()["state"] == "waiting"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        ("sequential", {}),  # trained on from the last pack
        ("lora", {"convention": "trained_on"}),  # from the factors of the last pack
        ("lora", {"convention": "summed"}),  # from all packs
        ("model_grafting", {"epochs": 2, "batches": 2}),
        ("model_tailor", {}),
        ("task_arithmetic", {}),  # all packs merged anew
    ],
)
def test_a_run_stopped_after_any_stage_goes_on_with_the_same_numbers(
    plugin: dict[str, Path], strategy: str, options: dict[str, Any], tmp_path: Path
) -> None:
    made = config(plugin, strategy, tmp_path, options={strategy: options})
    run(made)
    expected = numbers(cell(made))
    for whole in (2, 1):
        forget_the_end(cell(made), whole)
        kept = files(cell(made))
        run(made)
        assert numbers(cell(made)) == expected
        assert files(cell(made)).items() >= kept.items(), "what was whole is not written again"


# --- killed ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server() -> ForkServerContext:
    """Processes that have imported everything already and so begin to work at once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["cl_graft.strategy", "cl_graft.strategy.graftllm", "trl", "datasets"]
    )
    return context


def begin(server: ForkServerContext, made: RunConfig) -> ForkServerProcess:
    process = server.Process(target=run, args=(made,))
    process.start()
    return process


def assert_whole(folder: Path) -> None:
    """Whatever a report or the next run would take for finished can be read and is finished."""
    stages = CellFolder(folder).experiences()
    for record in stages[1:]:
        name = f"{record['experience']:02d}-{record['task']}.safetensors"
        assert SkillPack.load(folder / "packs" / name).digest == record["pack"]
    assert collect(folder)["complete"] == (len(stages) == 3)
    assert len(stages) == 3 or not (folder / "result.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("where", ["trained", "packed"])
def test_death_between_training_and_the_record_of_the_stage(
    plugin: dict[str, Path], where: str, server: ForkServerContext, tmp_path: Path
) -> None:
    spared = config(plugin, str(plugin["mortal"]), tmp_path / "spared")
    made = config(plugin, str(plugin["mortal"]), tmp_path / "struck")
    run(spared)
    plugin["mortal"].with_name("die").write_text(where)
    process = begin(server, made)
    process.join()
    assert process.exitcode == 9
    stages = sorted(f.parent.name for f in cell(made).glob("experiences/*/experience.json"))
    packs = sorted(f.name[:2] for f in (cell(made) / "packs").iterdir())
    assert stages == ["00", "01"]
    assert packs == (["01"] if where == "trained" else ["01", "02"])
    run(made)
    assert numbers(cell(made)) == numbers(cell(spared))


def test_what_a_kill_left_half_written_is_swept_away(halfway: RunConfig, graftllm: Path) -> None:
    torn = [
        ".experience.json.7.tmp",
        "experiences/01/.experience.json.7.tmp",
        "packs/.0123456789abcdef.tmp",
    ]
    for name in torn:
        (cell(halfway) / name).write_text('{"stage":')
    run(halfway)
    assert not list(cell(halfway).rglob("*.tmp"))
    assert numbers(cell(halfway)) == numbers(graftllm)


# --- refused, with nothing lost ----------------------------------------------------------------


def refused(made: RunConfig, error: type[Exception], *words: str) -> None:
    """Running raises `error` in one sentence with these words and changes no file."""
    before = files(cell(made))
    with pytest.raises(error) as caught:
        run(made)
    text = str(caught.value)
    assert all(word in text for word in words), text
    assert "\n" not in text
    assert text.endswith(".")
    assert files(cell(made)) == before


def test_a_truncated_pack(halfway: RunConfig) -> None:
    pack = cell(halfway) / "packs" / "01-math.safetensors"
    pack.write_bytes(pack.read_bytes()[:-1])
    refused(
        halfway, TruncatedPack, str(pack), f"{pack.stat().st_size} of {pack.stat().st_size + 1}"
    )


def test_a_pack_of_another_base(halfway: RunConfig) -> None:
    file = cell(halfway) / "packs" / "01-math.safetensors"
    pack = SkillPack.load(file)
    SkillPack(pack.tensors, pack.task, pack.method, pack.options, "0" * 32).save(file)
    refused(halfway, WrongBase, str(file), "0" * 32, pack.base)


def test_another_pack_than_the_stage_was_measured_with(halfway: RunConfig) -> None:
    file = cell(halfway) / "packs" / "01-math.safetensors"
    pack = SkillPack.load(file)
    SkillPack({}, pack.task, pack.method, pack.options, pack.base).save(file)
    refused(halfway, RecordError, str(cell(halfway)), "experience 1", "delete")


@pytest.mark.parametrize("lines", [0, 1, -1])
def test_outcomes_that_are_not_all_there(halfway: RunConfig, lines: int) -> None:
    file = cell(halfway) / "experiences" / "01" / "examples.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:lines]))
    refused(halfway, RecordError, str(file), "delete")


@pytest.mark.parametrize("name", ["cell.json", "experiences/01/experience.json"])
def test_a_record_that_is_no_json(halfway: RunConfig, name: str) -> None:
    file = cell(halfway) / name
    file.write_text(file.read_text()[:-3])
    refused(halfway, RecordError, str(file), "delete")


@pytest.mark.parametrize("complete", [False, True])
def test_a_folder_of_another_version(
    plugin: dict[str, Path], halfway: RunConfig, complete: bool
) -> None:
    if complete:
        run(halfway)
    file = cell(halfway) / "cell.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 7}))
    refused(halfway, RecordError, str(cell(halfway)), "format 7", "--out")
    with pytest.raises(RecordError, match="format 7"):
        collect(cell(halfway))


def test_other_data_than_the_run_was_begun_with(
    plugin: dict[str, Path], halfway: RunConfig, tmp_path: Path
) -> None:
    file = cell(halfway) / "cell.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"data": "0" * 32}))
    refused(halfway, RecordError, str(cell(halfway)), "another data than now", "--out")


@pytest.mark.parametrize("complete", [False, True])
def test_another_experiment_in_the_same_folder(halfway: RunConfig, complete: bool) -> None:
    if complete:
        run(halfway)
    file = cell(halfway) / "cell.json"
    found = json.loads(file.read_text())
    found["config"]["budget"] = "20%"
    file.write_text(json.dumps(found))
    refused(halfway, RecordError, str(cell(halfway)), "another budget than now", "--out")


def test_two_processes_at_once(halfway: RunConfig, graftllm: Path) -> None:
    with CellFolder(cell(halfway)).lock():
        refused(halfway, RecordError, str(cell(halfway)), "another process")
    run(halfway)
    assert numbers(cell(halfway)) == numbers(graftllm)


@pytest.mark.parametrize("damage", ["pack", "outcomes", "lines", "experience", "cell"])
def test_what_is_to_be_deleted_is_computed_anew(
    damage: str, halfway: RunConfig, graftllm: Path
) -> None:
    """The folder that the sentence names, and nothing else; the numbers are those of a run that nothing befell."""
    place = cell(halfway)
    experience = place / "experiences" / "01"
    if damage == "pack":
        file = place / "packs" / "01-math.safetensors"
        pack = SkillPack.load(file)
        SkillPack({}, pack.task, pack.method, pack.options, pack.base).save(file)
    elif damage in ("outcomes", "lines"):
        file = experience / "examples.jsonl"
        lines = file.read_text().splitlines(keepends=True)
        file.write_text("".join(lines[:1] if damage == "outcomes" else ["{\n", *lines]))
    else:
        name = "cell.json" if damage == "cell" else "experience.json"
        file = (place if damage == "cell" else experience) / name
        file.write_text(file.read_text()[:-3])
    whole = damage in ("lines", "experience", "cell")
    refused(
        halfway,
        RecordError,
        "delete its cell's folder"
        if whole
        else "delete that experience's folder and the later ones",
    )
    if whole:
        shutil.rmtree(place)
    for later in sorted(place.glob("experiences/*"))[1:]:
        shutil.rmtree(later)
    run(halfway)
    assert numbers(place) == numbers(graftllm)


# --- a disk that refuses -----------------------------------------------------------------------


def mount(*arguments: str) -> bool:
    done = subprocess.run(["mount", *arguments], capture_output=True, check=False)
    return done.returncode == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 600 KiB: room for the training of two tasks, but for one pack only."""
    folder = tmp_path / "small"
    folder.mkdir()
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("only root may mount a small file system")
    if not mount("-t", "tmpfs", "-o", "size=600k", "none", str(folder)):
        pytest.skip("this system lets not even root mount a file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_loses_nothing_and_more_room_is_enough(
    plugin: dict[str, Path], graftllm: Path, small_disk: Path
) -> None:
    made = config(plugin, "graftllm", small_disk)
    with pytest.raises(cl_graft.CLGraftError) as caught:
        run(made)
    assert "disk is full" in str(caught.value) or "No space left" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(CellFolder(cell(made)).experiences()) == 2
    assert_whole(cell(made))
    assert mount("-o", "remount,size=8m", str(small_disk))
    run(made)
    assert numbers(cell(made)) == numbers(graftllm)


@pytest.mark.parametrize("begun", [False, True])
def test_a_disk_that_may_only_be_read(
    plugin: dict[str, Path], graftllm: Path, small_disk: Path, begun: bool
) -> None:
    made = config(plugin, "graftllm", small_disk)
    if begun:
        shutil.copytree(graftllm / "experiences" / "00", cell(made) / "experiences" / "00")
        shutil.copy(graftllm / "cell.json", cell(made))
    assert mount("-o", "remount,ro", str(small_disk))
    if not begun:
        made = made.model_copy(update={"out": small_disk / "new"})
    with pytest.raises(RecordError, match="Read-only file system.*choose another --out") as caught:
        run(made)
    assert str(made.out) in str(caught.value)


def test_a_file_where_the_folder_should_be(plugin: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "results").write_text("mine")
    with pytest.raises(RecordError, match="choose another --out"):
        run(config(plugin, "graftllm", tmp_path / "results"))
    assert (tmp_path / "results").read_text() == "mine"
