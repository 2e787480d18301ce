"""Tasks of lm-evaluation-harness as test examples: found by name or file, each document an example.

A task is one of the installed package's, which is code that its user installed, or a file of the user's, which is data
(`harness_files`). lm-eval renders a task's templates; it does so here in Jinja's sandbox.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from cl_graft.data import harness_files
from cl_graft.data.readers import DataError, sample
from cl_graft.errors import CLGraftError, UnknownName, errors_alone, first_line
from cl_graft.task import Example, Scoring, Task

LOG = "lm_eval"
SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True)
class Document(Example):
    """A document of a task of lm-eval. prompt: its question, without examples before it; completion: its target.

    named: the task or group that was asked for, as `load` takes it. task: the task that it is of. number: its place
    there. digest: of all that it holds. metric: what is read of lm-eval's scores, or "" for the first that will do.
    asked: the prompt before a chat template.
    """

    named: str = ""
    task: str = ""
    number: int = 0
    digest: str = ""
    metric: str = ""
    asked: str = ""


def version() -> str:
    """The version of lm-eval. Raises CLGraftError where it is not installed."""
    if find_spec("lm_eval") is None:
        raise CLGraftError(
            "tasks of lm-evaluation-harness need it installed; run `pip install cl-graft[lm-eval]`."
        )
    return metadata.version("lm_eval")


class Asked(NamedTuple):
    """A task that is asked for: its name or path, what is read of its scores, and how many documents."""

    name: str
    metric: str = ""
    size: int | None = None


def parts(tasks: str, folder: Path = Path()) -> Iterator[Asked]:
    """Each of `NAME`, `NAME:METRIC`, `FILE.yaml`, `NAME@SIZE`, separated by commas. Raises CLGraftError for a size that
    is none."""
    for said in dict.fromkeys(filter(None, (part.strip() for part in tasks.split(",")))):
        spelled, at, size = said.partition("@")
        name, _, metric = spelled.partition(":")
        if at and not (size.isdecimal() and int(size)):
            raise CLGraftError(
                f"{said!r} asks for {size!r} documents; write a number there, as {spelled}@200."
            )
        path = str(folder / name) if name.endswith(SUFFIXES) else name
        yield Asked(path, metric, int(size) if at else None)


def files(tasks: str, folder: Path = Path()) -> list[Path]:
    """The files of the user's that these tasks are made of. Raises CLGraftError as `harness_files.read` does."""
    named = [asked.name for asked in parts(tasks, folder) if asked.name.endswith(SUFFIXES)]
    return [file for name in named for file in harness_files.files(Path(name))]


def measured_by(tasks: str, folder: Path = Path()) -> tuple[list[Example], Scoring]:
    """The documents of the tasks, or as many of each as is asked for, drawn by its name, and how they are scored.

    A group is one suite, whose score is the mean over its documents; each task of a tag is one. Raises CLGraftError or
    UnknownName.
    """
    told, documents = [f"lm-eval {version()}"], list[Example]()
    for name, metric, size in parts(tasks, folder):
        for suite, members in loaded(name).items():
            label = f"{suite}:{metric}" if metric else suite
            whole = [each for task in members for each in _documents(name, label, metric, task)]
            documents += whole if size is None else sample(whole, size, f"test/{suite}")
            told += [f"{task.task_name} {_version(task)}" for task in members]
    if not documents:
        raise CLGraftError(f"{tasks!r} names no task of lm-eval; write names separated by commas.")
    return documents, Scoring("lm_eval", {"made_by": ", ".join(dict.fromkeys(told))}, "lm_eval")


def general(tasks: Sequence[str]) -> Task:
    """A task that is only measured, of these tasks of lm-eval."""
    documents, scoring = measured_by(",".join(tasks))
    suites = dict.fromkeys(document.suite for document in documents)
    return Task("+".join(suites), (), documents, score=scoring)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep lm-eval's log and its bars off the screen, for which all of stderr is kept off: for short."""
    with errors_alone(LOG), contextlib.redirect_stderr(io.StringIO()):
        yield


def loaded(name: str) -> dict[str, list[Any]]:
    """{suite: its tasks} of a task, a tag or a group of lm-eval. Raises CLGraftError or UnknownName."""
    version()
    if name.endswith(SUFFIXES):
        stamps = [(str(f), f.stat().st_mtime_ns) for f in harness_files.files(Path(name))]
        return _of_file(name, tuple(stamps))
    return _of_package(name)


@cache
def _of_file(name: str, stamps: tuple[Any, ...]) -> dict[str, list[Any]]:
    from lm_eval.api import registry
    from lm_eval.api.task import ConfigurableTask

    keys = harness_files.read(Path(name))
    _sandbox()
    for metric in keys.get("metric_list") or []:
        asked = metric.get("metric") if isinstance(metric, dict) else None
        if asked not in registry.metric_registry:
            raise UnknownName(f"metric of lm-eval ({name})", str(asked), registry.metric_registry)
    structural = ("tag", "group", "task_list")
    with quiet(), _made(name):
        task = ConfigurableTask(config={k: v for k, v in keys.items() if k not in structural})
    return {task.task_name: [task]}


@cache
def _of_package(name: str) -> dict[str, list[Any]]:
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task as Made

    index = _index()
    if name not in index.task_index:
        raise UnknownName("task of lm-eval", name, index.all_tasks, "a task's .yaml file")
    if (index.task_index[name].cfg or {}).get("unsafe_code"):  # making it fetches a program already
        raise _unsafe(name)
    _sandbox()
    with quiet(), _made(name):
        made = index._load_spec(name)
    if isinstance(made, Group):
        for metric in made.aggregate_metric_list or []:
            if not metric.weight_by_size:
                raise CLGraftError(
                    f"the group {name!r} of lm-eval counts its tasks alike, whatever their sizes; name its tasks "
                    f"one by one: {','.join(made.child_names)}."
                )
        return {name: made.get_all_tasks()}
    return {task.task_name: [task] for task in ([made] if isinstance(made, Made) else made)}


@cache
def _index() -> Any:
    """lm-eval's index of its own tasks; it reads some 14,000 files."""
    from lm_eval.tasks import TaskManager

    with quiet():
        return TaskManager()


@contextlib.contextmanager
def _made(name: str) -> Iterator[None]:
    """What goes wrong while lm-eval makes a task is one sentence."""
    try:
        yield
    except CLGraftError:
        raise
    except Exception as error:  # of datasets, of Jinja, of lm-eval: each its own
        raise DataError(
            f"lm-eval cannot make its task {name} ({type(error).__name__}: {first_line(error)}); mend its file or its "
            "data, or choose another."
        ) from error


@cache
def _sandbox() -> None:
    """Let lm-eval render templates in Jinja's sandbox, in this process from here on."""
    from jinja2.sandbox import SandboxedEnvironment
    from lm_eval import utils

    safe = SandboxedEnvironment(
        loader=utils.env.loader,
        undefined=utils.env.undefined,
        keep_trailing_newline=utils.env.keep_trailing_newline,
    )
    safe.filters |= utils.env.filters
    utils.env = safe


def _version(task: Any) -> str:
    told = task.VERSION
    return (
        "of no version" if told in (None, "Yaml") else str(told)
    )  # "Yaml" is what lm-eval begins with


def _documents(name: str, suite: str, metric: str, task: Any) -> Iterator[Document]:
    """The documents of one task. Raises CLGraftError where its scores cannot be taken one by one."""
    if getattr(task, "UNSAFE_CODE", False):
        raise _unsafe(task.task_name)
    if getattr(task, "MULTIMODAL", False):
        raise CLGraftError(
            f"the task {task.task_name} of lm-eval is not of text alone; choose another."
        )
    read_as(task, metric)
    with quiet(), _made(task.task_name):
        for number, doc in enumerate(task.eval_docs):
            prompt, target, choices = _told(task, doc)
            told = hashlib.blake2b(
                json.dumps(doc, sort_keys=True, default=repr).encode(), digest_size=8
            ).hexdigest()
            yield Document(
                prompt,
                target,
                choices=choices,
                suite=suite,
                named=name,
                task=task.task_name,
                number=number,
                digest=told,
                metric=metric,
                asked=prompt,
            )


def _unsafe(name: str) -> CLGraftError:
    return CLGraftError(
        f"the task {name} of lm-eval runs programs that a model wrote, outside the sandbox; choose another, and score "
        "programs by `tests`."
    )


def _told(task: Any, doc: Any) -> tuple[str, str, tuple[str, ...]]:
    """Prompt, target and choices of a document, as texts."""
    from lm_eval.api.task import ConfigurableTask

    text, target = task.doc_to_text(doc), task.doc_to_target(doc)
    if isinstance(
        task, ConfigurableTask
    ):  # what stands around them is rendered now, so that it is refused now
        task.doc_to_prefix(doc)
        task.resolve_field(doc, task.config.description)
    listed = getattr(task.config, "doc_to_choice", None) is not None
    choices = tuple(map(str, task.doc_to_choice(doc))) if listed else ()
    if not isinstance(text, str):  # a prompt for each choice
        text, target = "\n".join(choices), text
    first = target[0] if isinstance(target, list) and target else target
    if isinstance(first, int) and not isinstance(first, bool) and 0 <= first < len(choices):
        first = choices[first]
    return text, str(first), choices


def read_as(task: Any, metric: str) -> tuple[str, str]:
    """(metric, filter) that a task's score is read from: of those that are means over documents, the one named by its
    metric, its filter, or METRIC/FILTER, or else the first. Raises UnknownName, or CLGraftError where there is none.
    """
    from lm_eval.api.metrics import mean

    filters = [each.name for each in task._filters]
    higher, joined = task.higher_is_better(), task.aggregation()
    means = [name for name in joined if joined[name] is mean and higher.get(name) is not False]
    known = {f"{name}/{each}": (name, each) for name in means for each in filters}
    if not known:
        raise CLGraftError(
            f"the task {task.task_name} of lm-eval is scored by {', '.join(joined)}, none of which is a mean over "
            "documents with more being better; choose another task."
        )
    if not metric:
        return next(iter(known.values()))
    for spelled, found in known.items():
        if metric in (spelled, *found):
            return found
    offered = [*known, *means, *filters]
    raise UnknownName(f"metric of the task {task.task_name} of lm-eval", metric, offered)
