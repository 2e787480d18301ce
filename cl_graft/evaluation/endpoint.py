"""An OpenAI-compatible server, asked over HTTP: one request, one JSON object, or one sentence on why there is none."""

from __future__ import annotations

import ipaddress
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from time import monotonic, sleep
from typing import Any
from urllib.parse import urlsplit

from cl_graft.errors import CLGraftError, Refused, UnknownName, first_line

HERE = "hf"  # the engine that is the model in this process
ENGINES = (HERE, "vllm")
KEY = "CL_GRAFT_API_KEY"  # variable with the token that servers are shown
REACH = 10.0  # seconds in which a server has to take a connection
MOST = 1 << 26  # bytes of an answer
WAITS = (1.0, 4.0, 16.0)  # seconds before a server that is too busy is asked again
BUSY = (429, 502, 503, 504)
SHOWN = 160  # characters of what a server says that an error repeats


class EndpointError(Refused):
    """A server is not there, is late, or says what it should not; what was measured before is kept."""


def url_of(text: str) -> str:
    """The address as requests extend it: `http://host:8000` and `http://host:8000/v1/` are `http://host:8000/v1`.

    Raises CLGraftError for what is no http or https address of a host, or holds a name, a query or a fragment.
    """
    try:
        parts = urlsplit(text)
        wrong = parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0
    except ValueError:
        wrong = True
    if wrong or parts.username is not None or parts.query or parts.fragment:
        raise CLGraftError(
            f"{text!r} is no address of an OpenAI-compatible server; write one as http://localhost:8000/v1, and a "
            f"token that it wants into the variable {KEY}."
        )
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/') or '/v1'}"


def engine_named(text: str) -> str:
    """The name of an engine as records tell it: `hf`, `vllm`, or a server's address as `url_of` gives it.

    Raises UnknownName or CLGraftError for another, and for vLLM where it is not installed. Nothing is asked.
    """
    if "/" in text or ":" in text:
        return url_of(text)
    if text not in ENGINES:
        raise UnknownName("engine", text, ENGINES, "an address such as http://localhost:8000/v1")
    if text == "vllm" and find_spec("vllm") is None:
        raise CLGraftError(
            "vLLM is not installed; run `pip install cl-graft[vllm]` on a machine with a GPU, or use --engine hf."
        )
    return text


@dataclass(frozen=True)
class Endpoint:
    """A server by its address, as `url_of` gives it. seconds: for a whole answer."""

    url: str
    seconds: float = 600.0

    @property
    def root(self) -> str:
        """The address without its version, below which servers say what they are."""
        return self.url.removesuffix("/v1")

    def told(self, path: str) -> dict[str, Any]:
        """The object at this path below the root; empty where the server has none there."""
        status, text = self._ask("GET", f"{self.root}{path}", None)
        try:
            found = json.loads(text) if status == 200 else None
        except (ValueError, RecursionError):
            found = None
        return found if isinstance(found, dict) else {}

    def refuses(self, path: str, body: Mapping[str, Any]) -> bool:
        """Whether the server answers this by an error of its own."""
        return self._ask("POST", self.url + path, body)[0] >= 400

    def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """What the server answers, an object. Raises EndpointError for anything else."""
        status, text = self._ask("POST", self.url + path, body)
        for wait in WAITS:
            if status not in BUSY:
                break
            sleep(wait)
            status, text = self._ask("POST", self.url + path, body)
        if status != 200:
            said = " ".join(_said(text).split())[:SHOWN]
            raise EndpointError(
                f"the server at {self.url} refuses a request for model {body.get('model')!r} (HTTP {status}: {said}); "
                "see what it writes on its own screen, then run the same command again to continue."
            )
        try:
            answer = json.loads(text)
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            raise self.rubbish(text)
        return answer

    def rubbish(self, said: Any) -> EndpointError:
        """What to raise for an answer that is not of this protocol."""
        shown = said if isinstance(said, str) else json.dumps(said)
        return EndpointError(
            f"the server at {self.url} answers {shown[:SHOWN]!r}, which is no answer of an OpenAI-compatible server; "
            "give the address of one, which mostly ends in /v1."
        )

    def _ask(self, method: str, url: str, body: Mapping[str, Any] | None) -> tuple[int, str]:
        """Status and text. Redirects are answers like others: nothing is fetched from where they lead."""
        import requests
        from urllib3.exceptions import HTTPError, ReadTimeoutError

        begun, received = monotonic(), bytearray()
        try:
            with requests.request(
                method,
                url,
                json=body,
                headers=self._headers(),
                timeout=(REACH, self.seconds),
                allow_redirects=False,
                stream=True,
            ) as answer:
                # what has arrived, so that a server which sends a byte now and then is noticed
                while part := answer.raw.read1(1 << 16, decode_content=False):
                    received += part
                    if len(received) > MOST:
                        raise EndpointError(
                            f"the server at {self.url} answers with more than {MOST >> 20} MiB; give the address of an "
                            "OpenAI-compatible server."
                        )
                    if monotonic() - begun > self.seconds:
                        raise requests.Timeout
        except (requests.Timeout, ReadTimeoutError) as error:
            raise EndpointError(
                f"the server at {self.url} did not answer within {self.seconds:.0f} seconds; see whether it still "
                "works, then run the same command again to continue."
            ) from error
        except (requests.RequestException, HTTPError) as error:
            raise EndpointError(
                f"the server at {self.url} cannot be reached ({type(error).__name__}: {first_line(error)[:SHOWN]}); "
                "start it, or mend its address, then run the same command again to continue."
            ) from error
        return answer.status_code, received.decode(errors="replace")

    def _headers(self) -> dict[str, str]:
        """Headers of a request: a token, if there is one, goes to this machine's servers and over https alone."""
        token = os.environ.get(KEY)
        parts = urlsplit(self.url)
        private = parts.scheme == "https" or _is_here(parts.hostname or "")
        plain = {"Accept-Encoding": "identity"}  # what unpacks to more than was sent is no answer
        return plain | ({"Authorization": f"Bearer {token}"} if token and private else {})


def _is_here(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _said(text: str) -> str:
    """The message of an error's body, as OpenAI and FastAPI write them, or else the body."""
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        return text
    error = body.get("error", body.get("detail", body)) if isinstance(body, dict) else body
    message = error.get("message", error) if isinstance(error, dict) else error
    return message if isinstance(message, str) else json.dumps(message)
