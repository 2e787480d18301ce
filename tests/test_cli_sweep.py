"""A sweep from its file: written, checked, run, looked at, continued."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from cl_graft.cli.options import sweep_from
from cl_graft.store.record import CellFolder
from cl_graft.sweep_config import Ray
from tests.command import Call, assert_refused

TINY = {"tasks": "math,cipher", "steps": 2, "batch": 4, "train_size": 8, "test_size": 4}


@pytest.fixture(autouse=True)
def an_empty_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CL_GRAFT_ALLOW_CODE_EXECUTION", raising=False)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    fields = {
        "scenarios": [{"mini": TINY}],
        "strategies": ["individual", {"magnitude": {}}],
        "models": "nano-llama",
        "wandb": "off",
        "workers": 1,
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(fields))
    return tmp_path / "mine.yaml"


def test_the_file_that_init_writes_is_valid(call: Call) -> None:
    assert call("init").code == 0
    done = call("validate", "sweep.yaml")
    assert (done.code, done.out.splitlines()[-1]) == (0, "sweep.yaml is valid: 21 cells.")


def test_options_take_the_place_of_the_file_s_fields(call: Call, file: Path) -> None:
    done = call("validate", "--seeds", "1,2", "--strategies", "lora", str(file))
    named = [line for line in done.out.splitlines() if "__" in line]
    assert [line.split("__")[-1] for line in named] == ["seed1", "seed2"]
    file.write_text(file.read_text() + "workers: 3\nray: {cpus: 2}\ntrain_on: {math: x}\n")
    made = sweep_from(file, {"workers": 0, "ray": "gpus=1,memory=1000", "train_on": []})
    assert (made.workers, made.ray) == (0, Ray(gpus=1, memory=1000))
    assert made.train_on == {"math": Path("x")}


def test_init_leaves_a_file_that_is_there(call: Call, file: Path) -> None:
    before = file.read_text()
    assert_refused(call("init", str(file)), "is there already")
    assert file.read_text() == before


def test_validate_finds_what_would_stop_a_sweep(call: Call, file: Path) -> None:
    file.write_text(file.read_text().replace("magnitude", "magnitud"))
    assert_refused(call("validate", str(file)), "did you mean magnitude")
    file.write_text("scenarios: mini\nstrategies: lora\n")
    assert_refused(call("validate", str(file)), "--allow-code-execution")
    assert call("validate", str(file), "--allow-code-execution").code == 0


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("models: mini-lama", "did you mean mini-llama"),
        ("mirror: nothing://x", "give a URL that fsspec knows"),
        ("launch: {processes: 3}", "3 processes with micro-batches of 5 cannot make a batch of 16"),
        ("launch: {processes: 2, hostfile: no-file}", "no-file cannot be read"),
    ],
)
def test_validate_looks_at_all_that_cells_are_run_with(
    line: str, words: str, call: Call, file: Path
) -> None:
    file.write_text(f"scenarios: mini\nstrategies: lora\n{line}\n")
    assert_refused(call("validate", str(file), "--allow-code-execution"), words)


@pytest.mark.slow
def test_a_sweep_from_its_file_with_options_over_it(call: Call, file: Path, tmp_path: Path) -> None:
    """Here the options add a seed; what was asked for is kept beside the results, and can be resumed."""
    assert call("sweep", "--seeds", "3", str(file)).code == 0
    names = {f.parent.name.split("__")[1] for f in tmp_path.glob("results/*seed3/result.json")}
    assert names == {"individual", "magnitude"}
    (stopped,) = tmp_path.glob("results/mini__magnitude__*")
    (stopped / "result.json").unlink()
    done = call("status", "results")
    assert done.out.splitlines()[-1] == "1 done, 0 running, 1 waiting, 0 failed"
    done = call("sweep", "--resume")
    assert done.code == 0 and (stopped / "result.json").is_file()
    assert call("status", "results").out.splitlines()[-1].startswith("2 done")


def test_resume_needs_a_sweep_and_takes_no_other(call: Call, file: Path) -> None:
    assert_refused(call("sweep", "--resume"), "no results/sweep.yaml")
    assert_refused(call("sweep", "--resume", str(file)), "leave out --resume")


def test_a_sweep_needs_scenarios_and_strategies(call: Call) -> None:
    assert_refused(call("sweep", "--strategies", "lora"), "the command names no scenarios")
    assert_refused(call("sweep", "--scenarios", "mini"), "the command names no strategies")


def test_the_status_of_a_cell_that_failed_is_its_reason(call: Call, tmp_path: Path) -> None:
    CellFolder(tmp_path / "results" / "a").failed("no luck.", "Traceback")
    CellFolder(tmp_path / "results" / "b").mark("waiting")
    assert call("status").out.splitlines() == [
        "failed     a    - experiences  no luck.",
        "waiting    b    - experiences  -",
        "0 done, 0 running, 1 waiting, 1 failed",
    ]
    assert_refused(call("status", "nowhere"), "holds no cell")
