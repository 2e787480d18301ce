"""Every cure that an error prints and a user can run leads to success; the register is in `tests/cures.py`."""

from __future__ import annotations

import ast
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cl_graft import SkillPack, plugins, sweep_config
from cl_graft.data import hub
from cl_graft.data.readers import records
from cl_graft.errors import CLGraftError
from cl_graft.experiment.cache import entries
from cl_graft.models.load import load, locate
from cl_graft.skillpack import codecs
from cl_graft.skillpack.folders.apply import apply_pack
from cl_graft.skillpack.folders.checkpoint import Checkpoint
from cl_graft.skillpack.live.grafted import Grafted
from cl_graft.store.record import CellFolder, cells, states
from cl_graft.stream import benchmark
from cl_graft.task import Example, Task
from cl_graft.training.config import Launch
from cl_graft.training.launch import slots
from cl_graft.training.term import Term
from cl_graft.training.term import check as check_terms
from tests import cures
from tests.command import Call, assert_refused
from tests.model_folders import llama, pack_of, rewrite, saved, tensors, tuned
from tests.refusals import one_sentence

ROOT = Path(__file__).parents[1]


# --- the register ------------------------------------------------------------------------------


def test_every_cure_that_can_be_run_has_a_test_or_a_reason() -> None:
    """A new one fails here until a test runs it; one that is gone leaves the register, too."""
    registered = cures.TESTED.keys() | cures.OPEN.keys()
    assert not cures.found() - registered, "give it a test, and name that in TESTED"
    assert not registered - set(cures.messages()), "gone from the code"
    assert not cures.TESTED.keys() & cures.OPEN.keys()
    assert all(reason.endswith(".") for reason in cures.OPEN.values())


def test_the_tests_that_the_register_names_are_there() -> None:
    for named in set(cures.TESTED.values()):
        file, _, name = named.partition("::")
        tree = ast.parse((ROOT / "tests" / file).read_text("utf-8"))
        assert any(isinstance(n, ast.FunctionDef) and n.name == name for n in ast.walk(tree)), named


def refused(action: Callable[[], Any], *words: str) -> None:
    said = one_sentence(action, CLGraftError)
    assert all(word in said for word in words), said


# --- records of a run --------------------------------------------------------------------------

IDENTITY = {"config": {"strategy": "lora", "seed": 0}, "data": "d" * 32}


def test_another_out_or_a_deleted_folder(tmp_path: Path) -> None:
    folder = CellFolder(tmp_path / "cell")
    folder.begin(IDENTITY)
    sources = {"sources": {"strategy": {"mine.py": "f" * 32}}}
    for number, changed in enumerate(({"data": "e" * 32}, sources)):
        cure = "choose another --out, or delete" if "sources" in changed else "or delete the folder"
        refused(lambda: folder.begin(IDENTITY | changed), cure)  # noqa: B023
        CellFolder(tmp_path / f"other-{number}").begin(IDENTITY | changed)
        shutil.rmtree(folder.path)
        folder.begin(IDENTITY | changed)
        shutil.rmtree(folder.path)
        folder.begin(IDENTITY)


def test_results_of_another_format(tmp_path: Path) -> None:
    folder = CellFolder(tmp_path / "cell")
    folder.begin(IDENTITY)
    about = json.loads((folder.path / "cell.json").read_text())
    (folder.path / "cell.json").write_text(json.dumps(about | {"format": 1}))
    refused(lambda: folder.begin(IDENTITY), "choose another --out, or the version that wrote it")
    CellFolder(tmp_path / "other").begin(IDENTITY)
    (folder.path / "cell.json").write_text(json.dumps(about))
    folder.begin(IDENTITY)


def test_a_cell_that_another_process_computes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cl_graft.store.record.PATIENCE", 0.01)
    folder = CellFolder(tmp_path / "cell")

    def take(place: Path) -> None:
        with CellFolder(place).lock():
            pass

    with folder.lock():
        refused(lambda: take(folder.path), "wait for it or choose another --out")
        take(tmp_path / "other")
    take(folder.path)


def test_a_place_where_nothing_can_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")

    def take(place: Path) -> None:
        with CellFolder(place).lock():
            pass

    refused(lambda: take(tmp_path / "file" / "cell"), "choose another --out")
    take(tmp_path / "other" / "cell")


def test_the_folder_that_out_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(lambda: cells(tmp_path / "nowhere"), "the folder that --out named")
    refused(lambda: cells(tmp_path / "empty"), "run `cl-graft run` with --out")
    refused(lambda: states(tmp_path / "empty"), "the folder that --out named")
    refused(lambda: entries(tmp_path / "empty"), "give a results folder, or the one that --cache")
    CellFolder(tmp_path / "out" / "cell").begin(IDENTITY)
    CellFolder(tmp_path / "out" / "cell").mark("waiting")
    (tmp_path / "out" / "stages").mkdir()
    assert cells(tmp_path / "out") == [*states(tmp_path / "out")] == [tmp_path / "out" / "cell"]
    assert entries(tmp_path / "out") == []


# --- sweeps, options, plug-ins -----------------------------------------------------------------


def test_the_file_that_init_writes(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.yaml").write_text("")
    for file in ("nowhere.yaml", "empty.yaml"):
        assert_refused(call("validate", file), "`cl-graft init` writes a file to begin with")
    assert call("init", "new.yaml").code == 0
    assert sweep_config.read(tmp_path / "new.yaml")


def sweep_of(**fields: Any) -> Any:
    given = {"scenarios": "mini", "strategies": "lora"} | fields
    return sweep_config.sweep_of(given, "here")


def test_names_that_list_shows(call: Call) -> None:
    refused(lambda: sweep_of(strategies=[]), "as `cl-graft list strategies` shows")
    shown = call("list", "strategies").out
    assert any(line.split()[0] == "svd" for line in shown.splitlines())
    assert sweep_of(strategies=["svd"]).cells()


@pytest.mark.parametrize("wrong", [{"lora": 5}, {"lora": {"rank": 8}, "svd": {}}])
def test_a_name_with_its_options(wrong: Any) -> None:
    refused(lambda: sweep_of(strategies=[wrong]).cells(), "write `- lora: {rank: 8}`")
    (cell,) = sweep_of(strategies=[{"lora": {"rank": 8}}]).cells()
    assert cell.options["lora"] == {"rank": 8}


def test_set_as_it_should_read() -> None:
    refused(lambda: plugins.parse_set("rank=8"), "name.option=value, such as lora.rank=8")
    assert plugins.parse_set("lora.rank=8") == ("lora", "rank", 8)


STRATEGY = "from cl_graft.strategy.forms import compressor\n\n\n{}def mine(delta, context):\n    return {{}}\n"


def test_a_strategy_by_its_decorator(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(STRATEGY.format(""))
    refused(lambda: plugins.load("strategy", str(file)), "make it one by @compressor()")
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "mine.py").write_text(STRATEGY.format("@compressor()\n"))
    assert plugins.load("strategy", str(tmp_path / "again" / "mine.py"))


ROUTER = """
from cl_graft.routing.base import Router


class mine{}:
    def update(self, *given):
        pass

    def scores(self, *given):
        pass
"""


def test_a_router_by_its_base(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def mine():\n    pass\n")
    refused(
        lambda: plugins.load("router", str(file)), "make it a subclass of cl_graft.routing.base"
    )
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "mine.py").write_text(ROUTER.format("(Router)"))
    assert plugins.load("router", str(tmp_path / "again" / "mine.py"))


WHOLE = """
from cl_graft import Strategy
from cl_graft.skillpack import codecs


class {name}(Strategy):
    def learn(self, task, context):
        kept = {{n: codecs.dense(d) for n, d in self.fine_tune(task, context).items()}}
        return kept if {own} else Kept({{}}, {{"all": kept}})
"""


@pytest.mark.parametrize("own", [True, False])
def test_a_larger_budget(own: bool, build: Any, tiny_scenario: Any, tmp_path: Path) -> None:
    """All of the delta in bf16 is 100 % of the base; for a task's own pack, and for what its tasks share."""
    (tmp_path / "whole.py").write_text(
        "from cl_graft.strategy import Kept\n" + WHOLE.format(name="whole", own=own)
    )
    first = benchmark(tiny_scenario).train_stream[0]
    name = str(tmp_path / "whole.py")
    refused(lambda: build(name, budget="50%").train(first, eval_streams=[]), "raise --budget or")
    build(name, budget="110%").train(first, eval_streams=[])


def test_a_suite_of_another_name() -> None:
    def task(suite: str) -> Task:
        return Task("t", [Example("p", "c")], [Example("q", "d", suite=suite)], "exact", ("f1",))

    refused(lambda: task("f1"), "rename the suite")
    assert task("first").suites == ("first",)


# --- launches ----------------------------------------------------------------------------------


def test_a_host_and_its_devices(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("a slots=8\nb: 8\n")
    refused(lambda: slots(hosts), "write a host and its devices as `host slots=8`")
    hosts.write_text("a slots=8\nb slots=8\n")
    assert slots(hosts) == 16


def test_terms_under_another_stage_of_zero() -> None:
    wrong = Launch(processes=2, zero=3)
    refused(lambda: check_terms(["penalty"], wrong, "ewc"), "launch with zero=2")
    check_terms(["penalty"], Launch(processes=2, zero=2), "ewc")
    wrong = Launch(processes=2, zero=2, offload=True)
    refused(lambda: check_terms(["project"], wrong, "agem"), "launch with offload=false")
    check_terms(["project"], Launch(processes=2, zero=2, offload=False), "agem")


def push(model: Any, gradients: Any, state: Any, step: int) -> None:
    """A term's function as it should be: of a file, and at its top level."""


def test_a_term_at_the_top_level() -> None:
    def local(model: Any, gradients: Any, state: Any, step: int) -> None: ...

    refused(lambda: Term.project(local), "the top level of a Python file; move it there")
    assert Term.project(push).function is push


# --- data --------------------------------------------------------------------------------------


def test_a_data_set_in_its_folder(tmp_path: Path) -> None:
    file = tmp_path / "x" / "a.jsonl"
    refused(lambda: records(None, "x/a.jsonl", ("q",)), "with --data-dir")
    refused(lambda: records(tmp_path, "x/a.jsonl", ("q",)), "with --data-dir")
    file.parent.mkdir()
    file.write_text("")
    refused(lambda: records(tmp_path, "x/a.jsonl", ("q",)), "put the data set's file there")
    file.write_text('{"q": "1"}\n')
    assert records(tmp_path, "x/a.jsonl", ("q",)) == [{"q": "1"}]


# --- models ------------------------------------------------------------------------------------


def test_an_end_token_in_tokenizer_config(tmp_path: Path) -> None:
    folder = saved(llama(), tmp_path / "model")
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in config.items() if k != "eos_token"}))
    refused(lambda: load(str(folder)), "set eos_token in its tokenizer_config.json")
    path.write_text(json.dumps(config | {"eos_token": "</s>"}))
    assert load(str(folder))[1].eos_token_id == 27


def test_another_folder_for_embedded_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("mine")
    monkeypatch.setenv("CL_GRAFT_CACHE", str(tmp_path / "file"))
    refused(lambda: locate("nano-llama"), "set CL_GRAFT_CACHE to another folder")
    monkeypatch.setenv("CL_GRAFT_CACHE", str(tmp_path / "other"))
    assert Path(locate("nano-llama")).is_dir()


def test_weights_in_a_dtype_that_is_read(tmp_path: Path) -> None:
    folder = saved(tuned(llama()), tmp_path / "model")
    whole = (folder / "model.safetensors").read_bytes()
    header = {"w": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"\0\0")
    refused(lambda: Checkpoint(folder), "save the model in bfloat16 or float32")
    (folder / "model.safetensors").write_bytes(whole)
    for dtype in (torch.bfloat16, torch.float32):
        rewrite(
            folder, {n: t.to(dtype) for n, t in load_file(folder / "model.safetensors").items()}
        )
        assert Checkpoint(folder).dtype == dtype


# --- packs -------------------------------------------------------------------------------------


def test_a_pack_of_more_rows_than_a_live_model_has(tmp_path: Path, call: Call) -> None:
    base = saved(llama(), tmp_path / "base")
    pack_of(base, saved(tuned(llama(vocab_size=50)), tmp_path / "wide"), tmp_path / "pack")
    live = Grafted(llama())
    refused(lambda: live.activate([SkillPack.load(tmp_path / "pack")]), "`cl-graft pack apply`")
    words = ["--base", base, "--pack", tmp_path / "pack", "--out", tmp_path / "out"]
    assert call("pack", "apply", *words).code == 0
    assert load(str(tmp_path / "out"))[0].lm_head.weight.shape == (50, 32)


def norms(base: Path) -> SkillPack:
    kept = {"model.norm.weight": codecs.dense(torch.ones(32), torch.float32)}
    print_ = Checkpoint(base).fingerprint()
    return SkillPack(kept, task="t", method="m", options={}, base=print_)


def test_what_no_adapter_holds_goes_to_a_folder(tmp_path: Path, call: Call) -> None:
    base = saved(llama(), tmp_path / "base")
    norms(base).save(tmp_path / "pack")
    words = ["pack", "export", "--base", base, "--pack", tmp_path / "pack", "--out"]
    assert_refused(call(*words, tmp_path / "a", "--to", "peft"), "export it to a folder (--to hf)")
    assert call(*words, tmp_path / "b", "--to", "hf").code == 0
    assert tensors(tmp_path / "b")["model.norm.weight"][0] == 2


def test_a_rank_is_for_adapters(tmp_path: Path, call: Call) -> None:
    base = saved(llama(), tmp_path / "base")
    pack_of(base, saved(tuned(llama()), tmp_path / "tuned"), tmp_path / "pack")
    words = ["pack", "export", "--base", base, "--pack", tmp_path / "pack", "--out"]
    done = call(*words, tmp_path / "a", "--to", "hf", "--rank", "2")
    assert_refused(done, "leave it out, or export --to peft")
    assert call(*words, tmp_path / "b", "--to", "hf").code == 0
    assert call(*words, tmp_path / "c", "--to", "peft", "--rank", "2").code == 0


def test_applied_packs_are_the_sum(tmp_path: Path) -> None:
    """The premise of the tests above: a pack of norms by hand is put on its base."""
    base = saved(llama(), tmp_path / "base")
    apply_pack(base, norms(base), tmp_path / "out")
    assert torch.equal(tensors(tmp_path / "out")["model.norm.weight"], 2 * torch.ones(32))


# --- data sets of the hub ----------------------------------------------------------------------


def test_a_folder_that_datasets_reads(tmp_path: Path) -> None:
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "train.parquet").write_text("torn")

    def read(name: str) -> list[str]:
        return hub.rows(str(tmp_path / name), lambda row: row["q"], ["q"])

    refused(lambda: read("torn"), "a folder that `datasets` reads")
    (tmp_path / "good").mkdir()
    (tmp_path / "good" / "train.jsonl").write_text('{"q": "1"}\n')
    assert read("good") == ["1"]
