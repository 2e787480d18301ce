"""lm-evaluation-harness's own score of a document, by its own code on the model in memory (arXiv 2405.14782)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from copy import copy
from typing import Annotated, Any

from pydantic import Field

from cl_graft.data import harness, harness_files
from cl_graft.data.harness import Document
from cl_graft.errors import CLGraftError, errors_alone, first_line
from cl_graft.evaluation.scorers.base import Examinee, Scored, scorer
from cl_graft.models.chat import DATE
from cl_graft.ranges import Count
from cl_graft.store.digests import code_digest, vocabulary
from cl_graft.task import Example

SEED = 1234  # of the examples before a question, as `lm_eval` on the command line has it

_asked: dict[
    tuple[Any, ...], dict[int, list[Any]]
] = {}  # requests of every document, made once a process


def _flaw(example: Example) -> str:
    return "" if isinstance(example, Document) else "no document of a task of lm-eval"


@scorer(
    needs="model",
    reads=("prompt",),
    flaw=_flaw,
    convention="its own code, {made_by}",
    identity={"code": code_digest(harness, harness_files)},
)
def lm_eval(
    examinee: Examinee,
    examples: Sequence[Document],
    *,
    made_by: str = "lm-eval",
    num_fewshot: Annotated[int, Field(ge=0)] | None = None,
    batch: Count = 8,
) -> list[Scored]:
    """made_by: the versions of lm-eval and of its tasks, for the record; told by what makes the documents. num_fewshot:
    examples before each question, instead of the task's own number. batch: requests that the model reads at a time.

    A scenario for chat has its questions, and the examples before them, as turns of the chat template.
    """
    from lm_eval.models.huggingface import HFLM

    with errors_alone(harness.LOG), _unchanged(examinee.tokenizer):
        model = HFLM(
            examinee.model,
            tokenizer=examinee.tokenizer,
            batch_size=batch,
            chat_template_args={"date_string": DATE},
        )
        scored: dict[int, Scored] = {}
        for kind in dict.fromkeys(map(_kind, examples)):
            members = [i for i, e in enumerate(examples) if _kind(e) == kind]
            outcomes = _scored(model, [examples[i] for i in members], num_fewshot)
            scored |= dict(zip(members, outcomes, strict=True))
    return [scored[i] for i in range(len(examples))]


def _kind(document: Document) -> tuple[str, str, str]:
    return document.named, document.task, document.metric


def _scored(model: Any, documents: Sequence[Document], shots: int | None) -> list[Scored]:
    """Outcomes of documents of one task. Raises CLGraftError where lm-eval fails at it."""
    import torch
    from jinja2 import TemplateError

    first = documents[0]
    made = next(
        task
        for members in harness.loaded(first.named).values()
        for task in members
        if task.task_name == first.task
    )
    metric, name = harness.read_as(made, first.metric)
    chat = any(document.prompt != document.asked for document in documents)
    try:
        requests = _requests(model, made, first.named, shots, chat)
        asked = [[copy(request) for request in requests[document.number]] for document in documents]
        flat = [request for those in asked for request in those]
        for request in flat:
            request.resps, request.filtered_resps = [], {}
        with torch.random.fork_rng():
            torch.manual_seed(0)  # for a task that samples
            _answer(model, flat)
        made._instances = flat
        made.apply_filters()
        return [
            _outcome(
                made.process_results(those[0].doc, [r.filtered_resps[name] for r in those]),
                metric,
                those,
                name,
            )
            for those in asked
        ]
    except (AssertionError, LookupError, TypeError, ValueError, TemplateError) as error:
        raise CLGraftError(
            f"lm-eval cannot score its task {made.task_name} ({type(error).__name__}: {first_line(error)}); choose a "
            "task that fits the model."
        ) from error


def _requests(
    model: Any, task: Any, named: str, shots: int | None, chat: bool
) -> dict[int, list[Any]]:
    """{document: what the model is asked}, of all documents: which examples stand before one, depends on those
    before it. They are the same for every model of a tokenizer."""
    told = vocabulary(model.tokenizer), model.tokenizer.chat_template
    key = (id(task), named, shots, chat, *map(str, told))
    if key not in _asked:
        own = task.config.num_fewshot or 0
        task.set_config("num_fewshot", own if shots is None else shots)
        try:
            task.set_fewshot_seed(SEED)
            with harness.quiet():
                task.build_all_requests(
                    apply_chat_template=chat,
                    fewshot_as_multiturn=chat,
                    chat_template=model.apply_chat_template if chat else None,
                )
        finally:
            task.set_config("num_fewshot", own)
        by_document: dict[int, list[Any]] = {}
        for request in task.instances:
            by_document.setdefault(request.doc_id, []).append(request)
        _asked[key] = by_document
    return _asked[key]


def _answer(model: Any, requests: Sequence[Any]) -> None:
    """Let the model answer, kind by kind, each request as often as its task repeats it."""
    for kind in dict.fromkeys(request.request_type for request in requests):
        each = [r for r in requests if r.request_type == kind for _ in range(r.repeats)]
        for request, response in zip(
            each, getattr(model, kind)(each, disable_tqdm=True), strict=True
        ):
            request.resps.append(response)


def _outcome(metrics: dict[str, Any], metric: str, requests: Sequence[Any], name: str) -> Scored:
    """The score, and what it was given for: the likeliest continuation, or the answer with what a filter made of it."""
    if requests[0].request_type == "loglikelihood":
        best = max(requests, key=lambda request: request.resps[0][0])
        return Scored(float(metrics[metric]), best.args[1])
    answer, read = str(requests[0].resps[0]), requests[0].filtered_resps[name]
    return Scored(float(metrics[metric]), answer, "" if read == answer else f"read as {read!r}")


@contextmanager
def _unchanged(tokenizer: Any):
    """lm-eval pads on the side that it needs and sets a padding token where there is none."""
    before = tokenizer.padding_side, tokenizer.pad_token
    try:
        yield
    finally:
        tokenizer.padding_side, tokenizer.pad_token = before
