"""W&B, TensorBoard and CSV tell what the result tells, once, and are never in the way."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

import cl_graft
from cl_graft.config import RunConfig
from cl_graft.errors import CLGraftError
from cl_graft.experiment.attempt import attempt
from cl_graft.report.figures import FIGURES, draw
from cl_graft.skillpack.format.file import SkillPack
from cl_graft.store.locks import Busy
from cl_graft.sweep_config import sweep_of
from cl_graft.tracking import along
from cl_graft.tracking import wandb as tracked
from cl_graft.tracking.wandb import bounded, held, resolve
from tests import kills
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

# Before its second task it does once what the file `then` says.
MOODY = """
import time
from pathlib import Path
from cl_graft import Strategy
from cl_graft.store.locks import Busy

THEN = Path(__file__).with_name("then")


class moody(Strategy):
    def learn(self, task, context):
        if self.packs and THEN.exists():
            then = THEN.read_text()
            THEN.unlink()
            if then == "busy":
                raise Busy("another cell makes it.")
            if then == "fail":
                raise RuntimeError("no luck today")
            if then == "interrupt":
                raise KeyboardInterrupt
            time.sleep(600)
        return context.top_magnitude(self.fine_tune(task, context))
"""

OFF = {"wandb": "off"}
VARIES = ("seconds", "spent", "peak_memory_mb")


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the scenario and the strategy."""
    folder = tmp_path_factory.mktemp("plugins")
    (folder / "moving.py").write_text(MOVING)
    (folder / "moody.py").write_text(MOODY)
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one test has trained, the others recall."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def nobody_logged_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for variable in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_PROJECT"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for variable in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / "home"))


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    yield
    assert tracked._cores() == set()


Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def run(plugin: Path, cache: Path) -> Run:
    """One cell: run(out, **fields)."""

    def begin(out: Path, **fields: Any) -> dict[str, Any]:
        return cl_graft.run(config(plugin, cache, out, **fields))

    return begin


def config(plugin: Path, cache: Path, out: Path, **fields: Any) -> RunConfig:
    return RunConfig(
        scenario=str(plugin / "moving.py"),
        model="nano-llama",
        out=out,
        cache=cache,
        **{"strategy": "magnitude", "wandb": "offline"} | fields,
    )


def files(out: Path) -> list[Path]:
    """Every offline file, oldest first."""
    return sorted(out.glob("*/tracking/wandb/offline-run-*/*.wandb"))


def logs(out: Path) -> list[Logged]:
    return [read(file) for file in files(out)]


def numbers(result: dict[str, Any]) -> str:
    """All of a result but times and memory, as it is on disk."""
    return json.dumps({k: v for k, v in result.items() if k not in VARIES}, indent=1)


@pytest.fixture(scope="module")
def plain(run: Run, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Without trackers, from a full cache."""
    run(tmp_path_factory.mktemp("first"), **OFF)
    return run(tmp_path_factory.mktemp("plain"), **OFF)


# --- W&B ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def both(run: Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Logged, Path]:
    """The result of a run, what its offline file holds, and where the media beside that are."""
    out = tmp_path_factory.mktemp("offline")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_DATA_DIR", str(out / "home"))
        patch.setenv("WANDB_CACHE_DIR", str(out / "home"))
        result = run(out)
    (file,) = files(out)
    return result, read(file), file.parent / "files"


def test_the_config_is_logged(both: tuple[dict[str, Any], Logged, Path]) -> None:
    result, logged, media = both
    assert logged.name == media.parents[3].name
    assert logged.name.startswith("moving__magnitude__")
    assert logged.config["strategy"] == "magnitude"
    assert logged.config["model"] == "nano-llama"
    assert (logged.config["seed"], logged.config["budget"]) == (0, "10%")
    for key in ("versions", "tasks", "budget_bytes", "base_bytes"):
        assert logged.config[key] == result[key]


def test_scores_are_logged_as_they_come(both: tuple[dict[str, Any], Logged, Path]) -> None:
    result, logged, _ = both
    assert logged.at("experience") == [0, 1, 2]
    for column, task in enumerate(result["tasks"]):
        assert logged.at(f"score/{task}") == [row[column] for row in result["matrix"]]
    assert len({tuple(row) for row in result["matrix"]}) == 3, "the scores should move"
    assert logged.at("general/score") == result["general"]


def test_training_and_costs_are_logged(both: tuple[dict[str, Any], Logged, Path]) -> None:
    result, logged, _ = both
    for term in ("loss", "learning_rate", "grad_norm", "tokens_per_second", "peak_memory_mb"):
        # two tasks; mini gives each twice the four steps
        assert len(logged.at(f"train/{term}")) == 16
    for kind, total in result["seconds"].items():
        assert sum(logged.at(f"seconds/{kind}")) == pytest.approx(total)
        assert logged.summary[f"total_seconds/{kind}"] == total
    assert sum(logged.at("tokens")) == logged.summary["total_tokens"] == result["tokens"] > 0
    assert logged.at("pack_bytes") == result["pack_bytes"]
    assert logged.summary["pack_bytes_max"] == max(result["pack_bytes"])
    assert logged.summary["base_bytes"] == result["base_bytes"]
    assert logged.summary["peak_memory_mb_max"] == result["peak_memory_mb"] > 0


def test_summary_metrics_are_logged(both: tuple[dict[str, Any], Logged, Path]) -> None:
    result, logged, _ = both
    assert {"op", "bwt", "fwt", "fm", "avalanche_forgetting"} <= set(result["metrics"])
    for name, value in result["metrics"].items():
        assert logged.summary[f"metrics/{name}"] == value
    assert logged.exit_code == 0


def test_the_matrix_is_a_table(both: tuple[dict[str, Any], Logged, Path]) -> None:
    result, logged, media = both
    (table,) = logged.at("matrix")
    assert table["_type"] == "table-file"
    held = json.loads((media / table["path"]).read_text())
    assert held["columns"] == ["experience", *result["tasks"]]
    assert held["data"] == [[experience, *row] for experience, row in enumerate(result["matrix"])]


def test_figures_are_the_report_s(
    both: tuple[dict[str, Any], Logged, Path], tmp_path: Path
) -> None:
    result, logged, media = both
    for name in FIGURES:
        (image,) = logged.at(name)
        (drawn,) = [file for file in draw(name, [result], tmp_path / name) if file.suffix == ".png"]
        assert np.array_equal(
            np.asarray(Image.open(media / image["path"])), np.asarray(Image.open(drawn))
        )


def test_packs_are_artifacts_and_on_disk_once(
    both: tuple[dict[str, Any], Logged, Path],
) -> None:
    result, logged, media = both
    cell = media.parents[3]
    base = json.loads((cell / "cell.json").read_text())["base"]
    packs = [a for a in logged.artifacts if a["type"] == "skillpack"]
    assert [a["name"] for a in packs] == [f"{cell.name}-{task}" for task in result["tasks"]]
    for experience, (artifact, task) in enumerate(zip(packs, result["tasks"], strict=True), 1):
        file = cell / "packs" / f"{experience:02d}-{task}.safetensors"
        assert artifact["files"] == {file.name: str(file.resolve())}
        assert artifact["metadata"] == {
            "bytes": file.stat().st_size,
            "base": base,
            "task": task,
            "digest": SkillPack.load(file).digest,
        }
    assert len(list(cell.parent.rglob("*.safetensors"))) == len(packs)


def test_off_writes_nothing(run: Run, tmp_path: Path) -> None:
    run(tmp_path / "out", **OFF)
    assert not list(tmp_path.rglob("*wandb*"))
    assert not list(tmp_path.rglob("tracking"))


def test_a_run_that_the_caller_has_open_is_not_used_and_not_closed(
    run: Run, tmp_path: Path
) -> None:
    import wandb

    own = wandb.init(mode="offline", dir=str(tmp_path), settings=wandb.Settings(silent=True))
    run(tmp_path / "out")
    assert wandb.run is own
    own.log({"mine": 1})
    own.finish()
    wandb.teardown()
    (theirs,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert read(theirs).at("mine") == [1]
    assert read(theirs).at("experience") == []
    assert [logged.at("experience") for logged in logs(tmp_path / "out")] == [[0, 1, 2]]


# --- a cell that is begun several times ----------------------------------------------------------


def one_run(logged: list[Logged], result: dict[str, Any]) -> None:
    """Together, the files of a cell are one run in which everything is there once."""
    assert len({one.id for one in logged}) == 1
    rows = [row for one in logged for row in one.history]
    # what was logged of an experience when W&B's process died, but for its end, is logged again, by the same steps
    rows = list({row["_step"]: row for row in rows}.values())
    assert [row["experience"] for one in logged for row in one.history if "experience" in row] == [
        0,
        1,
        2,
    ]
    assert [row["_step"] for row in rows] == list(range(len(rows)))
    assert sum("train/loss" in row for row in rows) == 16
    names = [a["name"] for one in logged for a in one.artifacts if a["type"] == "skillpack"]
    assert len(set(names)) == 2
    for name in (*FIGURES, "matrix"):
        assert sum(len(one.at(name)) for one in logged) == 1
    assert logged[-1].exit_code == 0
    assert logged[-1].summary["metrics/op"] == result["metrics"]["op"]


@pytest.mark.slow
@pytest.mark.parametrize("written", [False, True])
def test_a_cell_that_is_killed_and_continued_is_one_run(
    written: bool, plugin: Path, cache: Path, run: Run, tmp_path: Path
) -> None:
    """Whether or not W&B's process, which writes every quarter of a minute, had written anything."""
    (plugin / "then").write_text("wait")
    fields: dict[str, Any] = {"strategy": str(plugin / "moody.py"), "track": ["csv", "tensorboard"]}
    made = config(plugin, cache, tmp_path / "out", **fields)
    process = kills.server().Process(target=cl_graft.run, args=[made])
    process.start()
    while (plugin / "then").exists() and process.is_alive():
        time.sleep(0.02)
    cores = psutil.Process(process.pid).children()
    assert any(core.name().startswith("wandb") for core in cores)
    (file,) = files(tmp_path / "out")
    while written and not held(file, "record") and process.is_alive():
        time.sleep(0.1)
    process.kill()
    process.join()
    psutil.wait_procs(cores, timeout=30)
    assert not any(core.is_running() for core in cores)
    result = run(tmp_path / "out", **fields)
    first, second = logs(tmp_path / "out")
    assert first.id or not written
    one_run([first, second] if first.id else [second], result)
    as_csv(tmp_path / "out", result)
    as_tensorboard(tmp_path / "out", result)


@pytest.mark.parametrize(("then", "code"), [("busy", 0), ("fail", 1), ("interrupt", 1)])
def test_how_an_attempt_ended_and_the_next_goes_on_with_the_run(
    then: str,
    code: int,
    plugin: Path,
    cache: Path,
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("cl_graft.tracking.wandb.INTERRUPTED_SECONDS", 60.0)
    (plugin / "then").write_text(then)
    fields: dict[str, Any] = {"strategy": str(plugin / "moody.py")}
    made = config(plugin, cache, tmp_path / "out", **fields)
    if then == "interrupt":
        with pytest.raises(KeyboardInterrupt):
            cl_graft.run(made)
    else:
        assert attempt(made, lambda *_: None, patient=False).state[:4] == then
    (first,) = logs(tmp_path / "out")
    assert (first.at("experience"), first.exit_code) == ([0, 1], code)
    result = run(tmp_path / "out", **fields)
    one_run(logs(tmp_path / "out"), result)


def test_an_attempt_that_logs_nothing_leaves_no_run(
    plugin: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def busy(*_: Any) -> None:
        raise Busy("another cell makes it.")

    monkeypatch.setattr("cl_graft.experiment.cell._experiences", busy)
    made = config(plugin, cache, tmp_path, track=["csv", "tensorboard"])
    with pytest.raises(Busy):
        cl_graft.run(made)
    assert not list(tmp_path.rglob("tracking"))


def test_ids_are_those_of_experiments(
    both: tuple[dict[str, Any], Logged, Path], run: Run, tmp_path: Path
) -> None:
    for out, seed in (("again", 0), ("other", 1)):
        run(tmp_path / out, seed=seed)
    again, other = (logs(tmp_path / out)[0].id for out in ("again", "other"))
    assert both[1].id == again != other


@pytest.mark.slow
def test_w_and_b_s_processes_end_with_a_sweep(plugin: Path, cache: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "cl_graft", "sweep", "--scenarios", str(plugin / "moving.py")]
    words += ["--strategies", "magnitude", "--seeds", "0,1", "--models", "nano-llama"]
    words += ["--out", str(tmp_path / "out"), "--cache", str(cache), "--workers", "2"]
    words += ["--wandb", "offline", "--track", "csv,tensorboard"]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    family: set[psutil.Process] = set()
    while process.poll() is None:
        family |= set(psutil.Process(process.pid).children(recursive=True))
        time.sleep(0.3)
    assert process.stderr is not None and process.returncode == 0, process.stderr.read()
    assert len(family) > 2
    _, left = psutil.wait_procs(family, timeout=30)
    assert left == []
    assert sorted(one.exit_code for one in logs(tmp_path / "out")) == [0, 0]
    assert [one.at("experience") for one in logs(tmp_path / "out")] == [[0, 1, 2]] * 2
    for name in ("scores.csv", "losses.csv", "tensorboard"):
        assert len(list(tmp_path.glob(f"out/*/tracking/{name}"))) == 2


# --- files ---------------------------------------------------------------------------------------


def as_csv(out: Path, result: dict[str, Any]) -> None:
    """The files under `out` tell this result."""
    (scores,), (losses,) = out.glob("*/tracking/scores.csv"), out.glob("*/tracking/losses.csv")
    with scores.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["experience", "task", "metric", "value", "n", "stderr"]
    for key, table in (("value", "matrix"), ("n", "n"), ("stderr", "stderr")):
        told = {(int(r["experience"]), r["task"]): r[key] for r in rows if r["metric"] == "score"}
        for experience, row in enumerate(result[table]):
            for task, value in zip(result["tasks"], row, strict=True):
                assert float(told[experience, task]) == value
    assert len(rows) == len({(r["experience"], r["task"], r["metric"]) for r in rows})
    with losses.open(newline="") as file:
        points = list(csv.DictReader(file))
    assert [(int(p["experience"]), int(p["step"])) for p in points] == [
        (experience, step) for experience in (1, 2) for step in range(1, 9)
    ]
    for key in ("loss", "learning_rate", "grad_norm", "tokens_per_second", "peak_memory_mb"):
        assert all(float(p[key]) >= 0 for p in points)


def as_tensorboard(out: Path, result: dict[str, Any]) -> None:
    """What TensorBoard shows of `out` tells this result."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = out.glob("*/tracking/tensorboard")
    shown = EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0}).Reload()
    for column, task in enumerate(result["tasks"]):
        told = [(e.step, e.value) for e in shown.Scalars(f"score/{task}")]
        assert told == [(i, pytest.approx(row[column])) for i, row in enumerate(result["matrix"])]
    for name, value in result["metrics"].items():
        assert [e.value for e in shown.Scalars(f"metrics/{name}")] == [pytest.approx(value)]
    for term in ("loss", "learning_rate", "grad_norm", "tokens_per_second", "peak_memory_mb"):
        assert [e.step for e in shown.Scalars(f"train/{term}")] == list(range(1, 17))
    assert sorted(shown.Tags()["images"]) == sorted(FIGURES)
    assert all(len(shown.Images(name)) == 1 for name in FIGURES)


def test_csv_and_tensorboard_without_w_and_b(
    run: Run, plain: dict[str, Any], tmp_path: Path
) -> None:
    result = run(tmp_path, wandb="off", track=["tensorboard", "csv"])
    assert numbers(result) == numbers(plain)
    as_csv(tmp_path, result)
    as_tensorboard(tmp_path, result)
    assert not list(tmp_path.rglob("*wandb*"))


def test_every_job_s_steps_go_on_where_the_last_ended() -> None:
    points = [{"step": step} for step in (2, 4, 1, 2)]
    assert [at for at, _ in along(points, 10)] == [12, 14, 15, 16]


# --- failures ------------------------------------------------------------------------------------


def no_init(patch: pytest.MonkeyPatch, cell: Path) -> None:
    def init(**_: Any) -> None:
        raise OSError("no room for W&B")

    patch.setattr("wandb.init", init)


def no_log(patch: pytest.MonkeyPatch, cell: Path) -> None:
    import wandb

    log, calls = wandb.Run.log, iter(range(100))

    def sometimes(self: Any, *given: Any, **named: Any) -> None:
        if next(calls) > 3:
            raise RuntimeError("W&B has gone away")
        log(self, *given, **named)

    patch.setattr("wandb.Run.log", sometimes)


def no_import(patch: pytest.MonkeyPatch, cell: Path) -> None:
    patch.setitem(sys.modules, "wandb", None)


def a_file(patch: pytest.MonkeyPatch, cell: Path) -> None:
    cell.mkdir(parents=True)
    (cell / "tracking").touch()


def read_only(patch: pytest.MonkeyPatch, cell: Path) -> None:
    """A folder in which not even root makes anything."""
    cell.mkdir(parents=True)
    (cell / "tracking").symlink_to("/sys")


def slow_finish(patch: pytest.MonkeyPatch, cell: Path) -> None:
    patch.setattr("wandb.Run.finish", lambda *_, **__: time.sleep(600))
    patch.setattr(tracked, "FINISH_SECONDS", 2.0)


def stopped_core(patch: pytest.MonkeyPatch, cell: Path) -> None:
    """W&B's process does not answer any more."""
    close = tracked.Wandb._close

    def closes(self: Any, code: int) -> None:
        for core in tracked._cores():
            core.suspend()
        close(self, code)

    patch.setattr(tracked.Wandb, "_close", closes)
    patch.setattr(tracked, "FINISH_SECONDS", 2.0)


def dead_core(patch: pytest.MonkeyPatch, cell: Path) -> None:
    """W&B's process is killed, as one is when memory is short."""
    log = tracked.Wandb._log

    def logs_and_dies(self: Any, record: dict[str, Any], *rest: Any) -> None:
        log(self, record, *rest)
        if record["experience"] == 1:
            for core in tracked._cores():
                core.kill()
                core.wait()

    patch.setattr(tracked.Wandb, "_log", logs_and_dies)


def full_disk(patch: pytest.MonkeyPatch, cell: Path) -> None:
    """W&B's process alone can write no file of more than a few kilobytes."""
    import resource

    from wandb.sdk.lib.service import service_process

    def started(*given: Any, **named: Any) -> Any:
        limit = (4096, 4096)
        named["preexec_fn"] = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        return subprocess.Popen(*given, **named)

    patch.setattr(service_process, "subprocess", SimpleNamespace(Popen=started))


def no_tensorboard(patch: pytest.MonkeyPatch, cell: Path) -> None:
    patch.setitem(sys.modules, "torch.utils.tensorboard", None)


@pytest.mark.parametrize(
    ("breaks", "said"),
    [
        (no_init, ["W&B failed (no room for W&B)"]),
        (no_log, ["W&B failed (W&B has gone away)"]),
        (no_import, ["W&B failed (import of wandb halted"]),
        (a_file, ["W&B failed (", "TensorBoard failed (", "CSV failed ("]),
        (read_only, ["W&B failed (", "TensorBoard failed (", "CSV failed ("]),
        (slow_finish, ["W&B failed (no answer in 2 seconds)"]),
        (stopped_core, ["W&B failed (no answer in 2 seconds)"]),
        (dead_core, ["W&B failed ("]),
        (full_disk, ["W&B failed (/"]),
        (no_tensorboard, ["TensorBoard failed (import of torch.utils.tensorboard halted"]),
    ],
)
def test_a_tracker_that_fails_changes_no_result(
    breaks: Callable[[pytest.MonkeyPatch, Path], None],
    said: list[str],
    plain: dict[str, Any],
    plugin: Path,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    made = config(plugin, cache, tmp_path / "out", track=["tensorboard", "csv"])
    breaks(monkeypatch, made.out / made.cell)
    begun = time.monotonic()
    cl_graft.run(made)
    assert time.monotonic() - begun < 60
    result = json.loads((made.out / made.cell / "result.json").read_text())
    assert numbers(result) == numbers(plain)
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == len(said), lines
    for line, begins in zip(lines, said, strict=True):
        assert line.startswith(begins)
        assert line.endswith("is left out from here on; results on disk are not affected.")


def test_a_server_that_does_not_answer(
    plain: dict[str, Any],
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(tracked, "EXPERIENCE_SECONDS", 5.0)
    assert numbers(run(tmp_path, wandb="online")) == numbers(plain)
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("W&B failed (")


def test_a_word_is_found_across_the_blocks_of_a_file(tmp_path: Path) -> None:
    file, block = tmp_path / "a.wandb", 32 * 1024
    file.write_bytes(b"-" * (block - 3) + b"las" + b"HEADER." + b"t-word" + b"-" * 50)
    assert held(file, "last-word")
    assert not held(file, "lost-word")


def test_an_exit_in_a_thread_is_a_failure() -> None:
    with pytest.raises(RuntimeError, match="SystemExit: 3"):
        bounded(5.0, lambda: sys.exit(3))
    with pytest.raises(TimeoutError, match="no answer in 0.1 seconds"):
        bounded(0.1, lambda: time.sleep(5))
    assert bounded(5.0, lambda: 7) == 7


# --- what is chosen ------------------------------------------------------------------------------


def test_what_is_tracked_is_no_part_of_the_experiment(run: Run, tmp_path: Path) -> None:
    run(tmp_path, wandb="off")
    again = run(tmp_path, wandb="off", track=["csv"])
    assert again["complete"]
    assert len(list(tmp_path.glob("*/cell.json"))) == 1


def test_a_misspelt_tracker_is_answered_with_the_nearest() -> None:
    small = {"scenarios": "mini", "strategies": "lora"}
    with pytest.raises(CLGraftError, match="named 'tensorbord'; did you mean tensorboard"):
        sweep_of(small | {"track": ["csv", "tensorbord"]}, "here")
    assert sweep_of(small | {"track": "csv"}, "here").cells()[0].track == ["csv"]


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
