"""Who judges answers: a model behind an OpenAI-compatible server, or one of this machine; what was said is kept.

<cache>/judgements/<key>.json    what a judge said to one question, and the tokens that it took
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from cl_graft.errors import CLGraftError
from cl_graft.evaluation.endpoint import SHOWN, Endpoint, url_of
from cl_graft.models import load
from cl_graft.store.digests import digest, place, versions
from cl_graft.store.files import RecordError, read_json, write_json
from cl_graft.store.source_files import digest_of

AT_ONCE = 8  # questions
SECONDS = 120.0  # for an answer
MOST = 1024  # tokens of it: a judge may think first
LONGEST = 4096  # tokens that a local judge reads, where its config does not tell
MARKED = re.compile(r"\[\[\s*(\w+)\s*\]\]")


class Said(NamedTuple):
    """A judge's verdict, one of the choices or "" where it gave none, and tokens read and written for it."""

    verdict: str
    read: int
    written: int


class Unclear(CLGraftError):
    """A judge's words have no verdict in them."""


def identity(judge: str, model: str) -> dict[str, Any]:
    """What tells one judge from another, as plain data. Nothing is asked.

    judge: a server's address, or a model's name, folder or hub id. model: what a server calls it. Raises CLGraftError.
    """
    if not judge:
        raise CLGraftError(
            "the scorer 'judge' has nobody to judge; set judge.judge to a model, or to the address of an "
            "OpenAI-compatible server, as http://localhost:8000/v1."
        )
    if "://" in judge:
        if not model:
            raise CLGraftError(
                f"judge.judge={judge} names a server and no model; set judge.model to one that it has."
            )
        return {"url": url_of(judge), "model": model}
    if model:
        raise CLGraftError(
            f"judge.model={model} is a model of a server, and judge.judge={judge} is none; leave it out, or give the "
            "server's address."
        )
    load.check(judge)
    folder = load.folder_of(judge)
    files = sorted({f for kind in load.FILES for f in folder.glob(kind)}) if folder else []
    return {"model": judge, "files": {file.name: digest_of(file) for file in files}}


class Judge:
    """Answers questions by one of the words that it may choose from, each question once.

    folder: where verdicts are kept; without one they are not.
    """

    def __init__(self, judge: str, model: str, folder: Path | None):
        self.told, self.folder = identity(judge, model), folder
        self.server = Endpoint(self.told["url"], SECONDS) if "url" in self.told else None

    def verdicts(self, questions: Sequence[str], choices: Sequence[str], keep: bool) -> list[Said]:
        """A verdict each, in order; what is known is not asked again, and what is learned is kept at once.

        keep: whether words without a verdict are kept, too, and are no error. Raises Unclear, EndpointError, or
        CLGraftError for a model that cannot be loaded.
        """
        if self.server:
            bodies = [self._body(question) for question in questions]
            with ThreadPoolExecutor(AT_ONCE) as pool:
                rest = [pool.submit(self._by_server, body, choices, keep) for body in bodies]
                with _ends(pool):
                    return [one.result() for one in rest]
        return [self._by_model(question, choices) for question in questions]

    def _body(self, question: str) -> dict[str, Any]:
        turn = {"role": "user", "content": question}
        most = {"max_tokens": MOST, "temperature": 0.0}
        return {"model": self.told["model"], "messages": [turn], **most}

    def _by_server(self, body: dict[str, Any], choices: Sequence[str], keep: bool) -> Said:
        assert self.server
        server = self.server

        def ask() -> dict[str, Any]:
            whole = server.post("/chat/completions", body)
            try:
                said, usage = whole["choices"][0]["message"]["content"], whole.get("usage") or {}
                read, written = usage.get("prompt_tokens", 0), usage.get("completion_tokens", 0)
                told = {"said": said, "read": int(read or 0), "written": int(written or 0)}
            except (KeyError, IndexError, TypeError, ValueError, AttributeError):
                raise server.rubbish(whole) from None
            if not isinstance(said, str):
                raise server.rubbish(whole)
            if not keep and not verdict_in(said, choices):
                shown = " ".join(said.split())[-SHOWN:]
                raise Unclear(
                    f"judge {body['model']!r} at {server.url} says {shown!r} where it should end with one of "
                    f"{', '.join(f'[[{c}]]' for c in choices)}, and what it judged before is kept; choose another by "
                    "judge.model, or set judge.unclear=half."
                )
            return told

        told = self._kept([self.told, body], ask)
        return Said(verdict_in(told["said"], choices), told["read"], told["written"])

    def _by_model(self, question: str, choices: Sequence[str]) -> Said:
        """The likeliest of the choices, which every model has."""

        def ask() -> dict[str, Any]:
            from cl_graft.evaluation.generate import choice_likelihoods
            from cl_graft.models.chat import user_turn

            model, tokenizer = _loaded(self.told["model"])
            text = user_turn(tokenizer, question)[1] if tokenizer.chat_template else question + "\n"
            longest = getattr(model.config, "max_position_embeddings", None) or LONGEST
            texts = [f"{choice}]]" for choice in choices]
            (row,) = choice_likelihoods(model, tokenizer, [text + "[["], texts, longest)
            said = f"[[{choices[max(range(len(row)), key=row.__getitem__)]}]]"
            read = min(longest, len(tokenizer(text)["input_ids"]))
            return {"said": said, "read": read, "written": 0}

        told = self._kept([self.told, question, list(choices), place(), versions()], ask)
        return Said(verdict_in(told["said"], choices), told["read"], told["written"])

    def _kept(self, key: Any, ask: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        if self.folder is None:
            return ask()
        file = self.folder / "judgements" / f"{digest(key)}.json"
        if file.is_file():
            try:
                told = read_json(file)
                if isinstance(told, Mapping) and {"said", "read", "written"} <= told.keys():
                    return dict(told)
            except RecordError:  # torn: it is asked again
                pass
        told = ask()
        write_json(file, told)
        return told


def verdict_in(said: str, choices: Sequence[str]) -> str:
    """The last of the choices that stands in double brackets; "" without one."""
    found = [word for word in MARKED.findall(said) if word in choices]
    return found[-1] if found else ""


@contextmanager
def _ends(pool: ThreadPoolExecutor) -> Iterator[None]:
    """What waits in the pool is not begun once something went wrong."""
    try:
        yield
    except BaseException:
        pool.shutdown(cancel_futures=True)
        raise


@cache
def _loaded(name: str) -> tuple[Any, Any]:
    return load.load(name)
