"""CL-Graft: continual learning of large language models, measured honestly. See README.md."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cl_graft.version import __version__

if TYPE_CHECKING:
    from cl_graft.errors import CLGraftError
    from cl_graft.experiment.call import sweep
    from cl_graft.experiment.cell import run
    from cl_graft.matrix import PerformanceMatrix
    from cl_graft.report.frame import results
    from cl_graft.skillpack.format.file import SkillPack, SkillPackError
    from cl_graft.strategy import Strategy, compressor, merger

_WHERE = {
    "CLGraftError": "errors",
    "PerformanceMatrix": "matrix",
    "results": "report.frame",
    "run": "experiment.cell",
    "SkillPack": "skillpack.format.file",
    "SkillPackError": "skillpack.format.file",
    "Strategy": "strategy",
    "compressor": "strategy",
    "merger": "strategy",
    "sweep": "experiment.call",
}
__all__ = [
    "CLGraftError",
    "PerformanceMatrix",
    "SkillPack",
    "SkillPackError",
    "Strategy",
    "__version__",
    "compressor",
    "merger",
    "results",
    "run",
    "sweep",
]


def __getattr__(name: str) -> Any:
    """Public names are imported at first use: `import cl_graft` costs nothing."""
    if name not in _WHERE:
        raise AttributeError(f"module 'cl_graft' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_WHERE[name]}", __name__), name)
