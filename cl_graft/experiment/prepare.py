"""A run before anything is computed: finding and checking all that it names, and building its strategy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cl_graft import plugins
from cl_graft.budget import Budget
from cl_graft.config import Launch, RunConfig
from cl_graft.data import harness
from cl_graft.errors import AuthorMistake, CLGraftError, UnknownName
from cl_graft.evaluation.endpoint import HERE, REACH, Endpoint, engine_named
from cl_graft.evaluation.scorers import judges_of, needs_of, require_consents, resolved
from cl_graft.experiment import early
from cl_graft.experiment.rehearsal import rehearsal
from cl_graft.experiment.texts import check_texts
from cl_graft.store.digests import digest
from cl_graft.store.mirror import mirror_of
from cl_graft.store.record import CellFolder
from cl_graft.task import Scenario

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from cl_graft.evaluation.engine import Engine
    from cl_graft.routing.base import BaseRouter
    from cl_graft.strategy.base import Strategy

UNKNOWN = "0" * 32  # stands for the fingerprint of weights that are not there, and is as long


def prepare(
    config: RunConfig, bare: bool = False
) -> tuple[Scenario, type[Strategy], dict[str, Any]]:
    """Find and check everything a run names, before anything is computed; what costs least to check comes first.

    bare: as for `early.check`.
    """
    early.check([config], bare)
    scenario = _scenario(config)
    if not bare:
        _servers(config, scenario)
    _launch(config.launch, scenario)
    strategy_class, options = _strategy(config)
    if config.max_memory or not bare:  # what is free here is of no matter to a plan
        _spread(config, strategy_class)
    return scenario, strategy_class, options


def check(cells: Iterable[RunConfig]) -> None:
    """Raise what `prepare` would for any of the cells, and for their models, mirrors and launches, the cheapest first.

    A scenario that cells share is made once, and so is a model without its weights.
    """
    cells = list(cells)
    check_methods(cells, check_data(cells))


def check_data(cells: Sequence[RunConfig]) -> dict[str, Scenario]:
    """Check what needs no library of models: plain values and names, scenarios, consents, launches.

    Returns the scenarios by `_data_of`.
    """
    early.check(cells)
    scenarios: dict[str, Scenario] = {}
    for config in cells:
        if (key := _data_of(config)) not in scenarios:
            scenarios[key] = _scenario(config)
            _launch(config.launch, scenarios[key])
    asked = set()
    for config in cells:
        told = config.engine, (key := _data_of(config))
        if told not in asked and not CellFolder(config.out / config.cell).complete:
            _servers(config, scenarios[key])
            asked.add(told)
    return scenarios


def check_methods(cells: Sequence[RunConfig], scenarios: Mapping[str, Scenario]) -> None:
    """Check what is left of `check`: mirrors, strategies with their options, and what the models leave possible."""
    from cl_graft.models import load

    for config in cells:
        if mirror := mirror_of(config):
            mirror.check()
        strategy_class, _ = _strategy(config)
        if config.max_memory:
            _spread(config, strategy_class)
    models: dict[Any, PreTrainedModel | None] = {}
    for config in cells:
        named = config.model, config.data_dir
        if named not in models:
            models[named] = load.without_weights(*named)
        if (model := models[named]) is not None:
            _require_possible(config, scenarios[_data_of(config)], model)


def _data_of(config: RunConfig) -> str:
    """Digest of all that makes the cell's scenario what it is."""
    told = (config.scenario, config.seed, config.data_dir, config.allow_code_execution)
    chosen: list[Any] = [config.options.get(config.short(config.scenario)), config.scoring]
    chosen += [config.general, config.tuned.first if config.tuned else 0]
    return digest(*map(str, told), chosen, str(config.train_on))


def _require_possible(config: RunConfig, scenario: Scenario, model: PreTrainedModel) -> None:
    """Raises CLGraftError or OverBudget where the method could not keep a task of such a model."""
    strategy_class, options = _strategy(config)
    strategy = strategy_class(
        model=model,
        tokenizer=None,
        scenario=scenario,
        budget=Budget(config.budget, sum(p.numel() for p in model.parameters())),
        seed=config.seed,
        options=options,
        router=router_of(config),
    )
    strategy.grafted._base = UNKNOWN
    strategy.require_possible()


def try_methods(cells: Sequence[RunConfig]) -> None:
    """Let each method that is a file of the user's learn two toy tasks, once with each choice of options.

    Cells that have begun are passed over. Raises CLGraftError with file and line for what its author has to mend.
    """
    tried = set()
    for config in cells:
        if config.strategy.endswith(".py") and not CellFolder(config.out / config.cell).begun:
            strategy_class, options = _strategy(config)
            told = digest(config.strategy, repr(sorted(options.items())))
            if told not in tried:
                from cl_graft.experiment.trial import trial

                trial(strategy_class, options)
                tried.add(told)


def _launch(launch: Launch, scenario: Scenario) -> None:
    """Raises CLGraftError where it cannot work here, or cannot make a task's batches."""
    from cl_graft.training.config import accumulation

    if launch.processes:
        from cl_graft.training.launch import check  # which imports torch

        check(launch)
    for task in scenario.tasks:
        for half in (task.training, task.training.preference):
            if half:
                accumulation(half.batch, launch)


def _spread(config: RunConfig, strategy_class: type[Strategy]) -> None:
    """Raises CLGraftError where the model is spread over devices and the method could not train it."""
    from cl_graft.models import load

    planned = load.device_map(config.model, config.data_dir, config.max_memory or None) or {}
    devices = {f"GPU {x}" if isinstance(x, int) else str(x) for x in planned.values()}
    if len(devices) < 2 and "disk" not in devices:
        return
    where = ", ".join(sorted(devices))
    if not config.launch.processes:
        raise CLGraftError(
            f"model {config.model!r} is spread over devices ({where}) and cannot train in this process; launch its "
            "stages (--launch processes=8,zero=3), or give it a device that holds it."
        )
    if not strategy_class.trains_by_recipe():
        raise CLGraftError(
            f"model {config.model!r} is spread over devices ({where}), and {config.short(config.strategy)} does more "
            "with its weights than train by the recipe; choose one that does not, as graftllm, or a larger device."
        )


def _strategy(config: RunConfig) -> tuple[type[Strategy], dict[str, Any]]:
    """Class and options of the strategy; the router is checked, too."""
    router_of(config)
    strategy_name = config.short(config.strategy)
    strategy_class = plugins.load("strategy", config.strategy)
    _require_strategy(strategy_class, config.strategy)
    if config.launch.processes:
        from cl_graft.training import term

        term.check(strategy_class.terms, config.launch, f"the strategy {strategy_name!r}")
    tuned = config.tuned.options if config.tuned else {}
    given = {**tuned, **config.options.get(strategy_name, {})}
    options = plugins.check_options("strategy", strategy_name, strategy_class, given)
    strategy_class.keeps_by(options)  # refuses a convention that there is none of
    return strategy_class, options


def scenario_of(config: RunConfig) -> Scenario:
    """The scenario that the config names, with the training data of its `train_on`; nobody has consented yet."""
    name = config.short(config.scenario)
    make = plugins.load("scenario", config.scenario)
    chosen = plugins.check_options("scenario", name, make, config.options.get(name, {}))
    with plugins.authored(f"the scenario {config.scenario}"):
        scenario = make(seed=config.seed, data_dir=config.data_dir, **chosen)
    if not isinstance(scenario, Scenario):
        raise CLGraftError(
            f"{plugins.line_of(make, config.scenario)}: {name} is not a scenario: its function returns "
            f"{type(scenario).__name__}; return a cl_graft.task.Scenario."
        )
    if config.general:
        scenario = replace(scenario, general=harness.general(config.general))
    try:
        scenario, used = resolved(scenario, config.scenario, config.scorers)
    except UnknownName as error:
        if error.kind != "scorer":
            raise
        where = plugins.line_with(plugins.file_of("scenario", config.scenario), error.name)
        raise AuthorMistake(f"{where}: {error}") from error
    for owner in config.scorers:
        if owner not in used:
            known = [name, config.short(config.strategy), *sorted(used)]
            raise UnknownName("scenario, strategy or scorer of this cell", owner, known)
    scenario = _trained_on(scenario, config.trained_on)
    if config.tuned and config.tuned.first:
        scenario = rehearsal(scenario, config.tuned.first)
    check_texts(scenario)
    return scenario


def _scenario(config: RunConfig) -> Scenario:
    scenario = scenario_of(config)
    require_consents(config.allow_code_execution, scenario.examined)
    return scenario


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

    patient: wait for a stage that another cell trains; else Busy is raised.
    Raises NoChatTemplate where the scenario is for chat and the tokenizer is not, CLGraftError for preference pairs
    that are all alike to the model.
    """
    from cl_graft.evaluation.outcomes import Outcomes
    from cl_graft.models.chat import end_turns, is_chat, rendered, told
    from cl_graft.models.pairs import without_equal_pairs
    from cl_graft.training.stages import Stages

    mirror = mirror_of(config)
    chat = is_chat(tokenizer, scenario.chat)
    scenario = rendered(scenario, tokenizer)
    if chat:
        end_turns(tokenizer)
    scenario, left_out = without_equal_pairs(scenario, tokenizer)
    strategy = strategy_class(
        model=model,
        tokenizer=tokenizer,
        scenario=scenario,
        budget=Budget(config.budget, sum(p.numel() for p in model.parameters())),
        seed=config.seed,
        options=options,
        allow_code=config.allow_code_execution,
        stages=Stages(config.store, config.launch, patient, mirror),
        outcomes=Outcomes(config.store, config.cell, mirror),
        router=router_of(config),
    )
    strategy.notes += [*([told(tokenizer)] if chat else []), *left_out]
    strategy.examiner.engine = engine_of(config)
    if config.tuned:
        strategy.learning_rate_scale = config.tuned.learning_rate_scale
    return strategy


def engine_of(config: RunConfig) -> Engine | None:
    """What answers at test in the place of the model in this process, if anything does. Raises as `engine_named`."""
    name = engine_named(config.engine)
    if name == HERE:
        return None
    from cl_graft.evaluation.engine import Engine

    return Engine(name, config.store)


def _servers(config: RunConfig, scenario: Scenario) -> None:
    """Raises CLGraftError where the engine cannot score the scenario's tasks, EndpointError where a server that is to
    answer or to judge is not there."""
    if engine := engine_of(config):
        engine.check(needs_of(scenario))
    for url in judges_of(scenario):
        Endpoint(url, REACH).told("/v1/models")  # which costs nothing; what it says is no matter


def router_of(config: RunConfig) -> BaseRouter | None:
    """What infers the task of a prompt; None where it is given. Raises UnknownName or CLGraftError, as `prepare`."""
    if config.task_ids == "given":
        return None
    from cl_graft.routing.base import Selection

    name = config.short(config.router)
    kind = plugins.load("router", config.router)
    router = kind(**plugins.check_options("router", name, kind, config.router_options))
    router.selection = Selection(config.router_top_k, config.router_combine, config.router_reject)
    return router


def _trained_on(scenario: Scenario, folders: Mapping[str, Path]) -> Scenario:
    """The scenario with the training data of some tasks taken from folders that `transfer build` made.

    Their validation stays the scenario's, and what the folders hold on its prompts is left out.
    """
    from cl_graft.transfer.read import read_examples, read_logits, read_pairs

    for name in folders:
        if name not in scenario.task_names:
            raise UnknownName(f"task of {scenario.name}", name, scenario.task_names)
    tasks = []
    for task in scenario.tasks:
        if task.name in folders:
            folder = folders[task.name]
            train, pairs = read_examples(folder), read_pairs(folder)
            task = replace(task, train=train, pairs=pairs, logits=read_logits(folder))
            trained = {e.prompt for e in task.train} | {pair.prompt for pair in task.pairs}
            if tested := sum(example.prompt in trained for example in task.test):
                raise CLGraftError(
                    f"{folder} trains task {task.name!r} on {tested} of its own test prompts; build it again from "
                    "prompts without them."
                )
            task = task.with_validation()
            if task.training.preference and not task.pairs:
                raise CLGraftError(
                    f"{folder} holds no preference pairs for task {task.name!r}; build it with a wider reward gap, "
                    "or train without DPO."
                )
        tasks.append(task)
    return replace(scenario, tasks=tuple(tasks))


def _require_strategy(loaded: Any, name: str) -> None:
    from cl_graft.strategy.base import Strategy

    if not (isinstance(loaded, type) and issubclass(loaded, Strategy)):
        raise CLGraftError(
            f"{name} is not a strategy; decorate its function with @compressor() or @merger, "
            "or make it a subclass of cl_graft.Strategy."
        )
