"""Weights & Biases: the offline file tells what the result tells, and W&B is never in the way."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

import cl_graft
from cl_graft.tracking import resolve
from tests.wandb_reader import Logged, read

MOVING = '''
from dataclasses import replace
from cl_graft import plugins


def moving(*, seed, data_dir=None):
    """Two tasks of `mini` in bits per byte, a score that every step of training moves."""
    make = plugins.load("scenario", "mini")
    made = make(seed=seed, tasks="math,cipher", steps=4, batch=8, train_size=32, test_size=8)
    return replace(made, tasks=tuple(replace(t, score="neg_bits_per_byte") for t in made.tasks))
'''


@pytest.fixture(scope="module")
def scenario(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("scenario") / "moving.py"
    file.write_text(MOVING)
    return str(file)


@pytest.fixture(autouse=True)
def nobody_logged_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for variable in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for variable in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / "wandb"))


def run(scenario: str, out: Path, **fields: Any) -> dict[str, Any]:
    return cl_graft.run(
        scenario=scenario, strategy="magnitude", model="nano-llama", out=out, **fields
    )


def closed(out: Path) -> Path:
    """The one offline file under `out`; W&B's own process closes it a little after the run ends."""
    (file,) = out.glob("*/tracking/wandb/offline-run-*/*.wandb")
    deadline = time.monotonic() + 30
    while read(file).exit_code is None and time.monotonic() < deadline:
        time.sleep(0.05)
    return file


@pytest.fixture(scope="module")
def both(
    scenario: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], Logged, Path]:
    """The result of a run, what its offline file holds, and where that is."""
    out = tmp_path_factory.mktemp("offline")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_DATA_DIR", str(out / "data"))
        patch.setenv("WANDB_CACHE_DIR", str(out / "cache"))
        result = run(scenario, out, wandb="offline")
    return result, read(closed(out)), closed(out).parent / "files"


def test_the_config_is_logged(both: tuple[dict[str, Any], Logged, Path]) -> None:
    result, logged, files = both
    assert logged.name == files.parents[3].name
    assert logged.name.startswith("moving__magnitude__")
    assert logged.config["strategy"] == "magnitude"
    assert logged.config["model"] == "nano-llama"
    assert (logged.config["seed"], logged.config["budget"]) == (0, "10%")
    for key in ("versions", "tasks", "budget_bytes", "base_bytes"):
        assert logged.config[key] == result[key]


def test_scores_are_logged_as_they_come(both: tuple[dict[str, Any], Logged, Path]) -> None:
    result, logged, _ = both
    assert logged.at("stage") == [0, 1, 2]
    for column, task in enumerate(result["tasks"]):
        assert logged.at(f"score/{task}") == [row[column] for row in result["matrix"]]
    assert len({tuple(row) for row in result["matrix"]}) == 3, "the scores should move"
    assert logged.at("general/score") == result["general"]


def test_training_and_costs_are_logged(both: tuple[dict[str, Any], Logged, Path]) -> None:
    result, logged, _ = both
    assert len(logged.at("train/loss")) == 16  # two tasks; mini gives each twice the four steps
    for kind, total in result["seconds"].items():
        assert sum(logged.at(f"seconds/{kind}")) == pytest.approx(total)
        assert logged.summary[f"total_seconds/{kind}"] == total
    assert sum(logged.at("tokens")) == logged.summary["total_tokens"] == result["tokens"] > 0
    assert [size for size in logged.at("pack_bytes") if size] == result["pack_bytes"]
    assert logged.summary["pack_bytes_max"] == max(result["pack_bytes"])
    assert logged.summary["base_bytes"] == result["base_bytes"]
    assert logged.summary["peak_memory_mb_max"] == result["peak_memory_mb"] > 0


def test_summary_metrics_are_logged(both: tuple[dict[str, Any], Logged, Path]) -> None:
    result, logged, _ = both
    assert {"op", "bwt", "fwt", "fm", "avalanche_forgetting"} <= set(result["metrics"])
    for name, value in result["metrics"].items():
        assert logged.summary[f"metrics/{name}"] == value
    assert logged.exit_code == 0


def test_the_matrix_is_a_table_and_an_image(both: tuple[dict[str, Any], Logged, Path]) -> None:
    result, logged, files = both
    (table,), (image,) = logged.at("matrix"), logged.at("heatmap")
    assert table["_type"] == "table-file"
    assert image["_type"] == "image-file"
    held = json.loads((files / table["path"]).read_text())
    assert held["columns"] == ["stage", *result["tasks"]]
    assert held["data"] == [[stage, *row] for stage, row in enumerate(result["matrix"])]
    assert (files / image["path"]).read_bytes().startswith(b"\x89PNG")
    assert image["width"] > 100 < image["height"]


def test_off_writes_nothing(scenario: str, tmp_path: Path) -> None:
    run(scenario, tmp_path / "out", wandb="off")
    assert not list(tmp_path.rglob("*wandb*"))
    assert not list(tmp_path.rglob("tracking"))


def broken_init(*_: Any, **__: Any) -> None:
    raise OSError("no room for W&B")


def broken_log(*_: Any, **__: Any) -> None:
    raise RuntimeError("W&B has gone away")


@pytest.mark.parametrize(
    ("target", "broken", "complaints"),
    [
        ("wandb.init", broken_init, {"W&B could not start (no room for W&B)"}),
        (
            "wandb.sdk.wandb_run.Run.log",
            broken_log,
            {
                "W&B could not log a stage (W&B has gone away)",
                "W&B could not finish (W&B has gone away)",
            },
        ),
    ],
)
def test_a_broken_wandb_loses_no_result(
    both: tuple[dict[str, Any], Logged, Path],
    scenario: str,
    target: str,
    broken: Any,
    complaints: set[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(target, broken)
    result = run(scenario, tmp_path / "out", wandb="offline")
    assert result["complete"]
    assert result["matrix"] == both[0]["matrix"]
    said = [line for line in capsys.readouterr().err.splitlines() if "W&B" in line]
    assert {line.partition(";")[0] for line in said} == complaints
    assert all(line.endswith("; results on disk are not affected.") for line in said)


@pytest.mark.parametrize(
    ("variables", "netrc", "expected"),
    [
        ({}, "", "offline"),
        ({"WANDB_API_KEY": "0" * 40}, "", "online"),
        ({}, "machine api.wandb.ai\n  login user\n  password 0", "online"),
        ({}, "machine example.org\n  login user\n  password 0", "offline"),
        ({"WANDB_API_KEY": "0" * 40, "WANDB_MODE": "offline"}, "", "offline"),
        ({"WANDB_API_KEY": "0" * 40, "WANDB_MODE": "disabled"}, "", "off"),
    ],
)
def test_auto_is_online_only_where_somebody_is_logged_in(
    variables: dict[str, str],
    netrc: str,
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if netrc:
        (tmp_path / "netrc").write_text(netrc)
    assert resolve("auto") == expected
    assert resolve("online") == "online"
    assert resolve("off") == "off"
