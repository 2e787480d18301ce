"""What can be refused before a library that takes seconds is imported, in the order of what it costs to look."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from cl_graft import plugins
from cl_graft.budget import Budget
from cl_graft.config import RunConfig
from cl_graft.errors import CLGraftError, UnknownName
from cl_graft.evaluation.endpoint import HERE, engine_named
from cl_graft.models import load
from cl_graft.models.weights import is_bare
from cl_graft.store.record import CellFolder
from cl_graft.tracking.wandb import require_login


def check(cells: Iterable[RunConfig], bare: bool = False) -> None:
    """Raises CLGraftError for the first fault of the cheapest kind that any of the cells has.

    Budgets, seeds, names and options come first, then models' folders, then what the hub and the trackers say.
    bare: whether a model's folder without its weights will do, as for a plan.
    """
    # what is finished is never computed again, and needs neither model nor login
    cells = [c for c in cells if not CellFolder(c.out / c.cell).complete]
    for config in cells:
        Budget(config.budget, 10**9)
        if not 0 <= config.seed < 2**31:
            raise CLGraftError(
                f"seed {config.seed} is out of range; choose one from 0 to {2**31 - 1}."
            )
        together = _router(config) and config.router_top_k > 1
        if engine_named(config.engine) != HERE and together and config.router_combine == "ensemble":
            raise CLGraftError(
                f"engine {config.engine} holds one set of weights, and an ensemble has one for each pack; use "
                "--router-combine merge, or --engine hf."
            )
    for scenario, strategy, router in {(c.scenario, c.strategy, _router(c)) for c in cells}:
        for kind, name in (("scenario", scenario), ("strategy", strategy), ("router", router)):
            if name:
                plugins.file_of(kind, name)
    for config in cells:
        _options(config)
    models = sorted({c.model for c in cells if not (bare and is_bare(Path(c.model)))})
    for look in (load.check, load.reach):
        for model in models:
            look(model)
    for mode in {config.wandb for config in cells}:
        require_login(mode)


def _router(config: RunConfig) -> str:
    return config.router if config.task_ids == "inferred" else ""


def _options(config: RunConfig) -> None:
    """Raises UnknownName or CLGraftError for options of no plug-in of the cell, and for such as it does not have."""
    short = {kind: config.short(getattr(config, kind)) for kind in ("scenario", "strategy")}
    known = {*short.values(), *plugins.names("strategy"), *plugins.names("scenario")}
    for owner in config.options:
        if owner not in known:
            raise UnknownName("scenario or strategy", owner, short.values())
    given = {kind: config.options.get(name, {}) for kind, name in short.items()}
    if router := _router(config):
        short["router"], given["router"] = config.short(router), config.router_options
    for kind, options in given.items():
        if options and (plugin := plugins.declared(kind, getattr(config, kind))):
            plugins.check_options(kind, short[kind], plugin, options)
