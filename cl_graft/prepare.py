"""A run before anything is computed: finding and checking all that it names, and building its strategy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import plugins
from .budget import Budget
from .config import RunConfig
from .errors import CLGraftError, UnknownName
from .task import Scenario

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .strategy import Strategy


def prepare(config: RunConfig) -> tuple[Scenario, type[Strategy], dict[str, Any]]:
    """Find and check everything a run names, before anything is computed."""
    Budget(config.budget, 10**9)
    if not 0 <= config.seed < 2**31:
        raise CLGraftError(f"seed {config.seed} is out of range; choose one from 0 to {2**31 - 1}.")
    scenario_name, strategy_name = config.short(config.scenario), config.short(config.strategy)
    for owner in config.options:
        if owner not in (
            scenario_name,
            strategy_name,
            *plugins.names("strategy"),
            *plugins.names("scenario"),
        ):
            raise UnknownName("scenario or strategy", owner, [scenario_name, strategy_name])
    make = plugins.load("scenario", config.scenario)
    chosen = plugins.check_options(
        "scenario", scenario_name, make, config.options.get(scenario_name, {})
    )
    strategy_class = plugins.load("strategy", config.strategy)
    _require_strategy(strategy_class, config.strategy)
    options = plugins.check_options(
        "strategy", strategy_name, strategy_class, config.options.get(strategy_name, {})
    )
    scenario = make(seed=config.seed, data_dir=config.data_dir, **chosen)
    if not isinstance(scenario, Scenario):
        raise CLGraftError(
            f"{config.scenario} is not a scenario: its function returns {type(scenario).__name__}; "
            "return a cl_graft.task.Scenario."
        )
    scenario = _trained_on(scenario, config.train_on)
    programs = [t for t in scenario.tasks if "tests" in t.metrics]
    if programs:
        from .evaluation.sandbox import require_consent

        require_consent(config.allow_code_execution, f"scoring task {programs[0].name!r}")
    return scenario, strategy_class, options


def strategy_of(
    config: RunConfig,
    scenario: Scenario,
    strategy_class: type[Strategy],
    options: Mapping[str, Any],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    patient: bool = True,
) -> Strategy:
    """The strategy of a cell that was prepared, on its model; its scenario's prompts are rendered.

    patient: wait for what another cell is making; else Busy is raised.
    Raises NoChatTemplate where the scenario is for chat and the tokenizer is not.
    """
    from .evaluation.outcomes import Outcomes
    from .models.chat import rendered
    from .training.stages import Stages

    return strategy_class(
        model=model,
        tokenizer=tokenizer,
        scenario=rendered(scenario, tokenizer),
        budget=Budget(config.budget, sum(p.numel() for p in model.parameters())),
        seed=config.seed,
        options=options,
        allow_code=config.allow_code_execution,
        stages=Stages(config.store, config.launch, patient),
        outcomes=Outcomes(config.store, config.cell, patient),
    )


def _trained_on(scenario: Scenario, folders: Mapping[str, Path]) -> Scenario:
    """The scenario with the training data of some tasks taken from folders that `transfer build` made."""
    from .transfer.read import read_examples, read_pairs

    for name in folders:
        if name not in scenario.task_names:
            raise UnknownName(f"task of {scenario.name}", name, scenario.task_names)
    tasks = []
    for task in scenario.tasks:
        if task.name in folders:
            folder = folders[task.name]
            task = replace(task, train=read_examples(folder), pairs=read_pairs(folder))
            if task.training.preference and not task.pairs:
                raise CLGraftError(
                    f"{folder} holds no preference pairs for task {task.name!r}; build it with a wider reward gap, "
                    "or train without DPO."
                )
        tasks.append(task)
    return replace(scenario, tasks=tuple(tasks))


def _require_strategy(found: Any, name: str) -> None:
    from .strategy import Strategy

    if not (isinstance(found, type) and issubclass(found, Strategy)):
        raise CLGraftError(
            f"{name} is not a strategy; decorate its function with @compressor or @merger, "
            "or make it a subclass of cl_graft.Strategy."
        )
