"""One cell: for each experience, train, evaluate every task, record. Resumes at task boundaries."""

from __future__ import annotations

import json
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from cl_graft import presets
from cl_graft.config import RunConfig
from cl_graft.errors import Refused
from cl_graft.evaluation.scorers import conventions
from cl_graft.evaluation.scores import by_metric, cells
from cl_graft.experiment import general, identity
from cl_graft.experiment.executors import CellProgress
from cl_graft.experiment.outcomes import example_lines, kl_to_base, restore
from cl_graft.experiment.overhead import overhead
from cl_graft.experiment.prepare import prepare, strategy_of
from cl_graft.models import embedded
from cl_graft.models.load import locate
from cl_graft.plugins.authors import reason
from cl_graft.store import prompts
from cl_graft.store.digests import (
    data_fingerprint,
    machine,
    package_digest,
    peak_memory_mb,
    versions,
)
from cl_graft.store.files import DiskRefused, RecordError, read_json, refused, write_json
from cl_graft.store.locks import Busy
from cl_graft.store.mirror import mirror_of
from cl_graft.store.record import CellFolder
from cl_graft.store.result import collect
from cl_graft.store.result import kept as kept_result
from cl_graft.task import Scenario
from cl_graft.training.config import at_step

if TYPE_CHECKING:
    from cl_graft.skillpack.format.file import SkillPack
    from cl_graft.strategy.base import Strategy
    from cl_graft.tracking import Trackers


def run(
    config: RunConfig | None = None,
    progress: CellProgress | None = None,
    patient: bool = True,
    **fields: Any,
) -> dict[str, Any]:
    """Run one cell, or continue it, and return its result (the object `cl-graft report --json` prints).

    Give a RunConfig, or its fields: `run(scenario="mini", strategy="graftllm", allow_code_execution=True)`.
    patient: wait for a stage that another cell trains; else Busy is raised.
    Raises CLGraftError in one sentence for whatever the user can mend.
    """
    config = presets.applied(config or RunConfig(**fields))
    folder = CellFolder(config.out / config.cell)
    mirror = mirror_of(config)
    if (result := finished(config)) is not None:
        if mirror:  # the attempt that finished it may not have come to this
            mirror.push(folder.path, config.cell)
        return result
    begun = perf_counter()
    scenario, strategy_class, options = prepare(config)
    report = _forwards(progress or (lambda what, done, at="": None))
    report("loading the model", 0.0)
    locate(config.model, config.data_dir, preparing(config.model, report))
    with folder.lock(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of libraries to each other
        if mirror:
            mirror.pull(config.cell, folder.path)
        if (result := finished(config)) is None:  # by another process, since we looked
            with _failure_kept(folder):
                result = _compute(
                    config, folder, scenario, strategy_class, options, report, begun, patient
                )
            report("done", 1.0)
        if mirror:
            mirror.push(folder.path, config.cell)
        return result


@contextmanager
def _failure_kept(folder: CellFolder) -> Iterator[None]:
    """What ends the cell, unless the same command is to go on from it, is its state `failed`, with the traceback."""
    try:
        yield
    except (Refused, Busy):
        raise
    except (Exception, SystemExit) as error:
        with suppress(DiskRefused):
            folder.failed(reason(error), traceback.format_exc())
        raise


def finished(config: RunConfig) -> dict[str, Any] | None:
    """The result on disk, or None if there is something left to compute.

    Raises RecordError where the folder, finished or not, is of another version or experiment, or was made of other
    source files, data or weights.
    """
    folder = CellFolder(config.out / config.cell)
    if not folder.begun:
        return None
    folder.check({"config": config.experiment()})
    then = folder.identity()
    scorers = then.get("sources", {}).get("scorers", ())
    folder.check({"sources": identity.sources(config, scorers)})
    folder.check({"inputs": then.get("inputs", {}) | identity.inputs(config)})
    if not folder.complete:
        return None
    try:
        return kept_result(folder.path) or read_json(folder.path / "result.json")
    except RecordError:
        return None  # it is made anew of the experiences


def _compute(
    config: RunConfig,
    folder: CellFolder,
    scenario: Scenario,
    strategy_class: type[Strategy],
    options: dict[str, Any],
    progress: CellProgress,
    begun: float,
    patient: bool,
) -> dict[str, Any]:
    import torch
    from transformers import set_seed

    from cl_graft.models.load import load
    from cl_graft.models.roles import roles
    from cl_graft.stream import benchmark
    from cl_graft.tracking import trackers

    torch.set_num_threads(config.threads)
    model, tokenizer = load(config.model, config.data_dir, config.max_memory or None, config.store)
    roles(model)  # refuses, before anything is computed, a model whose modules cannot be told apart
    set_seed(config.seed)
    strategy = strategy_of(config, scenario, strategy_class, options, model, tokenizer, patient)
    strategy.require_possible()
    scenario, budget = strategy.scenario, strategy.budget
    about: dict[str, Any] = {
        "config": config.experiment(),
        "options": options,
        "sources": identity.sources(config, identity.scorers_of(scenario)),
        "inputs": identity.inputs(config),
        "versions": versions(),
        "code": package_digest(),
        "machine": machine(),
        "reads_data_dir": config.data_dir is not None,
        "base": strategy.grafted.base,
        "data": data_fingerprint(scenario),
        "conventions": conventions(scenario),
        "tasks": scenario.task_names,
        "unlearns": {task.name: task.unlearns for task in scenario.tasks if task.unlearns},
        "budget_bytes": budget.bytes,
        "budgeted": strategy.budgeted,
        "base_bytes": budget.base_bytes,
        **({"engine": strategy.examiner.engine.told} if strategy.examiner.engine else {}),
    }
    folder.begin(json.loads(json.dumps(about)))
    folder.mark("running")
    asked = prompts.keep(folder.path.parent, about["data"], scenario)
    if strategy.stages.mirror:
        strategy.stages.mirror.push(asked, f"{prompts.FOLDER}/{asked.name}")
    tracker = trackers(config, folder.path, about)
    try:
        _experiences(folder, strategy, benchmark(scenario), tracker, progress, begun)
        result = collect(folder.path)
        tracker.finish(result)  # before the cell is complete: what is cut short here is done again
        # the result comes last: after it nothing is looked at, and so nothing swept
        folder.mark("done")
        write_json(folder.path / "result.json", result)
    except BaseException as error:
        tracker.abandon(error)
        raise
    return result


def _experiences(
    folder: CellFolder,
    strategy: Strategy,
    stream: Any,
    tracker: Trackers,
    progress: CellProgress,
    begun: float,
) -> None:
    """begun: when the cell was, by `perf_counter`; what it took to load counts with the first experience."""
    done = restore(folder, strategy)
    for note in strategy.notes:
        progress(note, 0.0)
    told = len(strategy.notes) if done else 0  # those of the start are in the first record
    for record in done:
        tracker.experience(record)
    tasks = strategy.scenario.tasks
    total = len(tasks) + 1
    for experience in range(len(done), total):
        task = tasks[experience - 1] if experience else None
        strategy.progress = partial(_part_of, progress, experience, total)
        costs = _Costs(strategy, begun)
        kept: dict[str, Any] = {"pack": None, "pack_bytes": None, "shared": {}, "alive_bytes": 0}
        if task:
            before = dict(strategy.shared)
            strategy.train(stream.train_stream[experience - 1], eval_streams=[])
            kept = _kept(folder, strategy, experience, before)
        what = f"evaluating after {task.name}" if task else "evaluating the base model"
        progress(what, (experience + 0.8) / total)
        scored, lines = _evaluate(strategy, stream)
        scored["kl_to_base"] = kl_to_base(strategy, task, experience)
        about = {"experience": experience, "task": task.name if task else None}
        left_out = {"notes": strategy.notes[told:]}
        record = {**about, **scored, **kept, **costs.record(), **left_out}
        told = len(strategy.notes)
        folder.write_experience(experience, lines, record)
        folder.keep_shared(kept["shared"])
        tracker.experience(record)
        if strategy.stages.mirror:
            strategy.stages.mirror.push(folder.path, folder.path.name)
        begun = perf_counter()


def _kept(
    folder: CellFolder, strategy: Strategy, experience: int, before: Mapping[str, SkillPack]
) -> dict[str, Any]:
    """Write the task's pack and the shared artefacts that are new, and say what there is, in bytes.

    before: the shared artefacts of the experience before, whose files are there.
    """
    pack = strategy.packs[-1]
    size = _saved(pack, folder.new_pack_path(experience, pack.task))
    shared, told = {}, folder.experiences()[-1]["shared"] if before else {}
    for name, artefact in strategy.shared.items():
        number = experience
        if before.get(name) is artefact:
            number = told[name]["experience"]
        else:
            _saved(artefact, folder.new_shared_path(experience, name))
        shared[name] = {"experience": number, "pack": artefact.digest, "bytes": artefact.nbytes}
    alive = sum(kept.nbytes for kept in strategy.alive)
    return {"pack": pack.digest, "pack_bytes": size, "shared": shared, "alive_bytes": alive}


def _saved(pack: SkillPack, path: Path) -> int:
    """Bytes of the pack's file. Raises DiskRefused if the disk does."""
    from cl_graft.skillpack.format.errors import SkillPackError

    try:
        return pack.save(path)
    except SkillPackError as error:
        if not isinstance(error.__cause__, OSError):
            raise
        raise refused(path, str(error.__cause__.strerror)) from error


def _evaluate(strategy: Strategy, stream: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """An experience's scores with the packs that they were made by, and a line of every outcome."""
    scenario, known = strategy.scenario, set(strategy.examiner.measured)
    strategy.eval(stream.test_stream)
    taken = {name: strategy.answered[name].names for name in strategy.results}
    outcomes, ability = dict(strategy.results), general.measure(strategy)
    abilities: dict[str, Any] = {}
    if scenario.general:
        for who, found in ability.items():
            name = general.line(scenario.general, who)
            outcomes[name], taken[name] = found.outcomes, found.taken_for
            abilities[who] = cells(found.outcomes, scenario.general.suites)
    known |= strategy.examiner.recalled
    active = {task.name: list(strategy.answered[task.name].key) for task in scenario.tasks}
    scored = {
        "scores": by_metric(strategy.results, scenario.tasks),
        "general": abilities,
        "active": active,
        "general_active": {who: found.active for who, found in ability.items()},
        "identical": [name for name, packs in active.items() if (name, *packs) in known],
        "routing": {name: answered.counts for name, answered in strategy.answered.items()},
        "overhead": overhead(strategy, strategy.results),
    }
    return scored, example_lines(outcomes, taken)


class _Costs:
    """The costs of one experience: what a strategy's counters grow by from here to `record`."""

    def __init__(self, strategy: Strategy, begun: float):
        self.strategy, self.begun = strategy, begun
        self.seconds, self.unmeasured_seconds = strategy.seconds, strategy.unmeasured_seconds
        self.log, self.losses = replace(strategy.log), len(strategy.log.losses)

    def record(self) -> dict[str, Any]:
        strategy, log = self.strategy, self.strategy.log
        seconds = {k: v - self.seconds[k] for k, v in strategy.seconds.items()}
        busy = (
            seconds["compress"]
            + seconds["evaluate"]
            + strategy.unmeasured_seconds
            - self.unmeasured_seconds
        )
        busy += log.spent - self.log.spent
        spent = perf_counter() - self.begun
        return {
            "seconds": seconds | {"harness": spent - busy},
            "spent": spent,
            "tokens": log.tokens - self.log.tokens,
            "peak_memory_mb": peak_memory_mb(),
            "losses": log.losses[self.losses :],
        }


def _part_of(
    progress: CellProgress, experience: int, total: int, what: str, part: float, at: str = ""
) -> None:
    share = 0.6 + 0.2 * part if what.startswith("compressing") else 0.6 * part
    progress(what, (experience + share) / total, at)


def preparing(model: str, report: CellProgress) -> Callable[[int, float], None]:
    """What an embedded model that is trained now is to be told, so that its steps are reported."""
    spec = embedded.SPECS.get(model)

    def trained(step: int, loss: float) -> None:
        assert spec
        report(f"preparing {model}", 0.0, at_step(step, spec.steps, loss))

    return trained


def _forwards(progress: CellProgress) -> CellProgress:
    """A progress that never goes back: a task may train twice (SFT, then DPO)."""
    furthest = 0.0

    def report(what: str, done: float, at: str = "") -> None:
        nonlocal furthest
        furthest = max(furthest, done)
        progress(what, furthest, at)

    return report
