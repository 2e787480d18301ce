"""Answers and likelihoods from a server instead of the model in this process: the same prompts, ends and greedy choice.

A server is given each set of weights as a folder, base and packs summed as they are in memory, and is asked with that
folder's path as the model. `transformers serve` loads whatever folder a request names; vLLM holds the one model that it
was started with, and so one is started for each set of weights. Folders lie below `scratch`, which the server must see
under the same path, and are removed once they were asked; one set of weights is asked at a time.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from cl_graft.errors import CLGraftError
from cl_graft.evaluation.endpoint import Endpoint, EndpointError
from cl_graft.evaluation.generate import choice_rows, endings
from cl_graft.evaluation.vllm_server import vllm_server
from cl_graft.models.text import encode, encode_prompts
from cl_graft.store.digests import digest
from cl_graft.store.locks import locked

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

AT_ONCE = 16  # requests: servers batch what comes together
TRANSFORMERS, VLLM = "transformers serve", "vLLM"
NOBODY = "/no/such/folder/of/a/model"


@dataclass(frozen=True)
class Engine:
    """What answers in the place of the model in this process.

    name: `vllm`, or a server's address. scratch: folder for the folders of weights.
    """

    name: str
    scratch: Path

    @cached_property
    def told(self) -> dict[str, Any]:
        """{"engine", "software", "version"}: what outcomes are told apart by; the last two None where a server does
        not say. Raises EndpointError where it is not there."""
        if self.name == "vllm":
            from importlib.metadata import version

            return {"engine": self.name, "software": VLLM, "version": version("vllm")}
        server = Endpoint(self.name)
        if told := server.told("/version").get("version"):
            return {"engine": self.name, "software": VLLM, "version": str(told)}
        paths = server.told("/openapi.json").get("paths")
        known = isinstance(paths, dict) and "/load_model" in paths
        return {
            "engine": self.name,
            "software": TRANSFORMERS if known else None,
            "version": None,
        }

    def check(self, scorers: Iterable[tuple[str, str]]) -> None:
        """Raise CLGraftError for a server that cannot score so, EndpointError for one that is not there.

        scorers: name and `needs` of each.
        """
        for scorer, needs in scorers:
            if needs == "model":
                raise CLGraftError(
                    f"the scorer {scorer!r} uses the model itself, which a server does not give; use --engine hf."
                )
            if needs == "likelihoods" and self.told["software"] == TRANSFORMERS:
                raise CLGraftError(
                    f"the scorer {scorer!r} needs the likelihood of given answers, which `transformers serve` at "
                    f"{self.name} does not tell; use --engine hf."
                )
        if self.name == "vllm":
            return
        if self.told["software"] == VLLM:
            raise CLGraftError(
                f"vLLM at {self.name} answers for the model it was started with, whatever is grafted; use --engine "
                "vllm, which starts one for each set of weights."
            )
        if "@" in str(self._folder):
            raise CLGraftError(
                f"{self._folder} has an @ in it, which servers read as the start of a revision; choose another --cache."
            )
        if not Endpoint(self.name).refuses("/completions", _request(NOBODY, "a", 1)):
            raise CLGraftError(
                f"the server at {self.name} answers for a model that is nowhere, so it does not load the one that a "
                "request names; start one that does, as `transformers serve`, or use --engine hf."
            )

    @property
    def _folder(self) -> Path:
        return self.scratch.resolve() / "served" / digest(self.name)[:8]

    @contextmanager
    def serving(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> Iterator[Served]:
        """The server with the weights that the model has now."""
        with locked(self._folder):
            shutil.rmtree(self._folder, ignore_errors=True)  # what a killed process left
            self._folder.mkdir(parents=True)
            try:
                with TemporaryDirectory(dir=self._folder) as folder:
                    _save(model, tokenizer, folder)
                    starts = self.name == "vllm"
                    server = vllm_server(folder) if starts else nullcontext(Endpoint(self.name))
                    with server as endpoint:
                        ids = self.told["software"] == VLLM
                        yield Served(endpoint, folder, tokenizer, endings(model, tokenizer), ids)
            finally:
                shutil.rmtree(self._folder, ignore_errors=True)
                if self.told["software"] == TRANSFORMERS:
                    with suppress(EndpointError):  # else it holds the weights for minutes
                        Endpoint(self.name.removesuffix("/v1")).refuses("/reset", {})


def _save(model: Any, tokenizer: PreTrainedTokenizerBase, folder: str) -> None:
    """The model as a folder whose settings of generation are those of `generate.answers`."""
    before = model.generation_config
    greedy = deepcopy(before)
    greedy.update(do_sample=False, temperature=None, top_p=None, top_k=None)
    greedy.eos_token_id = endings(model, tokenizer)
    try:
        model.generation_config = greedy
        model.save_pretrained(folder)
    finally:
        model.generation_config = before
    tokenizer.save_pretrained(folder)


def _request(model: str, prompt: str | list[int], most: int) -> dict[str, Any]:
    return {"model": model, "prompt": prompt, "max_tokens": most, "temperature": 0.0}


@dataclass(frozen=True)
class Served:
    """A set of weights that a server answers with.

    model: what requests name. ends: tokens that end an answer. ids: whether prompts go as token ids; else as text, and
    the server has to read as many tokens of it as this tokenizer does.
    """

    endpoint: Endpoint
    model: str
    tokenizer: PreTrainedTokenizerBase
    ends: Sequence[int]
    ids: bool

    def answers(self, prompts: Sequence[str], max_new_tokens: int) -> list[str]:
        """Greedy answers in the order of the prompts. Raises EndpointError."""
        rows = encode_prompts(self.tokenizer, prompts)

        def ask(i: int) -> str:
            prompt: Any = rows[i] if self.ids else prompts[i]
            body = _request(self.model, prompt, max_new_tokens)
            if self.ids:
                body |= {"stop_token_ids": list(self.ends), "return_token_ids": True}
            whole, choice = self._choice(body)
            self._require_read(whole, prompts[i], len(rows[i]))
            if isinstance(said := choice.get("token_ids"), list):
                return self.tokenizer.decode(said, skip_special_tokens=True)
            if not isinstance(choice.get("text"), str):
                raise self.endpoint.rubbish(whole)
            return choice["text"]

        return self._all(ask, len(prompts))

    def likelihoods(self, pairs: Sequence[tuple[str, str]], max_length: int) -> list[float]:
        """What `generate.log_likelihoods` gives. Raises EndpointError, also where the server tells none."""
        return self._scores([encode(self.tokenizer, *pair, max_length) for pair in pairs])

    def choice_likelihoods(
        self, prompts: Sequence[str], choices: Sequence[str], max_length: int
    ) -> list[list[float]]:
        """What `generate.choice_likelihoods` gives. Raises as `likelihoods`."""
        heads, tails = choice_rows(self.tokenizer, prompts, choices, max_length)
        scores = iter(self._scores([(head, tail) for head in heads for tail in tails]))
        return [[next(scores) for _ in tails] for _ in heads]

    def _scores(self, rows: Sequence[tuple[list[int], list[int]]]) -> list[float]:
        def ask(i: int) -> float:
            head, tail = rows[i]
            body = _request(self.model, [*head, *tail], 1) | {"echo": True, "logprobs": 1}
            whole, choice = self._choice(body)
            told = (choice.get("logprobs") or {}).get("token_logprobs")
            mine = told[len(head) : len(head) + len(tail)] if isinstance(told, list) else []
            if len(mine) < len(tail) or not all(isinstance(value, float | int) for value in mine):
                raise CLGraftError(
                    f"the server at {self.endpoint.url} does not tell the likelihood of a prompt's tokens, which a "
                    "scorer needs; use --engine hf."
                )
            return float(sum(mine))

        return self._all(ask, len(rows))

    def _choice(self, body: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The answer and its first choice, of the model that was asked."""
        whole = self.endpoint.post("/completions", body)
        choices = whole.get("choices")
        if not (isinstance(choices, list) and choices and isinstance(choices[0], dict)):
            raise self.endpoint.rubbish(whole)
        if str(whole.get("model")).removesuffix("@main") != self.model:
            raise EndpointError(
                f"the server at {self.endpoint.url} answers as {whole.get('model')!r} where {self.model!r} was asked; "
                "start one that loads the model a request names, as `transformers serve`."
            )
        return whole, choices[0]

    def _require_read(self, whole: dict[str, Any], prompt: str, tokens: int) -> None:
        usage = whole.get("usage")
        read = usage.get("prompt_tokens") if isinstance(usage, dict) else None
        if read != tokens:
            raise EndpointError(
                f"the server at {self.endpoint.url} reads {read} tokens of prompt {prompt[:40]!r}, which are {tokens} "
                "here, so it would be asked something else; use --engine hf."
            )

    def _all(self, ask: Callable[[int], Any], count: int) -> list[Any]:
        """ask(0), ..., ask(count - 1), in order: the first alone, while the server loads, then AT_ONCE at a time."""
        if not count:
            return []
        first = ask(0)
        with ThreadPoolExecutor(AT_ONCE) as pool:
            rest = [pool.submit(ask, i) for i in range(1, count)]
            try:
                return [first, *(future.result() for future in rest)]
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
