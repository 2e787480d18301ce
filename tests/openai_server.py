"""A small OpenAI-compatible server that loads the folder a request names, as vLLM's and transformers' own do.

It answers by the model itself, one request at a time; `speaks` changes what it says, for tests of bad servers.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from typing import Any

import torch


class Server(ThreadingHTTPServer):
    """paths: what GET answers, {path: object}. answer: the object, bytes or status that a POST's path and body get."""

    daemon_threads = True

    def __init__(self, answer: Callable[[str, dict[str, Any]], Any], paths: dict[str, Any]):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer, self.paths = answer, paths
        self.asked: list[tuple[str, dict[str, Any], dict[str, str]]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        self._send(self.server.paths.get(self.path, 404))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, body, dict(self.headers)))
        self._send(self.server.answer(self.path, body))

    def _send(self, answer: Any) -> None:
        status, told = (
            (answer, {"error": {"message": "no"}}) if isinstance(answer, int) else (200, answer)
        )
        data = told if isinstance(told, bytes) else json.dumps(told).encode()
        self.send_response(status)
        if status in (301, 302, 307):
            self.send_header("Location", "http://127.0.0.1:9/elsewhere")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def running(answer: Callable[[str, dict[str, Any]], Any], **paths: Any) -> Iterator[Server]:
    """A server on a free port of this machine, for the time of the block."""
    server = Server(answer, {f"/{name.replace('_', '.')}": told for name, told in paths.items()})
    thread = Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Models:
    """Completions by the models whose folders requests name; prompts are text or token ids, echoed with logprobs."""

    def __init__(self) -> None:
        self.loaded: dict[str, Any] = {}
        self.lock = Lock()

    def __call__(self, path: str, body: dict[str, Any]) -> Any:
        if path != "/v1/completions":
            return {}
        if not Path(body["model"]).is_dir():
            return 404
        with self.lock, torch.no_grad():
            return self._complete(body)

    def _complete(self, body: dict[str, Any]) -> dict[str, Any]:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        name = body["model"]
        if name not in self.loaded:
            model = AutoModelForCausalLM.from_pretrained(name).eval()
            self.loaded[name] = model, AutoTokenizer.from_pretrained(name)
        model, tokenizer = self.loaded[name]
        prompt = body["prompt"]
        ids = tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
        given = torch.tensor([ids])
        whole = model.generate(given, max_new_tokens=body["max_tokens"])[0].tolist()
        new = whole[len(ids) :]
        choice: dict[str, Any] = {
            "index": 0,
            "text": tokenizer.decode(new, skip_special_tokens=True),
        }
        if body.get("return_token_ids"):
            choice["token_ids"] = new
        if body.get("echo"):
            log = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            told = [log[i - 1, token].item() for i, token in enumerate(whole) if i]
            choice["logprobs"] = {"token_logprobs": [None, *told]}
        usage = {"prompt_tokens": len(ids), "completion_tokens": len(new)}
        return {"model": name, "choices": [choice], "usage": usage}


def late(seconds: float) -> Callable[[str, dict[str, Any]], Any]:
    """A server that takes so long for an answer."""

    def answer(path: str, body: dict[str, Any]) -> Any:
        time.sleep(seconds)
        return {}

    return answer
