"""A scenario from a file of a user's: YAML that says where rows are, what is made of them, and how it is trained.

The file is data: its templates name columns and nothing else (`templates`), and it can name no code.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cl_graft.data.stream_rows import Rows, require_whole
from cl_graft.data.stream_schema import TaskSaid, read
from cl_graft.errors import CLGraftError, UnknownName
from cl_graft.ranges import Count, NotNegative, Positive, Share
from cl_graft.task import Scenario

SIZES = ("train_size", "validation_size", "test_size", "pairs_size")
RECIPE: dict[str, Any] = {  # of every task at once, by an option
    "steps": Count,
    "epochs": Positive,
    "batch": Count,
    "learning_rate": Positive,
    "warmup": Share,
    "weight_decay": NotNegative,
    "max_length": Count,
    "freeze_embeddings": bool,
}
Make = Callable[..., Scenario]


def stream(path: Path) -> Make:
    """The function that a scenario's file in Python would define: called with seed and data_dir, and with options.

    Options are the tasks and their order, and what the file may say of every task: sizes and the recipe. The default of
    each is what all tasks have in common, or None where they differ. Raises CLGraftError for a file that is none.
    """
    whole, tasks, general = read(path)
    by_name = {task.keys.name: task for task in tasks}
    if not tasks or len(by_name) < len(tasks):
        names = [task.keys.name for task in tasks]
        raise CLGraftError(
            f"{path.name} names the tasks {names}; give at least one, and each a name of its own."
        )
    for said in [*tasks, *([general] if general else [])]:
        require_whole(said)

    def make(
        *, seed: int, data_dir: Path | None = None, tasks: str = "", **chosen: Any
    ) -> Scenario:
        made = []
        for name in (tasks or ",".join(by_name)).split(","):
            if name not in by_name:
                raise UnknownName(f"task of {path.name}", name, by_name)
            made.append(Rows(by_name[name], path.parent, data_dir, seed, chosen).task())
        ability = Rows(general, path.parent, data_dir, seed, {}).task() if general else None
        return Scenario(path.stem, tuple(made), ability, whole.chat)

    return _signed(make, path, whole.description, tasks)


def _signed(make: Make, path: Path, about: str, tasks: Sequence[TaskSaid]) -> Make:
    """The function with the options that the file's tasks give it, as a signature."""
    kinds: dict[str, Any] = {"tasks": str, **dict.fromkeys(SIZES, Count | None)}
    kinds |= {name: kind | None for name, kind in RECIPE.items()}
    defaults: dict[str, Any] = {"tasks": ",".join(task.keys.name for task in tasks)}
    for name in SIZES:
        defaults[name] = _common([getattr(task.keys, name) for task in tasks])
    for name in RECIPE:
        defaults[name] = _common([getattr(task.training, name) for task in tasks])
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [inspect.Parameter("seed", keyword)]
    parameters += [
        inspect.Parameter(name, keyword, default=default)
        for name, default in {"data_dir": None, **defaults}.items()
    ]
    make.__name__ = make.__qualname__ = path.stem
    make.__doc__ = about or f"A stream of {', '.join(task.keys.name for task in tasks)}."
    make.__annotations__ = {"seed": int, "data_dir": Path | None, **kinds}
    make.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return make


def _common(values: Sequence[Any]) -> Any:
    return values[0] if all(value == values[0] for value in values) else None


def about(path: Path) -> str:
    """The first line of the file's description."""
    return str(stream(path).__doc__).strip().split("\n", 1)[0]


def files(path: Path) -> list[Path]:
    """The files beside a stream's file that its numbers depend on, itself first: data, and tasks of lm-eval."""
    from cl_graft.data import harness

    _, tasks, general = read(path)
    found = {path: None}
    for task in [*tasks, *([general] if general else [])]:
        keys = task.keys
        for named in (keys.train, keys.validation, keys.test, keys.pairs, keys.dataset_path):
            place = path.parent / named if named else None
            if place and place.is_dir():
                found |= dict.fromkeys(sorted(file for file in place.rglob("*") if file.is_file()))
            elif place and place.is_file():
                found[place] = None
        if keys.lm_eval:
            found |= dict.fromkeys(harness.files(keys.lm_eval, path.parent))
    return list(found)
