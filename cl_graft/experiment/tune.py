"""One tuning protocol for all strategies: as many trials each, of the learning rate and of the method's main strength.

A trial is a cell: the strategy learns the first tasks of the stream and is scored on their validation after the last of
them, test examples unseen. Two tasks are the fewest after which something can have been forgotten: on the first alone
the strength of a method against forgetting does nothing, or only costs. Chaudhry et al. (2018, arXiv 1812.00420) tune
on the first tasks, too, and then leave these out of the stream, which ours are too short for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from cl_graft import plugins
from cl_graft.config import RunConfig, Tuned
from cl_graft.errors import CLGraftError
from cl_graft.experiment.rehearsal import BITS
from cl_graft.presets import Preset, Trial, data_of
from cl_graft.store.digests import machine, package_digest, versions
from cl_graft.store.record import CellFolder
from cl_graft.sweep_config import Sweep

# Times a recipe's; few and alike, so that methods share trainings; mostly lower, for what forgets least lies there.
RATES = (0.0625, 0.125, 0.25, 0.5, 1.0, 2.0, 4.0)
RATE = "learning_rate_scale"


@dataclass(frozen=True)
class Tuning:
    """A strategy with its given options that is tuned, and its trials; the first is of the author's defaults.

    cell: as it would be run, but for where.
    """

    cell: RunConfig
    budgeted: bool
    trials: tuple[RunConfig, ...]


def tunings(asked: Sweep, trials: int, first: int, seed: int, out: Path) -> list[Tuning]:
    """What a command is to tune: every scenario x strategy with its options x model x budget of a sweep.

    A method without a budget is tuned once. Raises CLGraftError as `Sweep.cells` does, and for a count below one.
    """
    for name, count in (("trials", trials), ("first", first)):
        if count < 1:
            raise CLGraftError(f"{name}={count} is not 1 or more; give 1 at least.")
    fixed = {"seeds": [seed], "task_ids": ["given"], "preset": None, "out": out / "trials"}
    cells = asked.model_copy(update={**fixed, "cache": asked.cache or out / "cache"}).cells()
    found: dict[str, Tuning] = {}
    for cell in cells:
        tuning = _tuning(cell, trials, first, seed)
        budget = cell.budget if tuning.budgeted else ""
        key = cell.model_copy(update={"budget": budget}).cell
        found.setdefault(key, tuning)
    return list(found.values())


def _tuning(cell: RunConfig, trials: int, first: int, seed: int) -> Tuning:
    name = cell.short(cell.strategy)
    kind = plugins.load("strategy", cell.strategy)
    given = cell.options.get(name, {})
    option, values = plugins.strength(kind) or ("", ())
    if option in given:
        option, values = "", ()
    default = plugins.options(kind).get(option)
    tried = [
        Tuned(options={option: value} if option else {}, learning_rate_scale=rate, first=first)
        for rate, value in design(default, values, trials, seed)
    ]
    configs = tuple(cell.model_copy(update={"tuned": tuned}) for tuned in tried)
    return Tuning(cell, kind.budgeted, configs)


def design(
    default: Any, values: Sequence[float], trials: int, seed: int
) -> list[tuple[float, Any]]:
    """Pairs of a learning rate's scale and a strength, each once: the defaults, then the grid by knight's moves.

    Moves go on by one strength and two rates from a field that the seed says, each seven through all rates, which are
    the same for all methods. Without values of a strength the scales alone are tried, the nearest to 1 first: at most
    as many as there are.
    """
    if not values:
        by_distance = sorted(RATES, key=lambda rate: (abs(math.log2(rate)), rate))
        return [(rate, default) for rate in by_distance[:trials]]
    rng = Random(f"tune/{seed}")
    row, column = rng.randrange(len(RATES)), rng.randrange(len(values))
    moves = [
        (RATES[(row + 2 * i) % len(RATES)], values[(column + i + again) % len(values)])
        for again in range(len(values))
        for i in range(len(RATES))
    ]
    return list(dict.fromkeys([(1.0, default), *moves]))[:trials]


def chosen(tuning: Tuning) -> Preset | None:
    """The preset that the trials come to; None where one is unfinished and has not failed, or where all have failed."""
    from cl_graft.experiment.cell import finished

    results = [finished(config) for config in tuning.trials]
    tried = [_trial(c, r) for c, r in zip(tuning.trials, results, strict=True)]
    told = [result for result in results if result]
    if None in tried or not told:
        return None
    trials = [trial for trial in tried if trial]
    best = best_of(trials)
    cell, result = tuning.cell, told[0]
    name = cell.short(cell.strategy)
    return Preset(
        strategy=name,
        given=cell.options.get(name, {}),
        scenario=cell.short(cell.scenario),
        data=data_of(cell),
        model=cell.model,
        budget=cell.budget if tuning.budgeted else None,
        tasks=result["tasks"],
        seed=cell.seed,
        options=best.options,
        learning_rate_scale=best.learning_rate_scale,
        edges=list(edges(best, trials)),
        trials=trials,
        about={
            "versions": versions(),
            "code": package_digest(),
            "machine": machine(),
            "base": result["base"],
            "data": result["data"],
            "sources": plugins.sources("strategy", cell.strategy),
            "scored_by": {t: next(iter(of)) for t, of in result["conventions"].items()},
        },
    )


def _trial(config: RunConfig, result: dict[str, Any] | None) -> Trial | None:
    """What a trial came to; None where it is unfinished."""
    assert config.tuned
    values: dict[str, Any] = {"options": config.tuned.options, "cell": config.cell}
    values[RATE] = config.tuned.learning_rate_scale
    if result is None:
        state = CellFolder(config.out / config.cell).state()
        return Trial(**values, failed=state["reason"]) if state["state"] == "failed" else None
    tasks = len(result["tasks"])
    errors = [error or 0.0 for error in result["stderr"][-1]]
    score = sum(result["matrix"][-1]) / tasks
    further = result["extra_matrices"].get(BITS)
    bits = -sum(further[-1]) / tasks if further else -score  # the score itself is by bits
    return Trial(**values, score=score, stderr=math.hypot(*errors) / tasks, bits=bits)


def best_of(trials: Sequence[Trial]) -> Trial:
    """The first, which are the author's defaults, unless a trial scores higher by more than its standard error.

    Then the one with the highest score; among equals the fewest bits per byte, then the earliest. Some have a score.
    """
    ended = [trial for trial in trials if trial.score is not None]
    best = max(ended, key=lambda trial: (trial.score, -(trial.bits or 0.0)))
    first = trials[0].score
    within = first is not None and (best.score or 0.0) - first <= (best.stderr or 0.0)
    return trials[0] if within else best


def edges(best: Trial, trials: Sequence[Trial]) -> Iterator[str]:
    """Names of what is the smallest or the largest value that was tried of it."""
    for name, value in best.values.items():
        tried = {v for t in trials if isinstance(v := t.values[name], int | float)}
        if len(tried) > 1 and value in (min(tried), max(tried)):
            yield name
