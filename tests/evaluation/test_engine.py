"""Engines: a server that is given the weights answers as the model in this process does, or is refused in a sentence."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from cl_graft.errors import CLGraftError, UnknownName
from cl_graft.evaluation.endpoint import KEY, Endpoint, EndpointError, engine_named, url_of
from cl_graft.evaluation.engine import Engine
from cl_graft.evaluation.examiner import Examiner, Group
from cl_graft.evaluation.generate import choice_likelihoods, generate, log_likelihoods
from cl_graft.evaluation.outcomes import Outcomes
from cl_graft.evaluation.vllm_server import vllm_server
from cl_graft.skillpack.live.grafted import Grafted
from cl_graft.task import Example, Scenario, Task
from tests import openai_server
from tests.command import Call, Done, assert_refused
from tests.openai_server import Models, running

Nano = tuple[Any, Any]
PROMPTS = ["Question: what is 3 + 4?", " 17 * 2 =", "write a program\nthat adds", "ä?"]
TEXT = {"openapi_json": {"paths": {"/load_model": {}}}}  # as transformers serve tells it


def test_a_server_answers_with_the_weights_that_are_on_and_its_folder_goes(
    nano: Nano, tmp_path: Path
) -> None:
    model, tokenizer = nano
    with running(Models(), **TEXT) as server:
        engine = Engine(server.url, tmp_path)
        engine.check([("exact", "answers")])
        for _ in range(2):
            model.lm_head.weight.data.add_(0.05 * model.lm_head.weight.data.roll(1, 0))
            settings = model.generation_config.to_dict()
            with engine.serving(model, tokenizer) as served:
                said = served.answers(PROMPTS, 8)
            assert said == generate(model, tokenizer, PROMPTS, 8) and any(said)
            assert model.generation_config.to_dict() == settings
        folders = {body["model"] for _, body, _ in server.asked if "model" in body}
        assert len(folders) == 3 and not any(Path(folder).exists() for folder in folders)
        assert [path for path, *_ in server.asked].count("/v1/completions") == 9
        assert server.asked[-1][0] == "/reset"  # the server lets the weights go
    assert not [p for p in (tmp_path / "served").iterdir() if p.suffix != ".lock"]


@pytest.mark.slow
def test_vllm_reads_the_same_token_ids_and_tells_the_same_likelihoods(
    nano: Nano, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program of vLLM's name with its protocol: vLLM itself needs a GPU."""
    model, tokenizer = nano
    package = tmp_path / "site" / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    root = Path(__file__).parents[2]
    (package / "api_server.py").write_text(
        f"import sys; sys.path.insert(0, {str(root)!r})\n"
        "from tests.openai_server import Models, Server\n"
        "told = dict(zip(sys.argv[1::2], sys.argv[2::2]))\n"
        "class Mine(Models):\n"
        "    def __call__(self, path, body):\n"
        "        mine = body['model'] == told['--served-model-name'] and not isinstance(body['prompt'], str)\n"
        "        return super().__call__(path, body) if mine else 404\n"
        "Server.server_bind = lambda self: (setattr(self, 'server_address', ('127.0.0.1', int(told['--port']))),\n"
        "    super(Server, self).server_bind())\n"
        "Server(Mine(), {'/version': {'version': '0.0'}}).serve_forever()\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'site'}:{os.environ.get('PYTHONPATH', '')}")
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    pairs = [(prompt, " 42") for prompt in PROMPTS]
    with vllm_server(str(tmp_path / "model")) as endpoint:
        from cl_graft.evaluation.engine import Served

        served = Served(endpoint, str(tmp_path / "model"), tokenizer, [2], True)
        assert served.answers([*PROMPTS, ""], 8) == generate(model, tokenizer, [*PROMPTS, ""], 8)
        close = pytest.approx(log_likelihoods(model, tokenizer, pairs, 64), abs=1e-3)
        assert served.likelihoods(pairs, 64) == close
        for room in (64, 6):
            mine = choice_likelihoods(model, tokenizer, PROMPTS, [" yes", " no, it is"], room)
            rows = served.choice_likelihoods(PROMPTS, [" yes", " no, it is"], room)
            assert rows == [pytest.approx(row, abs=1e-3) for row in mine]
    with pytest.raises(EndpointError, match="cannot be reached"):
        served.answers(["a"], 1)
    (package / "api_server.py").write_text("raise SystemExit('no GPU here')")
    with (
        pytest.raises(EndpointError, match=r"did not start for .*\(no GPU here\); see"),
        vllm_server("folder"),
    ):
        pass


def test_outcomes_of_one_engine_are_never_taken_for_anothers(nano: Nano, tmp_path: Path) -> None:
    model, tokenizer = nano
    test = [Example(prompt, "1") for prompt in PROMPTS]
    task, outcomes = Task("t", test, test, "exact", max_new_tokens=4), Outcomes(tmp_path, "c")

    def measured(engine: Engine | None) -> int:
        examiner = Examiner(Grafted(model), tokenizer, outcomes, False)
        examiner.engine = engine
        examiner.measure(task, [Group([], range(len(test)))], 0)
        return len(list((tmp_path / "evaluations").glob("*.jsonl")))

    assert measured(None) == measured(None) == 1
    with running(Models(), **TEXT) as server:
        assert measured(Engine(server.url, tmp_path)) == 2
        asked = len(server.asked)
        assert measured(Engine(server.url, tmp_path)) == 2 and len(server.asked) == asked
        with running(Models(), **TEXT) as other:
            assert measured(Engine(other.url, tmp_path)) == 3
    files = (tmp_path / "evaluations").glob("*.jsonl")
    told = [json.loads(f.read_text().split("\n", 1)[0]).get("engine") for f in files]
    assert {(t or {}).get("engine") for t in told} == {None, server.url, other.url}


def one_text(**changed: Any) -> Callable[[str, dict[str, Any]], Any]:
    """A server that says `x` to all prompts of folders that are there, with something about it changed."""

    def answer(path: str, body: dict[str, Any]) -> Any:
        if not Path(body.get("model", "/")).is_dir():
            return 404
        whole = {"model": body["model"], "choices": [{"text": "x"}], "usage": {"prompt_tokens": 2}}
        return whole | changed

    return answer


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (
            lambda path, body: b"<html>" + b"x" * 900,
            r"'<html>x{154}', which is no answer of an OpenAI",
        ),
        (lambda path, body: b"[" * 100_000, "no answer"),
        (lambda path, body: [1], "no answer"),
        (one_text(choices=[]), "no answer"),
        (one_text(choices=[{"text": 7}]), "no answer"),
        (one_text(model="another"), "answers as 'another' where '.*' was asked"),
        (one_text(usage=None), "reads None tokens of prompt 'ab', which are 2 here"),
        (one_text(usage={"prompt_tokens": 3}), "reads 3 tokens of prompt 'ab', which are 2 here"),
        (lambda path, body: 307, "HTTP 307"),
        (lambda path, body: 500, r"refuses a request for model '.*' \(HTTP 500: no\)"),
    ],
)
def test_a_bad_server_is_one_sentence(answer: Any, words: str, nano: Nano, tmp_path: Path) -> None:
    model, tokenizer = nano
    assert len(tokenizer("ab")["input_ids"]) in (2, 3)
    prompt = "ab" if len(tokenizer("ab")["input_ids"]) == 2 else "a"
    words = words.replace("'ab'", f"'{prompt}'")
    with (
        running(answer) as server,
        Engine(server.url, tmp_path).serving(model, tokenizer) as served,
        pytest.raises(EndpointError, match=words) as raised,
    ):
        served.answers([prompt], 4)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 500
    assert not list((tmp_path / "served").glob("*/*"))


def test_a_server_that_is_late_or_endless_or_away(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        running(openai_server.late(3)) as server,
        pytest.raises(EndpointError, match="did not answer within 0 seconds; see"),
    ):
        Endpoint(server.url, 0.2).post("/completions", {})
    with pytest.raises(EndpointError, match="cannot be reached"):
        Endpoint(server.url).post("/completions", {})
    monkeypatch.setattr("cl_graft.evaluation.endpoint.MOST", 1 << 20)
    with (
        running(lambda path, body: b"x" * (1 << 21)) as server,
        pytest.raises(EndpointError, match="more than 1 MiB"),
    ):
        Endpoint(server.url).post("/completions", {})


def test_a_server_that_sends_a_byte_now_and_then() -> None:
    listening = socket.create_server(("127.0.0.1", 0))

    def trickle() -> None:
        there, _ = listening.accept()
        with there, suppress(OSError):
            there.recv(1 << 16)
            there.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
            for _ in range(1000):
                there.sendall(b" ")
                time.sleep(0.05)

    thread = Thread(target=trickle)
    thread.start()
    begun = time.monotonic()
    url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
    with listening, pytest.raises(EndpointError, match="did not answer within"):
        Endpoint(url, 0.4).post("/completions", {})
    assert time.monotonic() - begun < 10
    thread.join()


def test_a_token_goes_to_servers_of_this_machine_or_over_tls_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(KEY, "secret")
    with running(lambda path, body: {}) as server:
        Endpoint(server.url).post("/completions", {})
        assert server.asked[0][2]["Authorization"] == "Bearer secret"
    for url in ("https://far.example/v1", "http://[::1]/v1", "http://localhost:8/v1"):
        assert "Authorization" in Endpoint(url)._headers()
    assert "Authorization" not in Endpoint("http://far.example/v1")._headers()


def test_what_is_an_engine() -> None:
    assert engine_named("hf") == "hf"
    for text in ("http://localhost:8000", "http://localhost:8000/", "http://localhost:8000/v1/"):
        assert engine_named(text) == url_of(text) == "http://localhost:8000/v1"
    with pytest.raises(UnknownName, match="no engine named 'hff'; did you mean hf"):
        engine_named("hff")
    for text in ("file:///etc/passwd", "ftp://host/v1", "http://", "http://me:secret@host/v1"):
        with pytest.raises(CLGraftError, match="no address of an OpenAI-compatible server; write"):
            engine_named(text)
    for text in ("http://host/v1?a=b", "localhost:8000", "http://host:0/v1", "http://host:x/v1"):
        with pytest.raises(CLGraftError, match="no address"):
            engine_named(text)
    if find_spec("vllm") is None:
        with pytest.raises(CLGraftError, match=r"pip install cl-graft\[vllm\]"):
            engine_named("vllm")


def test_what_a_server_cannot_do_is_refused_before_anything_is_computed(tmp_path: Path) -> None:
    with running(Models(), **TEXT) as server:
        engine = Engine(server.url, tmp_path)
        with pytest.raises(CLGraftError, match="'choice' needs the likelihood .* use --engine hf"):
            engine.check([("choice", "likelihoods")])
        with pytest.raises(CLGraftError, match="'mine' uses the model itself.*use --engine hf"):
            engine.check([("mine", "model")])
        with pytest.raises(CLGraftError, match="an @ in it"):
            Engine(server.url, tmp_path / "a@b").check([("exact", "answers")])
    with (
        running(lambda path, body: {"choices": []}) as server,
        pytest.raises(CLGraftError, match="answers for a model that is nowhere"),
    ):
        Engine(server.url, tmp_path).check([("exact", "answers")])
    with (
        running(Models(), version={"version": "0.20.1"}) as server,
        pytest.raises(CLGraftError, match="use --engine vllm"),
    ):
        Engine(server.url, tmp_path).check([("exact", "answers")])


def test_a_server_without_likelihoods_is_found_out(nano: Nano, tmp_path: Path) -> None:
    with (
        running(one_text()) as server,
        Engine(server.url, tmp_path).serving(*nano) as served,
        pytest.raises(CLGraftError, match="does not tell the likelihood .*use --engine hf"),
    ):
        served.likelihoods([("a", "b")], 8)


SUMS = '''"""Two tasks of four prompts."""
from cl_graft.task import Example, Scenario, Task, Training


def sums(*, seed: int, data_dir=None):
    """Options: none."""
    recipe = Training(steps=2, batch=4)

    def task(name, score):
        rows = [Example(f"{name} {a} + {a} =", f" {2 * a}") for a in range(24)]
        return Task(name, rows[:20], rows[20:], score, max_new_tokens=4, training=recipe)

    return Scenario("sums", (task("one", "exact"), task("two", SCORE)))
'''


@pytest.fixture
def sums(tmp_path: Path) -> list[str]:
    """The options of a cell of two tasks that are scored by their answers, in seconds."""
    (tmp_path / "sums.py").write_text(SUMS.replace("SCORE", "'exact'"))
    words = ["--scenario", str(tmp_path / "sums.py"), "--strategy", "sequential"]
    words += ["--model", "nano-llama", "--budget", "100%", "--wandb", "off"]
    return [*words, "--out", str(tmp_path / "out")]


def test_a_cell_by_a_server_that_goes_away_continues_where_it_was(
    call: Call, sums: list[str], tmp_path: Path
) -> None:
    assert call("run", *sums).code == 0
    models, left = Models(), [12]

    def dies(path: str, body: dict[str, Any]) -> Any:
        left[0] -= path == "/v1/completions"
        return models(path, body) if left[0] > 0 else 500

    with running(dies, **TEXT) as server:
        mine = [*sums, "--engine", server.url]
        failed = call("run", *mine)
        assert "HTTP 500" in failed.reason and "same command again to continue" in failed.reason
        left[0], before = 10_000, len(server.asked)
        assert call("run", *mine).code == 0
        again = [body["prompt"] for path, body, _ in server.asked[before:] if "prompt" in body]
        assert len(again) < 24  # what the base said is not asked again
    assert call("run", *mine).code == 0  # what is finished asks nobody
    folders = {path.parent for path in (tmp_path / "out").glob("*/cell.json")}
    told = {f: json.loads((f / "cell.json").read_text()) for f in folders}
    assert sorted(str(t.get("engine")) for t in told.values()) == sorted(
        ["None", str({"engine": server.url, "software": "transformers serve", "version": None})]
    )
    assert {t["config"].get("engine", "hf") for t in told.values()} == {"hf", server.url}
    one, other = [json.loads((f / "result.json").read_text())["matrix"] for f in folders]
    assert one == other


def test_validate_refuses_an_engine_that_cannot_score_or_is_away(
    call: Call, sums: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text("scenarios: sums.py\nstrategies: lora\nmodels: nano-llama\nwandb: off\n")
    monkeypatch.chdir(tmp_path)

    def validate(engine: str) -> Done:
        return call("validate", "--engine", engine, str(file))

    with running(Models(), **TEXT) as server:
        assert validate(server.url).code == 0
        routed = ["--task-ids", "inferred", "--router-top-k", "2"]
        both = call("validate", *routed, "--engine", server.url, str(file))
        assert_refused(both, "an ensemble has one for each pack; use --router-combine merge")
        routed += ["--router-combine", "merge"]
        assert call("validate", *routed, "--engine", server.url, str(file)).code == 0
        (tmp_path / "sums.py").write_text(SUMS.replace("SCORE", "'neg_bits_per_byte'"))
        refused = validate(server.url)
        assert_refused(refused, "'neg_bits_per_byte' needs the likelihood", "use --engine hf")
        assert validate("hf").code == 0
    assert_refused(validate(server.url), "cannot be reached", "start it")
    assert_refused(validate("vlm"), "no engine named 'vlm'", "vllm")


needs_serving = pytest.mark.skipif(
    not (find_spec("fastapi") and find_spec("uvicorn") and find_spec("openai")),
    reason="no `pip install transformers[serving]` here",
)


@pytest.mark.slow
@needs_serving
def test_transformers_own_server_says_what_the_model_here_says(
    nano: Nano, tiny_scenario: Scenario, tmp_path: Path
) -> None:
    model, tokenizer = nano
    port = _free_port()
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with (tmp_path / "log").open("wb") as log:
        serve = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    try:
        engine = Engine(f"http://127.0.0.1:{port}/v1", tmp_path)
        _wait_for(Endpoint(engine.name), serve)
        assert engine.told["software"] == "transformers serve"
        engine.check([("number", "answers")])
        model.lm_head.weight.data.add_(0.05 * model.lm_head.weight.data.roll(1, 0))
        prompts = [e.prompt for task in tiny_scenario.tasks for e in task.test] + PROMPTS
        with engine.serving(model, tokenizer) as served:
            said = served.answers(prompts, 16)
            with pytest.raises(EndpointError, match="prompt must be a string"):
                served.likelihoods([("a", "b")], 8)
        mine = generate(model, tokenizer, prompts, 16)
        assert len(set(mine)) > 5
        assert [tokenizer(a)["input_ids"] for a in said] == [
            tokenizer(a)["input_ids"] for a in mine
        ]
        assert said == mine
    finally:
        serve.terminate()
        serve.wait(30)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _wait_for(endpoint: Endpoint, serve: subprocess.Popen[bytes]) -> None:
    for _ in range(240):
        assert serve.poll() is None
        try:
            if endpoint.told("/health"):
                return
        except EndpointError:
            pass
        time.sleep(0.5)
    raise AssertionError("transformers serve does not start")
