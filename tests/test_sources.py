"""No number under a wrong name: what a cell was made of is known by its files, and an edit of them is seen."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cl_graft import plugins
from cl_graft.config import RunConfig
from cl_graft.experiment.attempt import attempt
from cl_graft.experiment.cell import finished, run
from cl_graft.plugins import find, kinds
from cl_graft.store.files import RecordError
from cl_graft.store.record import CellFolder
from tests.command import Call, assert_refused
from tests.refusals import one_sentence

PLAIN = """
from cl_graft.strategy import compressor


@compressor()
def {name}(delta, context, *, share: float = 0.5):
    return context.top_magnitude(delta)
"""


def written(file: Path, text: str, **parts: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text.format(**parts) if parts else text)
    return file


def edit(file: Path) -> None:
    file.write_text(file.read_text() + "# another\n")


# --- which files ---


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("import helper", {"helper.py"}),
        ("import helper as h, other", {"helper.py", "other.py"}),
        ("from helper import f", {"helper.py"}),
        ("def f():\n    from helper import g", {"helper.py"}),
        ("from . import helper", {"helper.py"}),
        ("from .helper import *", {"helper.py"}),
        ("from whatever.helper import f", {"helper.py"}),
        ("from whatever import helper", {"helper.py"}),
        ("import part", {"part/__init__.py"}),
        ("from part import deep", {"part/__init__.py", "part/deep.py", "other.py"}),
        ("from part.deep import x", {"part/__init__.py", "part/deep.py", "other.py"}),
        ("import loose.file", {"loose/file.py", "helper.py"}),
        ("import first", {"first.py", "second.py"}),
        ("import torch, json", set()),
        ("helper = 3", set()),
    ],
)
def test_a_file_and_what_it_imports_from_beside_it(
    tmp_path: Path, line: str, found: set[str]
) -> None:
    for name in ("helper.py", "other.py", "part/__init__.py"):
        written(tmp_path / name, "x = 1\n")
    written(tmp_path / "part" / "deep.py", "import other\n")
    written(tmp_path / "loose" / "file.py", "from ..helper import x\n")
    written(tmp_path / "first.py", "import second\n")
    written(tmp_path / "second.py", "import first\n")  # in a circle
    mine = written(tmp_path / "mine.py", line)
    assert plugins.sources_of(mine).keys() == {"mine.py", *found}


def test_the_harness_itself_belongs_to_no_plug_in(tmp_path: Path) -> None:
    """Also where the user's folder holds one of its name, or the plug-in lies beside it in a checkout."""
    written(tmp_path / "strategy.py", "import nothing\n")
    mine = written(tmp_path / "mine.py", "from cl_graft.config import RunConfig\n")
    assert plugins.sources_of(mine).keys() == {"mine.py"}
    beside = find.PACKAGE / "plugins" / "find.py"
    assert list(plugins.sources_of(beside)) == ["find.py"]


def test_a_file_that_is_no_python_is_a_source_all_the_same(tmp_path: Path) -> None:
    assert plugins.sources_of(written(tmp_path / "odd.py", "def (:")).keys() == {"odd.py"}


def test_the_digest_is_of_the_bytes(tmp_path: Path) -> None:
    """Moved, it is the same; changed to as many other bytes, it is another."""
    one = written(tmp_path / "a" / "mine.py", "x = 1\n")
    two = written(tmp_path / "b" / "mine.py", "x = 1\n")
    before = plugins.sources_of(one)
    assert before == plugins.sources_of(two)
    two.write_text("x = 2\n")
    assert before.keys() == plugins.sources_of(two).keys() and before != plugins.sources_of(two)


# --- of the four origins ---


@pytest.fixture
def copy_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of `cl_graft/` with `baselines/` and `scenarios/` beside it, for `plugins` to look at."""
    root = find.PACKAGE.parent
    for name in ("baselines", "scenarios"):
        shutil.copytree(root / name, tmp_path / name)
    (tmp_path / "cl_graft" / "strategy").mkdir(parents=True)
    for file in (root / "cl_graft" / "strategy").glob("*.py"):
        shutil.copy(file, tmp_path / "cl_graft" / "strategy")
    for module in (find, kinds):
        monkeypatch.setattr(module, "PACKAGE", tmp_path / "cl_graft")
    return tmp_path


def test_a_baseline_of_ours(copy_of_ours: Path) -> None:
    file = copy_of_ours / "baselines" / "ties.py"
    helper = written(copy_of_ours / "baselines" / "_helper.py", "x = 1\n")
    before = plugins.sources("strategy", "ties")
    assert before.keys() == {"baselines/ties.py"}
    file.write_text(file.read_text() + "from baselines import _helper\n")
    after = plugins.sources("strategy", "ties")
    assert after.keys() == {"baselines/ties.py", "baselines/_helper.py"}
    assert after["baselines/ties.py"] != before["baselines/ties.py"]
    edit(helper)
    assert plugins.sources("strategy", "ties") != after
    edit(copy_of_ours / "baselines" / "lora.py")
    assert plugins.sources("scenario", "mini").keys() == {"scenarios/mini.py"}


def test_a_module_inside_the_package(copy_of_ours: Path) -> None:
    before = plugins.sources("strategy", "graftllm")
    assert before.keys() == {"cl_graft/strategy/graftllm.py"}
    edit(copy_of_ours / "cl_graft" / "strategy" / "base.py")
    assert plugins.sources("strategy", "graftllm") == before
    edit(copy_of_ours / "cl_graft" / "strategy" / "graftllm.py")
    assert plugins.sources("strategy", "graftllm") != before


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Three ways in which a distribution brings a strategy: a module, one in a package, a link to a folder."""
    site, src = tmp_path / "site", tmp_path / "src"
    written(site / "single.py", "import beside, torch\n")
    written(site / "beside.py", "x = 1\n")
    written(site / "torch" / "__init__.py", "another's\n")
    written(site / "far" / "__init__.py", "")
    written(site / "far" / "methods" / "mine.py", "from ..shared import x\nimport beside\n")
    written(site / "far" / "shared.py", "x = 1\n")
    written(src / "linked" / "__init__.py", "from linked import inner\n")
    written(src / "linked" / "inner.py", "x = 1\n")
    info = site / "far-1.0.dist-info"
    written(info / "METADATA", "Metadata-Version: 2.1\nName: far\nVersion: 1.0\n")
    entries = "single = single:x\nmine = far.methods.mine:x\nlinked = linked:x\nlost = no_such:x\n"
    written(info / "entry_points.txt", f"[cl_graft.baselines]\n{entries}")
    monkeypatch.syspath_prepend(str(src))
    monkeypatch.syspath_prepend(str(site))
    yield tmp_path
    for name in ("far", "linked", "linked.inner", "single", "beside"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("name", "files", "imported"),
    [
        ("single", {"single.py", "beside.py"}, "site/beside.py"),
        ("mine", {"far/methods/mine.py", "far/shared.py", "far/__init__.py"}, "site/far/shared.py"),
        ("linked", {"linked/__init__.py", "linked/inner.py"}, "src/linked/inner.py"),
    ],
)
def test_an_entry_point_of_an_installed_package(
    package: Path, name: str, files: set[str], imported: str
) -> None:
    """What other packages bring to the same folder is not its own."""
    before = plugins.sources("strategy", name)
    assert before.keys() <= files and before.keys() >= files - {"far/__init__.py"}
    edit(package / imported)
    assert plugins.sources("strategy", name) != before


def test_an_entry_point_whose_file_is_not_there(package: Path) -> None:
    message = one_sentence(lambda: plugins.sources("strategy", "lost"))
    assert "no_such" in message and "install its package as files" in message


# --- a changed file is loaded anew ---


def test_an_edit_of_as_many_bytes_is_loaded_within_the_second(tmp_path: Path) -> None:
    """Bytecode that was written before it is not taken for it."""
    mine = written(tmp_path / "mine.py", PLAIN, name="mine")
    assert plugins.options(plugins.load("strategy", str(mine))) == {"share": 0.5}
    mine.write_text(mine.read_text().replace("0.5", "0.7"))
    assert plugins.options(plugins.load("strategy", str(mine))) == {"share": 0.7}


def test_so_is_one_of_a_file_that_it_imports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    helper = written(tmp_path / "helper_of_mine.py", "SHARE = 0.5\n")
    text = "from helper_of_mine import SHARE\n" + PLAIN.replace("0.5", "SHARE")
    mine = written(tmp_path / "mine.py", text, name="mine")
    assert plugins.options(plugins.load("strategy", str(mine))) == {"share": 0.5}
    helper.write_text("SHARE = 0.75\n")
    assert plugins.options(plugins.load("strategy", str(mine))) == {"share": 0.75}


# --- of a cell ---

STREAM = """
from cl_graft.data import records
from cl_graft.task import Example, Scenario, Task, Training


def stream(*, seed, data_dir=None):
    train = [Example(f"{a}+1=", f"{a + 1}") for a in range(8)]
    rows = records(data_dir, "test.jsonl", ["prompt", "completion"])
    test = [Example(row["prompt"], row["completion"]) for row in rows]

    def task(name):
        recipe = Training(steps=2, batch=4, max_length=32)
        return Task(name, train, test, "neg_bits_per_byte", training=recipe)

    return Scenario("stream", (task("one"), task("two")))
"""


def line(a: int) -> str:
    return json.dumps({"prompt": f"{a}+1=", "completion": f"{a + 1}"}) + "\n"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with plug-ins of the user's, data, a model, and a finished cell made of them; copy it."""
    from cl_graft.models.load import locate

    place = tmp_path_factory.mktemp("whole")
    written(place / "stream.py", STREAM)
    written(place / "mine.py", PLAIN, name="mine")
    written(place / "data" / "test.jsonl", line(3) + line(5))
    shutil.copytree(locate("nano-llama"), place / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        run(config())
    return place


def config(**fields: Any) -> RunConfig:
    told = {"scenario": "stream.py", "strategy": "mine.py", "model": "model", "wandb": "off"}
    return RunConfig(**told | {"data_dir": Path("data"), "out": Path("out")} | fields)


@pytest.fixture(params=["finished", "killed"])
def cell(
    request: pytest.FixtureRequest, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A copy in the working directory: the cell whole, or as it was when the base and one task were done."""
    place = tmp_path / "place"
    shutil.copytree(whole, place)
    monkeypatch.chdir(place)
    folder = Path("out", config().cell)
    if request.param == "killed":
        (folder / "result.json").unlink()
        shutil.rmtree(folder / "experiences" / "02")
        shutil.rmtree("out/cache")
    return folder


COMMAND = ["run", "--scenario", "stream.py", "--strategy", "mine.py", "--model", "model"]
COMMAND += ["--data-dir", "data", "--wandb", "off", "--out", "out"]


def test_what_a_cell_was_made_of_is_in_its_folder(whole: Path) -> None:
    (file,) = whole.glob("out/*/cell.json")
    found = json.loads(file.read_text())
    assert found["sources"]["scenario"] == plugins.sources_of(whole / "stream.py")
    assert found["sources"]["strategy"] == plugins.sources_of(whole / "mine.py")
    assert found["inputs"]["model"].keys() >= {"model/config.json", "model/model.safetensors"}
    assert found["format"] == 4


def test_a_cell_that_nothing_was_changed_of_goes_on(cell: Path, call: Call, whole: Path) -> None:
    """Also in another folder, and after its files were written again as they were."""
    for name in ("stream.py", "mine.py", "data/test.jsonl", "model/config.json"):
        Path(name).write_bytes(Path(name).read_bytes())
    assert call(*COMMAND).code == 0
    before, after = (json.loads((p / cell / "result.json").read_text()) for p in (whole, Path()))
    assert after["complete"] and after["matrix"] == before["matrix"]


@pytest.mark.parametrize("name", ["stream.py", "mine.py"])
def test_an_edited_plug_in_is_refused(cell: Path, call: Call, name: str) -> None:
    before = sorted(f.name for f in cell.rglob("*"))
    edit(Path(name))
    assert_refused(call(*COMMAND), str(cell), f"another {name} than", "--out", "delete the folder")
    assert sorted(f.name for f in cell.rglob("*")) == before


def test_a_file_that_came_to_it_or_went_is_named(cell: Path, call: Call) -> None:
    written(Path("helper.py"), "x = 1\n")
    Path("mine.py").write_text("if False:\n    import helper\n" + Path("mine.py").read_text())
    assert_refused(call(*COMMAND), "another mine.py", "and without helper.py, which is read now")


def test_other_data_are_refused(cell: Path, call: Call) -> None:
    Path("data", "test.jsonl").write_text(line(3) + line(6))
    assert_refused(call(*COMMAND), str(cell), "another data set than there is now", "--out")


def test_other_weights_are_refused(cell: Path, call: Call) -> None:
    weights = bytearray(Path("model/model.safetensors").read_bytes())
    weights[-1] ^= 1
    Path("model/model.safetensors").write_bytes(weights)
    assert_refused(call(*COMMAND), str(cell), "another model/model.safetensors than there is now")


def test_deleted_it_is_computed_anew(cell: Path, call: Call) -> None:
    edit(Path("mine.py"))
    shutil.rmtree(cell)
    assert call(*COMMAND).code == 0
    assert CellFolder(cell).identity()["sources"]["strategy"] == plugins.sources_of(Path("mine.py"))


def test_a_sweep_computes_nothing_where_a_cell_is_of_another_file(cell: Path, call: Call) -> None:
    edit(Path("mine.py"))
    words = ["sweep", "--scenarios", "stream.py", "--strategies", "sequential,mine.py"]
    words += ["--models", "model", "--data-dir", "data", "--wandb", "off", "--out", "out"]
    done = call(*words)
    assert done.code == 1 and str(cell) in done.reason and "another mine.py" in done.reason
    assert [p.parent.name for p in Path("out").glob("*/cell.json")] == [cell.name]


def test_an_attempt_at_a_cell_of_other_data_leaves_it_as_it_was(cell: Path) -> None:
    """It is no failure, which would have to be asked for again: with the data of before it goes on."""
    kept, before = Path("data/test.jsonl").read_text(), CellFolder(cell).state()
    Path("data/test.jsonl").write_text(line(3) + line(6))
    outcome = attempt(config(), lambda what, done, at="": None, True)
    assert outcome.state == "refused" and "another data set" in outcome.reason
    assert CellFolder(cell).state() == before
    Path("data/test.jsonl").write_text(kept)
    assert attempt(config(), lambda what, done, at="": None, True).state == "done"


def test_a_result_is_shown_where_its_data_and_model_are_not(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a machine that the results were copied to."""
    shutil.copytree(whole, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    shutil.rmtree("data")
    shutil.rmtree("model")
    assert finished(config()) is not None


def test_results_of_an_earlier_version_are_refused(cell: Path, call: Call) -> None:
    about = json.loads((cell / "cell.json").read_text())
    (cell / "cell.json").write_text(json.dumps(about | {"format": 2}))
    assert_refused(call(*COMMAND), "results format 2", "this version knows 4", "--out")
    with pytest.raises(RecordError, match="format 2"):
        finished(config())
