"""What can be told at once is told at once: without importing what takes seconds, the cheapest check first."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from cl_graft import plugins
from cl_graft.errors import CLGraftError, UnknownName
from cl_graft.models import load
from cl_graft.tracking.wandb import require_login
from tests.command import Call, assert_refused
from tests.refusals import one_sentence

HEAVY = ["torch", "transformers", "trl", "peft", "datasets", "avalanche", "matplotlib", "wandb"]
RUN = ["run", "--scenario", "mini", "--strategy", "lora"]
SWEEP = ["--scenarios", "mini", "--strategies", "lora"]
REFUSED = {
    "a folder that is not there": (
        [*RUN, "--model", "/no/such/folder"],
        "no folder /no/such/folder",
    ),
    "a folder without a model": ([*RUN, "--model", "."], "config.json"),
    "a model's name": ([*RUN, "--model", "mini-lama"], "did you mean mini-llama"),
    "a hub id": ([*RUN, "--model", "owner/none"], "HF_HUB_OFFLINE"),
    "a budget": ([*RUN, "--budget", "ten"], "budget 'ten'"),
    "a strategy": ([*RUN, "--strategy", "loar"], "did you mean lora"),
    "a scenario": ([*RUN, "--scenario", "minni"], "did you mean mini"),
    "a strategy's file": ([*RUN, "--strategy", "none.py"], "no file none.py"),
    "an option": ([*RUN, "--set", "lora.rnk=3"], "did you mean rank"),
    "an option's value": ([*RUN, "--set", "lora.rank=0"], "1 or more"),
    "an option of the scenario": ([*RUN, "--set", "mini.step=3"], "did you mean steps"),
    "the seed": ([*RUN, "--seed", "-1"], "seed -1"),
    "a router": ([*RUN, "--task-ids", "inferred", "--router", "rigde"], "did you mean ridge"),
    "a router's option": (
        [*RUN, "--task-ids", "inferred", "--router-options", "regularization=1"],
        "did you mean regularisation",
    ),
    "data that are not there": (
        [*RUN, "--scenario", "math_then_code", "--data-dir", "."],
        "there is no mawps",
    ),
    "consent": (RUN, "--allow-code-execution"),
    "login": ([*RUN, "--wandb", "online"], "wandb login"),
    "consent to a sweep": (["sweep", *SWEEP], "--allow-code-execution"),
    "a sweep's option": (["sweep", *SWEEP, "--set", "lora.rnk=3"], "did you mean rank"),
    "a plan's folder": (["plan", *SWEEP, "--models", "/no/such/folder"], "no folder"),
    "a valid file's folder": (["validate", "sweep.yaml"], "no folder /no/such/folder"),
}
PROGRAM = """
import contextlib, io, json, sys
from cl_graft.cli import main
told = {}
for name, words in json.load(sys.stdin).items():
    sys.argv, said = ["cl-graft", *words], io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.suppress(SystemExit):
        main()
    told[name] = said.getvalue(), [m for m in HEAVY if m in sys.modules]
print(json.dumps(told))
"""


def test_what_is_refused_is_refused_without_the_heavy_libraries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sweep.yaml").write_text(
        "scenarios: [mini]\nstrategies: [lora]\nmodels: [/no/such/folder]\n"
    )
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    for name in ("WANDB_API_KEY", "CL_GRAFT_ALLOW_CODE_EXECUTION", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    words = {name: given for name, (given, _) in REFUSED.items()}
    done = subprocess.run(
        [sys.executable, "-c", f"HEAVY = {HEAVY}\n{PROGRAM}"],
        input=json.dumps(words),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    for name, (said, imported) in json.loads(done.stdout).items():
        assert said.startswith("error: ") and said.count("\n") == 1, (name, said)
        assert REFUSED[name][1] in said and imported == [], (name, said, imported)
    assert [f.name for f in tmp_path.iterdir()] == ["sweep.yaml"]


def test_the_process_that_only_hands_cells_out_checks_their_data_without_the_heavy_libraries() -> (
    None
):
    program = f"""
import sys
from cl_graft.experiment.prepare import check_data
from cl_graft.sweep_config import Sweep

check_data(Sweep(scenarios=["mini"], strategies=["lora"], allow_code_execution=True).cells())
print([name for name in {HEAVY} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_of_two_mistakes_the_one_that_costs_less_to_find_is_told(call: Call) -> None:
    wrong = {
        "--budget": ("ten", "budget"),
        "--set": ("lora.rnk=3", "option of strategy"),
        "--model": ("/no/such/folder", "no folder"),
    }
    words = [word for option, (value, _) in wrong.items() for word in (option, value)]
    while words:
        told = wrong[words[0]][1]
        assert_refused(call(*RUN, *words), told)
        words = words[2:]
    assert_refused(call(*RUN), "--allow-code-execution")


def test_options_are_read_from_the_source_as_the_plug_in_declares_them() -> None:
    """Nothing but a signature that inherits, or has a default that is no plain value, needs an import."""
    told = []
    for kind in ("strategy", "scenario", "router"):
        for name in plugins.names(kind):
            if (read := plugins.declared(kind, name)) is None:
                continue
            told.append(name)
            loaded = plugins.load(kind, name)
            assert plugins.options(read) == plugins.options(loaded)
            for option, default in plugins.options(loaded).items():
                for value in (default, "words", -1, 0.5, [1], True):
                    given = {option: value}
                    outcomes = []
                    for plugin in (read, loaded):
                        try:
                            outcomes.append(plugins.check_options(kind, name, plugin, given))
                        except CLGraftError as error:
                            outcomes.append(str(error))
                    assert outcomes[0] == outcomes[1]
    assert {"lora", "magnitude", "mini", "graftllm", "ridge"} <= {*told}


@pytest.mark.parametrize("how", ["a key", "a netrc", "a netrc of a server of one's own"])
def test_who_is_logged_in_may_be_online(
    how: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "netrc").write_text("machine api.wandb.ai\n  login user\n  password 0")
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    assert "run `wandb login`" in one_sentence(lambda: require_login("online"))
    if how == "a key":
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    else:
        monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    if "own" in how:
        monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
        assert "run `wandb login`" in one_sentence(lambda: require_login("online"))
        (tmp_path / "netrc").write_text("machine wandb.example.org login user password 0")
    require_login("online")
    require_login("offline")


# --- names -------------------------------------------------------------------------------------


def test_the_nearest_name_is_never_the_one_that_was_given() -> None:
    error = UnknownName("scenario or strategy", "lora", ["lora", "o_lora", "mini"])
    assert str(error) == "there is no scenario or strategy named 'lora'; did you mean o_lora?"
    assert str(UnknownName("task", "a", ["a"])) == "there is no task named 'a'; known: none."


def test_what_else_could_be_given_is_no_name_that_could_be_meant() -> None:
    for typo in ("owner-model", "model", "a-model-folder"):
        said = one_sentence(lambda name=typo: load.check(name), UnknownName)
        assert "owner/model" not in said and "did you mean a" not in said
        assert said.endswith("; or give a model's folder or hub id.") or "did you mean" in said


# --- the hub -----------------------------------------------------------------------------------


@contextmanager
def hub(status: int, code: str) -> Iterator[str]:
    """A server that answers everything as the hub does where it gives nothing; its address."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            if code:
                self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *words: object) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.parametrize(
    ("status", "code", "told"),
    [
        (404, "RepoNotFound", "the hub shows none of that name"),
        (403, "GatedRepo", "is gated"),
        (500, "", "the hub cannot be asked"),
    ],
)
def test_a_model_that_the_hub_does_not_give_is_a_sentence(
    status: int, code: str, told: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """By a server of our own in the hub's place, as the hub answers."""
    from huggingface_hub import constants

    with hub(status, code) as url:
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        said = one_sentence(lambda: load.reach(f"owner/none-{status}"))
    assert f"model 'owner/none-{status}'" in said and told in said
