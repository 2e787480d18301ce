"""A task file of lm-evaluation-harness, read as data: what in one would run code, or fetch some, is refused.

lm-eval itself imports the Python file that a `!function` names, builds classes, downloads metrics that are programs,
and renders its templates in a Jinja that runs what they say.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cl_graft.errors import CLGraftError, UnknownName
from cl_graft.yaml_files import parsed

PLAIN = frozenset(
    [
        "task",
        "task_alias",
        "tag",
        "dataset_path",
        "dataset_name",
        "dataset_kwargs",
        "description",
        "training_split",
        "validation_split",
        "test_split",
        "fewshot_split",
        "num_fewshot",
        "doc_to_text",
        "doc_to_target",
        "doc_to_choice",
        "target_delimiter",
        "fewshot_delimiter",
        "fewshot_config",
        "metric_list",
        "output_type",
        "generation_kwargs",
        "repeats",
        "filter_list",
        "should_decontaminate",
        "doc_to_decontamination_query",
        "gen_prefix",
        "metadata",
        "include",
    ]
)
INNER = {  # keys of what is inside a key, where not everything is data
    "dataset_kwargs": ["data_files", "data_dir", "field", "revision", "trust_remote_code"],
    "fewshot_config": [
        "sampler",
        "split",
        "fewshot_indices",
        "samples",
        "doc_to_text",
        "doc_to_choice",
        "doc_to_target",
        "gen_prefix",
        "fewshot_delimiter",
        "target_delimiter",
    ],
    "generation_kwargs": [
        "until",
        "do_sample",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "num_beams",
        "max_gen_toks",
        "max_new_tokens",
        "max_tokens",
        "repetition_penalty",
    ],
}
NAME = re.compile(r"\w[\w.-]*")  # of a task
CODE = {  # keys that lm-eval knows and that stand for code
    "class": "it names a class of Python",
    "custom_dataset": "it names a function of Python",
    "process_docs": "it names a function of Python",
    "process_results": "it names a function of Python",
    "use_prompt": "it fetches a template",
    "unsafe_code": "it runs programs that a model wrote, outside the sandbox",
    "doc_to_image": "it is of pictures",
    "doc_to_audio": "it is of sounds",
}


def read(path: Path) -> dict[str, Any]:
    """The keys of a task file with those that it includes; data files that stand beside it have whole paths.

    Raises CLGraftError in one sentence for a file that is none, or not data alone.
    """
    merged: dict[str, Any] = {}
    for _, keys in _parts(path, ()):
        merged |= keys
    if not isinstance(name := merged.get("task"), str) or not NAME.fullmatch(name):
        raise CLGraftError(
            f"{path} names no single task in letters, digits, '-', '_' and '.'; give a file with `task: NAME`, and "
            "of a group each task's file."
        )
    return merged


def files(path: Path) -> list[Path]:
    """The file, those that it includes, and the data files beside them."""
    found: dict[Path, None] = {}
    for file, keys in _parts(path, ()):
        found[file] = None
        kwargs = keys.get("dataset_kwargs") or {}
        for named in _names(kwargs.get("data_files")):
            if Path(named).is_file():
                found[Path(named)] = None
        for name in (keys.get("dataset_path"), kwargs.get("data_dir")):
            if name and Path(name).is_dir():
                inside = sorted(each for each in Path(name).rglob("*") if each.is_file())
                found |= dict.fromkeys(inside)
    return list(found)


def _parts(path: Path, above: tuple[Path, ...]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Each file and its own keys, what is included first. Raises CLGraftError."""
    if path.resolve() in above:
        raise CLGraftError(f"{path} includes itself; mend its `include`.")
    keys = _mapping(path)
    _refuse_code(path, keys)
    included: Any = keys.pop("include", None) or []
    for each in [included] if isinstance(included, str) else included:
        yield from _parts(path.parent / str(each), (*above, path.resolve()))
    yield path, _placed(path.parent, keys)


def _mapping(path: Path) -> dict[str, Any]:
    import yaml

    class Loader(yaml.SafeLoader):
        """YAML's plain data; what has another tag is refused with its place."""

    def refuse(loader: Any, tag: Any, node: Any) -> None:
        line = node.start_mark.line + 1
        raise CLGraftError(
            f"{path}, line {line} has !{tag} {getattr(node, 'value', '')}, which runs code; write plain data "
            "there, or score by a scorer of your own."
        )

    Loader.add_multi_constructor("!", refuse)
    keys = parsed(path, "give a task file of lm-eval", Loader)
    if not isinstance(keys, dict):
        raise CLGraftError(f"{path} is no task of lm-eval; write its keys, such as `task: NAME`.")
    return keys


def _refuse_code(path: Path, keys: Mapping[str, Any]) -> None:
    """Raises CLGraftError or UnknownName for a key, or one inside of it, that is not data alone."""
    for key, value in keys.items():
        if key in CODE:
            if value in (None, False):
                continue
            raise CLGraftError(
                f"{path}: {key} is not taken from a file, for {CODE[key]}; leave it out, or choose another task."
            )
        if key not in PLAIN:
            raise UnknownName(f"key of a task file of lm-eval ({path})", str(key), PLAIN)
        for inner in value if key in INNER and isinstance(value, dict) else ():
            if inner not in INNER[key]:
                raise UnknownName(f"key of {key} ({path})", str(inner), INNER[key])
    if (keys.get("dataset_kwargs") or {}).get("trust_remote_code"):
        raise CLGraftError(
            f"{path} asks for trust_remote_code, which is never given; leave it out."
        )
    if keys.get("dataset_path") == "pandas":
        raise CLGraftError(
            f"{path} reads pickles, which may hold code; give its data as JSON, CSV or Parquet."
        )
    for metric in keys.get("metric_list") or []:
        if isinstance(metric, dict) and metric.get("hf_evaluate"):
            raise CLGraftError(
                f"{path}: the metric {metric.get('metric')!r} is a program that is downloaded; choose one of lm-eval's "
                "own."
            )


def _placed(folder: Path, keys: dict[str, Any]) -> dict[str, Any]:
    """The keys, with whole paths of data that stand beside the file: lm-eval itself looks from where it is run."""

    def whole(value: Any) -> Any:
        if isinstance(value, str):
            return str((folder / value).resolve()) if (folder / value).exists() else value
        if isinstance(value, list):
            return [whole(each) for each in value]
        if isinstance(value, dict):
            return {key: whole(each) for key, each in value.items()}
        return value

    placed = dict(keys)
    if isinstance(name := keys.get("dataset_path"), str) and (folder / name).is_dir():
        placed["dataset_path"] = whole(name)
    if isinstance(kwargs := keys.get("dataset_kwargs"), dict):
        placed["dataset_kwargs"] = {
            key: whole(value) if key in ("data_files", "data_dir") else value
            for key, value in kwargs.items()
            if key != "trust_remote_code"
        }
    return placed


def _names(said: Any) -> Iterator[str]:
    """Every text in a nest of lists and dicts."""
    if isinstance(said, str):
        yield said
    elif isinstance(said, dict | list):
        for each in said.values() if isinstance(said, dict) else said:
            yield from _names(each)
