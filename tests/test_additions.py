"""What is declared in one place is seen everywhere: a field, a metric, a tracker, an executor, a command."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

import cl_graft.experiment.executors as executors
import cl_graft.tracking as tracking
from cl_graft import cli
from cl_graft.cli import complete
from cl_graft.cli.options import sweep_from
from cl_graft.config import CELL, Axes, RunConfig, Settings, Whereabouts, several
from cl_graft.errors import UnknownName
from cl_graft.experiment.executors import local
from cl_graft.matrix import METRICS, Metric, PerformanceMatrix
from cl_graft.report.tables import metrics
from cl_graft.sweep_config import Ray, Sweep, sweep_of, template
from tests.command import Call
from tests.report.test_tables import cell

ROOT = Path(__file__).parents[1]
FIELDS = [name for name in RunConfig.model_fields if name not in CELL]
SMALL: dict[str, Any] = {"scenarios": ["mini"], "strategies": ["graftllm"]}


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    """docs/hooks.py, which makes the listings of the documentation."""
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def page(hooks: ModuleType, name: str) -> str:
    return hooks.on_page_markdown((ROOT / "docs" / name).read_text("utf-8"))


def in_sweep(name: str) -> str:
    return several(name) if name in Axes.model_fields else name


def shown(text: str) -> str:
    """A help text as one line, without the breaks that a terminal's width makes."""
    return re.sub(r"\s+", " ", text)


# --- a field -----------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["run", "sweep", "plan", "validate"])
def test_every_field_is_an_option_with_its_help(command: str, call: Call) -> None:
    said = shown(call(command, "--help").out)
    for name in FIELDS:
        flag = (name if command == "run" else in_sweep(name)).replace("_", "-")
        assert f" --{flag} " in said, name
        assert str(RunConfig.model_fields[name].description) in said, name


def test_every_field_of_a_sweep_is_an_option_and_in_the_file_that_init_writes(call: Call) -> None:
    said, listed = call("sweep", "--help").out, call("list", "fields").out.splitlines()
    assert [line.split()[0] for line in listed] == list(Sweep.model_fields)
    assert {in_sweep(name) for name in FIELDS} <= set(Sweep.model_fields)
    for name in Sweep.model_fields:
        assert f"--{name.replace('_', '-')} " in said
        assert len(re.findall(rf"^(?:# )?{name}:", template(), re.MULTILINE)) == 1


def test_the_comments_of_the_file_that_init_writes_are_fields() -> None:
    """Each may be made one by taking its # away."""
    text = re.sub(r"^# (?=\w+: .*#)", "", template(), flags=re.MULTILINE)
    assert set(yaml.safe_load(text)) == set(Sweep.model_fields)
    assert sweep_of(yaml.safe_load(text), "here").launch.processes == 8


def test_every_field_of_a_sweep_is_described_once_on_its_page(hooks: ModuleType) -> None:
    rows = re.findall(r"^\| `(\w+)` \|", page(hooks, "sweep-files.md"), re.MULTILINE)
    wanted = [*Sweep.model_fields]
    for part in ("launch", "ray"):
        wanted += Sweep.model_fields[part].annotation.model_fields
    assert sorted(rows) == sorted(wanted)


OTHER = {  # a value that is not the default, where that cannot be told from the type
    "train_on": {"math": Path("built")},
    "task_ids": "inferred",
    "scoring": {"number.tolerance": 0.5},
    "router_options": {"regularisation": 0.5},
    "router_combine": "merge",
    "router_reject": 0.05,
    "launch": {"processes": 2},
    "max_memory": {"cpu": "1GiB"},
    "wandb": "off",
    "track": ["csv"],
}


def changed(name: str) -> RunConfig:
    """A cell with another value of this field, and others under which it decides, if it ever does."""
    default = RunConfig.model_fields[name].default
    plain = {bool: True, int: 7}.get(type(default), "else")
    fields = {"scenario": "mini", "strategy": "lora", name: OTHER.get(name, plain)}
    return RunConfig(**fields, **({"task_ids": "inferred"} if name.startswith("router") else {}))


def test_what_decides_the_result_is_in_its_name_and_identity_and_nothing_else_is() -> None:
    plain = RunConfig(scenario="mini", strategy="lora")
    for name in FIELDS:
        made, decides = changed(name), name not in Whereabouts.model_fields
        assert getattr(made, name) != getattr(plain, name)
        assert (made.cell != plain.cell) is decides, name
        assert (made.experiment() != plain.experiment()) is decides, name
        assert RunConfig(**made.experiment()).cell == made.cell
        if name in Settings.model_fields:
            assert (made.label, made.scenario_label) != (plain.label, plain.scenario_label)
    assert changed("router").cell != changed("task_ids").cell


def test_fields_that_came_later_leave_names_and_identities_of_before() -> None:
    plain = RunConfig(scenario="mini", strategy="lora", router="centroids")
    first = {"scenario", "strategy", "model", "seed", "budget", "options", "threads", "train_on"}
    assert plain.cell == "mini__lora__mini-llama__10pct__seed0" and plain.label == "lora"
    assert set(plain.experiment()) == first
    inferred = plain.model_copy(update={"task_ids": "inferred"})
    assert inferred.label == "lora(router=centroids, task_ids=inferred)"
    assert set(inferred.experiment()) == first | {"task_ids", "router"}
    assert changed("task_ids").label == "lora(task_ids=inferred)"


def test_how_tasks_are_told_is_an_axis_of_sweeps(call: Call) -> None:
    made = sweep_of(SMALL | {"task_ids": ["given", "inferred"], "router": "mine.py"}, "here")
    assert [c.label for c in made.cells()] == [
        "graftllm",
        "graftllm(router=mine.py, task_ids=inferred)",
    ]
    assert sweep_of(SMALL | {"task_ids": "inferred"}, "here").task_ids == ["inferred"]
    told = call("sweep", "--scenarios", "mini", "--strategies", "lora", "--task-ids", "infered")
    assert "named 'infered'; did you mean inferred?" in told.reason
    (option,) = (p for p in cli.built("sweep").params if p.name == "task_ids")
    offered = complete.one_of(Sweep.model_fields["task_ids"])
    assert option.help and offered and offered("given,in") == [("given,inferred", "")]
    typed = {"scenarios": "mini", "strategies": "graftllm", "router": "mine.py"}
    assert sweep_from(None, typed | {"task_ids": "given,inferred"}) == made


# --- a metric ----------------------------------------------------------------------------------


def test_a_metric_is_seen_by_results_tables_trackers_lists_and_pages(
    hooks: ModuleType, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    def worst(matrix: PerformanceMatrix) -> float:
        """Worst final score: `min_j R[T][j]`."""
        return min(matrix.final())

    monkeypatch.setitem(METRICS, "worst", Metric("worst", "Nobody 2026", "higher", worst))
    made = cell()  # ends at 60 and 70
    assert made["metrics"]["worst"] == 0.6
    (table,) = metrics([made])
    assert table.rows[0][table.columns.index("worst")] == "60.0"
    assert tracking.of_result(made)["metrics/worst"] == 0.6
    assert re.search(
        r"^worst +higher.*min_j R\[T\]\[j\].*Nobody 2026$", call("list", "metrics").out, re.M
    )
    assert "| `worst` | Worst final score: `min_j R[T][j]`. | higher |" in page(hooks, "reports.md")


# --- a tracker, an executor --------------------------------------------------------------------

NOTES = """
class Notes:
    name = "Notes"

    def __init__(self, folder):
        self.folder = folder

    def experience(self, record):
        (self.folder / "notes.txt").write_text(str(record["experience"]))

    def finish(self, result):
        pass

    def abandon(self, error):
        pass


def tracker(config, folder, identity):
    return Notes(folder)
"""

NOBODY = """
from cl_graft.experiment.executors import Outcome


def executor(asked, cells):
    def run(cells, report):
        for config in cells:
            yield config, Outcome("refused", f"nobody has {asked.workers} workers")

    return run
"""


def test_a_tracker_is_one_file(
    hooks: ModuleType, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UnknownName, match="no tracker named 'notes'"):
        RunConfig(scenario="mini", strategy="lora", track=["notes"])
    (tmp_path / "notes.py").write_text(NOTES)
    monkeypatch.setattr(tracking, "__path__", _with(tracking, tmp_path, monkeypatch))
    config = RunConfig(scenario="mini", strategy="lora", track=["notes"], wandb="off")
    told = tracking.trackers(config, tmp_path, {})
    told.experience({"experience": 3})
    assert (tmp_path / "notes.txt").read_text() == "3"
    assert "csv, notes, tensorboard." in shown(call("sweep", "--help").out)
    assert "csv, notes, tensorboard." in page(hooks, "sweep-files.md")
    assert "csv, notes, tensorboard." in template()
    sys.modules.pop("cl_graft.tracking.notes")


def test_an_executor_is_one_file(
    hooks: ModuleType, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nobody.py").write_text(NOBODY)
    monkeypatch.setattr(executors, "__path__", _with(executors, tmp_path, monkeypatch))
    asked = sweep_of(SMALL | {"executor": "nobody", "workers": 3}, "here")
    ((_, outcome),) = executors.executor(asked, asked.cells())(asked.cells(), lambda *_: None)
    assert (outcome.state, outcome.reason) == ("refused", "nobody has 3 workers")
    assert "local, nobody, ray." in shown(call("sweep", "--help").out)
    assert "local, nobody, ray." in page(hooks, "sweep-files.md") and "nobody" in template()
    sys.modules.pop("cl_graft.experiment.executors.nobody")


def test_our_executors_take_what_the_sweep_says() -> None:
    def keywords(**fields: Any) -> dict[str, Any]:
        asked = sweep_of(SMALL | fields, "here")
        made: Any = executors.executor(asked, asked.cells())
        return made.keywords

    ray = {"executor": "ray", "ray": {"gpus": 1}}
    assert keywords(**ray, workers=3) == {"workers": 3, "asks": Ray(gpus=1)}
    assert keywords(workers=3) == {"workers": 3}
    assert keywords(launch={"processes": 2}) == {"workers": 1}, "one job has all devices"
    assert keywords(threads=10**6) == {"workers": local.gpus() or 1}


def _with(package: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The package's path with a folder more, for this test."""
    path = [*package.__path__, str(folder)]
    assert package.__spec__
    monkeypatch.setattr(package.__spec__, "submodule_search_locations", path)
    return path


def test_every_file_of_a_package_of_trackers_or_executors_is_one() -> None:
    for package, make in ((tracking, "tracker"), (executors, "executor")):
        folder = Path(str(package.__file__)).parent
        for file in folder.glob("*.py"):
            assert file.stem == "__init__" or f"def {make}(" in file.read_text("utf-8"), file


# --- a command ---------------------------------------------------------------------------------


def test_a_command_is_a_function_and_a_line(
    hooks: ModuleType, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    def greet(name: str = "you") -> None:
        """Say hello."""
        print(f"hello {name}")

    monkeypatch.setitem(cli.COMMANDS, "greet", greet)
    assert re.search(r"^  greet +Say hello\.$", call("--help").out, re.M)
    assert call("greet", "--name", "all").out == "hello all\n"
    assert "`cl-graft greet`" in hooks.commands() and "* `greet`: Say hello." in hooks.commands()


def test_every_file_of_commands_is_listed() -> None:
    """Those that hold commands import typer; those beside them do so to print, or hold what `pack` lists."""
    helpers = {"__init__", "options", "live", "progress", "show", "packs", "lossless", "convert"}
    files = {file.stem for file in (ROOT / "cl_graft" / "cli").glob("*.py")}
    holds = {stem for stem in files if "import typer" in _text(stem)} - helpers
    listed = {stem for stem in files if re.search(rf"\b{stem}\.\w+,$", _text("__init__"), re.M)}
    assert listed == holds


def _text(stem: str) -> str:
    return (ROOT / "cl_graft" / "cli" / f"{stem}.py").read_text("utf-8")
