"""The command line: what a user types, what comes back, and what is on disk afterwards."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer

from cl_graft import PerformanceMatrix, SkillPack, plugins
from cl_graft.budget import Budget
from cl_graft.cli.progress import interruptible
from cl_graft.models.embedded import SPECS
from cl_graft.models.load import load
from cl_graft.models.published import PUBLISHED
from tests.command import Call, Done, assert_refused

SMALL = ["--set", "mini.steps=8", "--set", "mini.train_size=64", "--set", "mini.test_size=12"]
CELL = ["--scenario", "mini", "--strategy", "graftllm", "--model", "nano-llama", "--wandb", "off"]
TASKS = ["math", "code", "cipher"]


@pytest.fixture
def call(call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Call:
    """Run `cl-graft` with these words in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CL_GRAFT_ALLOW_CODE_EXECUTION", raising=False)
    return call


@dataclass
class Finished:
    """A cell that `cl-graft run` made in a process of its own."""

    said: subprocess.CompletedProcess[str]
    out: Path
    cell: Path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    out = tmp_path_factory.mktemp("results")
    words = [sys.executable, "-m", "cl_graft", "run", *CELL, *SMALL, "--allow-code-execution"]
    said = subprocess.run([*words, "--out", str(out)], capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stderr
    (cell,) = (file.parent for file in out.glob("*/cell.json"))
    return Finished(said, out, cell)


@pytest.fixture
def partial(finished: Finished, tmp_path: Path) -> Path:
    """The results folder of the same run, as it was when one of three tasks was learned."""
    cell = tmp_path / "partial" / finished.cell.name
    shutil.copytree(finished.cell, cell)
    (cell / "result.json").unlink()
    for experience in ("02", "03"):
        shutil.rmtree(cell / "experiences" / experience)
    return cell.parent


def files(folder: Path) -> dict[str, tuple[int, bytes]]:
    found = (f for f in folder.rglob("*") if f.is_file())
    return {str(f): (f.stat().st_mtime_ns, f.read_bytes()) for f in found}


# --- light -------------------------------------------------------------------------------------


def test_the_command_line_starts_without_the_heavy_libraries() -> None:
    heavy = ["torch", "transformers", "avalanche", "trl", "wandb", "matplotlib", "pandas", "numpy"]
    code = f"import cl_graft.cli, sys; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_help_names_every_command(call: Call) -> None:
    done = call("--help")
    assert done.code == 0
    assert all(
        f" {name} " in done.out for name in ("run", "sweep", "report", "list", "pack", "doctor")
    )
    for command in (["run"], ["sweep"], ["report"], ["list"], ["pack", "inspect"]):
        assert call(*command, "--help").code == 0


def test_help_needs_neither_rich_nor_pydantic() -> None:
    """They take longer to import than all else together, and `--help` has to answer at once."""
    code = (
        "import sys; sys.argv = ['cl-graft', '--help']\nfrom cl_graft.cli import main\n"
        "try: main()\nfinally: print([m for m in ('rich', 'pydantic') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("\n[]\n")


def test_list_shows_every_name_its_origin_and_a_line_on_it(call: Call) -> None:
    for kind, names in {
        "scenarios": {n: f"scenarios/{n}.py" for n in plugins.names("scenario")},
        "strategies": {n: f"baselines/{n}.py" for n in plugins.names("strategy")}
        | {name: f"cl_graft/strategy/{name}.py" for name in ("graftllm", "graftllm_adaptive")},
        "models": dict.fromkeys(SPECS, "embedded") | dict.fromkeys(PUBLISHED, "a"),
    }.items():
        done = call("list", kind)
        assert done.code == 0
        lines = [line.split(maxsplit=2) for line in done.out.splitlines()]
        found = {name: origin for name, origin, _ in lines}
        assert names.items() <= found.items()
        assert all(len(about) > 10 for *_, about in lines)


def test_a_baseline_of_a_paper_is_listed_with_it(call: Call) -> None:
    own = {"individual", "joint", "sequential", "magnitude"}
    for name in set(plugins.names("strategy")) - own:
        assert re.search(r"arXiv \d{4}\.\d{5}|et al\. \d{4}", call("list", "strategies", name).out)


def test_list_of_a_users_file(call: Call) -> None:
    Path("mine.py").write_text('"""Mine."""\n')
    done = call("list", "strategies", "./mine.py", "lora")
    assert done.out.splitlines()[0].split() == ["./mine.py", "./mine.py", "Mine."]
    assert len(done.out.splitlines()) == 2
    assert_refused(call("list", "strategies", "./none.py"), "there is no file ./none.py")
    assert_refused(call("list", "strategies", "loar"), "did you mean lora")


def test_list_of_budgets_shows_such_as_are_read(call: Call) -> None:
    for line in call("list", "budgets").out.splitlines():
        assert Budget(line.split()[0], 10**9).bytes > 0


def test_list_verbose_shows_options_as_they_are_set(call: Call) -> None:
    done = call("list", "strategies", "--verbose")
    assert '--set lora.convention="trained_on"' in done.out
    assert "--set graftllm.activation_aware=false" in done.out
    assert '--set graftllm_adaptive.layout="small"' in done.out


# --- a run -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_leaves_the_files_that_record_py_documents(finished: Finished) -> None:
    cell = finished.cell
    packs = [f"packs/{i:02d}-{task}.safetensors" for i, task in enumerate(TASKS, 1)]
    experiences = [
        f"experiences/{i:02d}/{f}" for i in range(4) for f in ("examples.jsonl", "experience.json")
    ]
    found = {str(f.relative_to(cell)) for f in cell.rglob("*") if f.is_file()} - {".lock"}
    assert found == {"cell.json", "state.json", "result.json", *packs, *experiences}
    lines = (cell / "experiences" / "03" / "examples.jsonl").read_text().splitlines()
    outcomes = [json.loads(line) for line in lines]
    assert [set(o) for o in outcomes] == [
        {"task", "metric", "index", "score", "answer", "note", "taken_for"}
    ] * 72
    abilities = {f"general:general with {task}" for task in TASKS}
    assert {o["task"] for o in outcomes} == {*TASKS, *abilities}
    assert {o["index"] for o in outcomes} == set(range(12))


@pytest.mark.slow
def test_the_matrix_is_the_mean_of_the_outcomes(finished: Finished) -> None:
    result = json.loads((finished.cell / "result.json").read_text())
    assert result["complete"]
    assert result["tasks"] == TASKS
    for experience, row in enumerate(result["matrix"]):
        file = finished.cell / "experiences" / f"{experience:02d}" / "examples.jsonl"
        outcomes = [json.loads(line) for line in file.read_text().splitlines()]
        for task, value in zip(TASKS, row, strict=True):
            scores = [o["score"] for o in outcomes if o["task"] == task]
            assert value == sum(scores) / len(scores)
    assert result["n"] == [[12] * 3] * 4


@pytest.mark.slow
def test_every_pack_is_within_its_budget_on_disk(finished: Finished) -> None:
    result = json.loads((finished.cell / "result.json").read_text())
    sizes = [f.stat().st_size for f in sorted((finished.cell / "packs").iterdir())]
    parameters = sum(p.numel() for p in load("nano-llama")[0].parameters())
    assert result["pack_bytes"] == sizes
    assert result["base_bytes"] == 2 * parameters
    assert result["budget_bytes"] == 2 * parameters // 10
    assert 0 < max(sizes) <= result["budget_bytes"]


@pytest.mark.slow
def test_a_run_ends_with_the_table_and_where_everything_is(finished: Finished) -> None:
    said = finished.said
    assert "Ranking: mini" in said.stdout
    assert "│ graftllm │" in said.stdout
    assert "after cipher" in said.stdout
    assert said.stdout.splitlines()[-2:] == [
        f"results: {finished.cell}",
        f"figures: cl-graft report {finished.out}",
    ]


@pytest.mark.slow
def test_progress_goes_to_stderr_and_never_back(finished: Finished) -> None:
    lines = finished.said.stderr.splitlines()
    shape = r"\d\d:\d\d:\d\d \[ *(\d+)%\] \d of 1 cells, .+ left.*; mini__\S+: (.+)"
    found = [re.fullmatch(shape, line) for line in lines]
    assert all(found), lines
    done = [int(match[1]) for match in found if match]
    assert done == sorted(done) and done[-1] == 100
    told = [match[2] for match in found if match]
    told = [words for words in told if not words.startswith("preparing ")]  # where none is cached
    assert told[:2] == ["loading the model", "evaluating the base model"]
    for task in TASKS:
        assert any(re.fullmatch(rf"training {task}, step 1 of \d+", words) for words in told)
        assert any(
            re.fullmatch(rf"trained {task}, step (\d+) of \1, loss [\d.]+", words) for words in told
        )


@pytest.mark.slow
def test_a_run_that_is_done_shows_its_table_again_and_does_nothing(
    finished: Finished, call: Call
) -> None:
    before = files(finished.out)
    done = call("run", *CELL, *SMALL, "--out", str(finished.out))
    assert (done.code, done.out, done.err) == (0, finished.said.stdout, "")
    assert files(finished.out) == before


@pytest.mark.slow
def test_a_torn_result_is_made_anew_by_the_same_command(
    finished: Finished, call: Call, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(finished.out, tmp_path / "out"))
    result = out / finished.cell.name / "result.json"
    whole = result.read_text()
    result.write_text(whole[:100])
    assert "; run the same command again to make it anew." in call("report", out).err
    assert call("run", *CELL, *SMALL, "--allow-code-execution", "--out", out).code == 0
    assert result.read_text() == whole


TINY = ["--scenario", "mini", "--model", "nano-llama", "--wandb", "off"]
TINY += [
    word
    for option in ("steps=1", "batch=2", "train_size=4", "test_size=2", "tasks=cipher")
    for word in ("--set", f"mini.{option}")
]


def test_a_run_that_failed_is_failed_and_says_where(call: Call, tmp_path: Path) -> None:
    Path("mine.py").write_text(
        '"""Mine."""\nfrom cl_graft.strategy import compressor\n\n\n'
        "@compressor()\ndef mine(delta, context):\n    raise ValueError('no luck today')\n"
    )
    done = call("run", *TINY, "--strategy", "mine.py")
    told = "mine.py, line 7: ValueError: no luck today"
    assert told in done.reason and "Traceback" not in done.err
    (trace,) = tmp_path.glob("results/*/traceback.txt")
    assert "no luck today" in trace.read_text()
    assert str(trace.relative_to(tmp_path)) in done.reason
    line, counts = call("status").out.splitlines()
    assert line.startswith("failed ") and line.endswith(told)
    assert counts == "0 done, 0 running, 0 waiting, 1 failed"


# --- packs -------------------------------------------------------------------------------------


@pytest.fixture
def pack(finished: Finished) -> Path:
    return finished.cell / "packs" / "02-code.safetensors"


@pytest.mark.slow
def test_verify_a_pack_of_the_run(pack: Path, call: Call) -> None:
    count = len(SkillPack.load(pack).tensors)
    done = call("pack", "verify", str(pack))
    assert (done.code, done.out) == (0, f"{pack} is whole: {count} tensors of task 'code'.\n")
    done = call("pack", "verify", str(pack), "--model", "nano-llama")
    assert done.code == 0
    assert done.out.endswith("of task 'code', for base nano-llama.\n")


# --- reports -----------------------------------------------------------------------------------

KEYS = {
    *("scenario", "strategy", "label", "model", "seed", "budget", "tasks", "complete"),
    *("matrix", "n", "stderr", "metrics", "extra_matrices", "general", "general_packs"),
    *(
        "shared_bytes",
        "alive_bytes",
        "routing",
        "routing_accuracy",
        "overhead",
        "kl_to_base",
        "unlearning",
        "budgeted",
        "notes",
    ),
    *("pack_bytes", "base_bytes", "budget_bytes", "seconds", "tokens", "peak_memory_mb"),
    *(
        "config",
        "options",
        "versions",
        "machine",
        "reads_data_dir",
        "conventions",
        "identical",
        "spent",
        "data",
        "code",
        "base",
        "frequent",
    ),
}


def reported(call: Call, folder: Path) -> dict[str, Any]:
    done = call("report", str(folder), "--json")
    assert (done.code, done.err) == (0, "")
    (cell,) = json.loads(done.out)
    return cell


@pytest.mark.slow
def test_report_writes_tables_and_figures(finished: Finished, call: Call, tmp_path: Path) -> None:
    done = call("report", str(finished.out), "--to", str(tmp_path / "published"))
    assert done.code == 0
    assert "Ranking: mini" in done.out
    written = {f.name: f for f in (tmp_path / "published").iterdir()}
    kinds = {".csv", ".html", ".json", ".md", ".png", ".svg", ".tex"}
    assert {f.suffix for f in written.values() if f.is_file()} == kinds
    assert len({n.partition("pct-")[2] for n in written if n.endswith(".png")}) == 6
    assert str(written["index.html"]) in "".join(done.out.split())
    assert all(f.read_bytes().startswith(b"\x89PNG") for n, f in written.items() if n[-3:] == "png")
    (ranking,) = (f for n, f in written.items() if n.endswith("ranking.csv"))
    assert ranking.read_text().splitlines()[1].startswith("graftllm,")
    told = written["provenance.md"].read_text()
    assert "--strategies graftllm" in told and "math by number (the number after" in told


@pytest.mark.slow
def test_json_of_a_whole_cell(finished: Finished, call: Call) -> None:
    cell = reported(call, finished.out)
    assert set(cell) == KEYS
    told = {key: value for key, value in cell.items() if key != "frequent"}  # of the prompts' file
    assert told == json.loads((finished.cell / "result.json").read_text())
    assert (cell["scenario"], cell["strategy"]) == (
        "mini(steps=8, test_size=12, train_size=64)",
        "graftllm",
    )
    assert (cell["model"], cell["seed"], cell["budget"]) == ("nano-llama", 0, "10%")
    assert {"op", "bwt", "fwt", "fm", "avalanche_forgetting"} <= set(cell["metrics"])
    assert cell["metrics"]["op"] == PerformanceMatrix(cell["matrix"], tasks=TASKS).op()
    assert set(cell["seconds"]) == {"train", "compress", "evaluate", "harness"}
    assert all(seconds > 0 for seconds in cell["seconds"].values())
    base = json.loads((finished.cell / "experiences" / "00" / "experience.json").read_text())
    assert base["task"] is None
    assert cell["matrix"][0] == [base["scores"]["score"][task]["value"] for task in TASKS]


@pytest.mark.slow
def test_json_of_a_cell_under_way_has_null_where_nothing_was_measured(
    finished: Finished, partial: Path, call: Call
) -> None:
    whole, cell = reported(call, finished.out), reported(call, partial)
    assert set(cell) == KEYS
    assert cell["complete"] is False
    for key in ("matrix", "n", "stderr"):
        assert cell[key] == whole[key][:2] + [[None] * 3] * 2
    assert cell["pack_bytes"] == whole["pack_bytes"][:1]
    assert cell["metrics"]["op"] is cell["metrics"]["bwt"] is None


@pytest.mark.slow
def test_a_cell_under_way_is_shown_as_one(partial: Path, call: Call) -> None:
    done = call("report", str(partial))
    assert done.code == 0
    assert "incomplete: seed 0, 1 of 3 tasks" in " ".join(done.out.split())


# --- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--scenario", "minni"], ["no scenario named 'minni'", "mini"]),
        (["--strategy", "graftlm"], ["no strategy named 'graftlm'", "graftllm"]),
        (["--model", "nano-lama"], ["no model named 'nano-lama'", "nano-llama"]),
        (["--wandb", "ofline"], ["no W&B mode", "'ofline'", "offline"]),
        (["--track", "csv,tensorbord"], ["named 'tensorbord'", "tensorboard"]),
        (["--set", "mini.step=3"], ["option", "'step'", "steps"]),
        (["--set", "graftllm.betta=1.0"], ["option", "'betta'", "beta"]),
        (["--set", "mimi.steps=3"], ["'mimi'", "mini"]),
        (["--set", "lora.rank=3"], ["'lora'", "known: graftllm, mini"]),
        (["--set", "mini.steps=many"], ["mini.steps='many'", "int"]),
        (["--set", "steps"], ["--set 'steps'", "name.option=value"]),
        (["--budget", "10"], ["budget '10'", "10%"]),
        (["--budget", "-5%"], ["budget '-5%'", "10%"]),
        (["--budget", "0%"], ["budget '0%'", "10%"]),
        (["--seed", "-1"], ["seed -1", "0"]),
        (["--strategy", "nowhere.py"], ["no file nowhere.py"]),
        (["--model", "."], ["config.json"]),
    ],
)
def test_a_name_or_value_that_is_wrong(
    words: list[str], told: list[str], call: Call, tmp_path: Path
) -> None:
    done = call("run", *CELL, "--allow-code-execution", *words)
    assert_refused(done, *told) if words[0] != "--model" else assert_told(done, *told)
    assert not list(tmp_path.iterdir()), "nothing should be written for a run that cannot be"


def assert_told(done: Done, *words: str) -> None:
    """The same after progress: the last line is the sentence."""
    *progress, last = done.err.splitlines(keepends=True)
    assert all(re.match(r"\d\d:\d\d:\d\d \[", line) for line in progress)
    assert_refused(Done(done.code, done.out, last), *words)


def test_programs_are_not_run_without_consent(call: Call, tmp_path: Path) -> None:
    done = call("run", *CELL, *SMALL)
    assert_refused(done, "'code'", "--allow-code-execution", "CL_GRAFT_ALLOW_CODE_EXECUTION")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("def mine(delta, context):\n    return {}\n", ["mine", "@compressor"]),
        ("mine = 7\n", ["mine", "@compressor"]),
        ("class mine:\n    pass\n", ["mine", "Strategy"]),
        ("other = 7\n", ["defines no 'mine'"]),
        ("def mine(:\n", ["does not import", "SyntaxError"]),
        ("import no_such_module\n", ["does not import", "no_such_module"]),
    ],
)
def test_a_strategy_file_that_holds_no_strategy(
    text: str, told: list[str], call: Call, tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(text)
    done = call("run", *CELL, "--allow-code-execution", "--strategy", "mine.py")
    assert_refused(done, "mine.py", *told)
    assert {f.name for f in tmp_path.iterdir()} <= {"mine.py", "__pycache__"}


def test_a_scenario_file_that_holds_no_scenario(call: Call, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def mine(*, seed, data_dir=None):\n    return [seed]\n")
    done = call("run", *CELL, "--scenario", "mine.py")
    assert_refused(done, "mine.py, line 1: mine is not a scenario", "list")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["list", "strategy"], ["'strategy'", "strategies"]),
        (["list", "banana"], ["'banana'", "models", "scenarios", "strategies"]),
        (["report", "nowhere"], ["no folder nowhere", "--out"]),
        (["report", "."], [". holds no cell", "cl-graft run"]),
        (["report", "nowhere", "--json"], ["no folder nowhere"]),
        (["pack", "inspect", "nowhere"], ["no file nowhere"]),
        (["pack", "verify", "."], [". is no regular file"]),
        (["sweep", "--scenarios", "mini", "--strategies", ","], ["','", "nothing to run"]),
        (["sweep", "--scenarios", "mini", "--strategies", "lora", "--seeds", "0,x"], ["seed 'x'"]),
        (["sweep", "--scenarios", "mini", "--strategies", "graftlm"], ["graftllm"]),
    ],
)
def test_other_commands_refuse_in_a_sentence(words: list[str], told: list[str], call: Call) -> None:
    assert_refused(call(*words), *told)


@pytest.mark.slow
def test_a_results_folder_of_another_version(partial: Path, call: Call) -> None:
    (file,) = partial.glob("*/cell.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 99}))
    before = files(partial)
    done = call("run", *CELL, *SMALL, "--allow-code-execution", "--out", str(partial))
    assert_told(done, str(file.parent), "format 99", "--out")
    assert_refused(call("report", str(partial)), str(file.parent), "format 99")
    assert {f: b for f, (_, b) in files(partial).items() if not f.endswith(".lock")} == {
        f: b for f, (_, b) in before.items() if not f.endswith(".lock")
    }


@pytest.mark.slow
def test_a_truncated_pack_when_a_run_goes_on(partial: Path, call: Call) -> None:
    (pack,) = partial.glob("*/packs/01-math.safetensors")
    pack.write_bytes(pack.read_bytes()[:-1])
    done = call("run", *CELL, *SMALL, "--allow-code-execution", "--out", str(partial))
    assert_told(done, str(pack), "make the pack again")


@pytest.mark.slow
def test_a_report_that_cannot_be_written(finished: Finished, call: Call, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    done = call("report", str(finished.out), "--to", str(tmp_path / "taken"))
    assert done.code == 1
    assert done.err.startswith(f"error: {tmp_path / 'taken'} cannot be written")
    assert done.err.count("\n") == 1
    assert (tmp_path / "taken").read_text() == "mine"
    shutil.copytree(finished.out, tmp_path / "elsewhere")
    assert call("report", str(tmp_path / "elsewhere")).code == 0


def test_sigterm_is_answered_like_ctrl_c(capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(typer.Exit) as ended, interruptible():
        os.kill(os.getpid(), signal.SIGTERM)
        signal.sigtimedwait([], 5)
    assert ended.value.exit_code == 130
    assert capsys.readouterr().err == "stopped; run the same command again to continue.\n"
    assert signal.getsignal(signal.SIGTERM) is before
