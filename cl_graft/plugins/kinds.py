"""The kinds of plug-ins: where those of each are, and what they have to be."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from cl_graft.errors import CLGraftError
from cl_graft.plugins.authors import require_call

PACKAGE = Path(__file__).parents[1]


def _is_scenario(loaded: Any, name: str, where: str | None) -> None:
    try:
        inspect.signature(loaded).bind(seed=0, data_dir=None)
    except TypeError as error:
        raise CLGraftError(
            f"{where}: {name!r} is no scenario ({error}); make it a function with the keyword-only "
            "arguments seed and data_dir, and with defaults for the others."
        ) from error


def _is_strategy(loaded: Any, name: str, where: str | None) -> None:
    if not inspect.isclass(loaded) or inspect.isabstract(loaded):
        raise CLGraftError(
            f"{where}: {name!r} is no strategy; make it one by @compressor() or @merger, or as a subclass "
            "of Strategy with a `learn`."
        )
    if hasattr(loaded, "learn"):
        require_call(loaded.learn, "self, task, context")


def _is_scorer(loaded: Any, name: str, where: str | None) -> None:
    if inspect.isclass(loaded) or not all(hasattr(loaded, part) for part in ("score", "needs")):
        raise CLGraftError(
            f"{where}: {name!r} is no scorer; make it one by @scorer() above a function of an example and an answer."
        )
    asked = "example, answer" if loaded.needs == "answers" else "examinee, examples"
    require_call(loaded.function, asked)


def _is_router(loaded: Any, name: str, where: str | None) -> None:
    if not inspect.isclass(loaded) or inspect.isabstract(loaded) or not hasattr(loaded, "judge"):
        raise CLGraftError(
            f"{where}: {name!r} is no router; make it a subclass of cl_graft.routing.base.Router with `update` and "
            "`scores`."
        )


@dataclass(frozen=True)
class Kind:
    """Where plug-ins of one kind are and what they have to be.

    folder: inside `cl_graft/` where its path says so, else beside it in a checkout, and inside it once installed.
    group: of entry points. check: raises CLGraftError where a found object is none of this kind.
    modules: plug-ins that are single modules of ours, by name. host: the kind in whose files plug-ins of this one may
    be defined, too; such a one is called `HOST:NAME`.
    """

    folder: str
    group: str
    check: Callable[[Any, str, str | None], None]
    modules: Mapping[str, str] = field(default_factory=dict)
    host: str | None = None

    @property
    def inside(self) -> bool:
        return self.folder.startswith("cl_graft/")

    @property
    def path(self) -> Path:
        installed = PACKAGE / self.folder
        return installed if installed.is_dir() else PACKAGE.parent / self.folder

    def file(self, name: str) -> Path | None:
        """The file of a plug-in in the folder; there is none in `_x.py`, nor in a package's base.py."""
        file = self.path / f"{name}.py"
        taken = name.startswith("_") or (self.inside and name == "base")
        return file if not taken and file.is_file() else None

    def files(self) -> list[str]:
        return [p.stem for p in self.path.glob("*.py") if self.file(p.stem)]

    def entries(self) -> metadata.EntryPoints:
        return metadata.entry_points(group=self.group)


KINDS = {
    "scenario": Kind("scenarios", "cl_graft.scenarios", _is_scenario),
    "strategy": Kind(
        "baselines",
        "cl_graft.baselines",
        _is_strategy,
        {name: f"cl_graft.strategy.{name}" for name in ("graftllm", "graftllm_adaptive")},
    ),
    "scorer": Kind("cl_graft/evaluation/scorers", "cl_graft.scorers", _is_scorer, host="scenario"),
    "router": Kind("cl_graft/routing", "cl_graft.routers", _is_router),
}
