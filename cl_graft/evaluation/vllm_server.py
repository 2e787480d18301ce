"""vLLM's own OpenAI-compatible server, started for one folder of weights and ended with it."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryFile

import torch

from cl_graft.evaluation.endpoint import Endpoint, EndpointError

START = 1800.0  # seconds in which it has to be ready: it loads, compiles and measures first
SHARE = 0.9  # of the memory that is free on the GPU


@contextmanager
def vllm_server(folder: str) -> Iterator[Endpoint]:
    """A server that answers for this folder, by its path as the model's name, on a free port of this machine.

    Raises EndpointError where it ends before it is ready, with the last line that it wrote.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder]
    command += ["--served-model-name", folder, "--host", "127.0.0.1", "--port", str(port)]
    if torch.cuda.is_available():  # where the model of this process already is
        free_bytes, whole = torch.cuda.mem_get_info()
        command += ["--gpu-memory-utilization", f"{SHARE * free_bytes / whole:.3f}"]
    endpoint = Endpoint(f"http://127.0.0.1:{port}/v1")
    with TemporaryFile() as log:
        server = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            deadline = time.monotonic() + START
            while not _ready(endpoint):
                if server.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    lines = log.read().decode(errors="replace").strip().splitlines()
                    said = lines[-1][:200] if lines else "without a word"
                    raise EndpointError(
                        f"vLLM did not start for {folder} ({said}); see whether it serves the base by itself, or use "
                        "--engine hf."
                    )
                time.sleep(0.5)
            yield endpoint
        finally:
            server.terminate()
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def _ready(endpoint: Endpoint) -> bool:
    try:
        return "version" in endpoint.told("/version")
    except EndpointError:
        return False
