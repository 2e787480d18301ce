"""A cell's outcomes as its folder keeps them: lines of test examples, and what a strategy gets back to go on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from cl_graft.evaluation.scores import by_metric, cells
from cl_graft.experiment import general
from cl_graft.store.files import RecordError, read_jsonl
from cl_graft.store.record import CellFolder
from cl_graft.task import Scenario, Task

if TYPE_CHECKING:
    from cl_graft.evaluation.scorers import Scored
    from cl_graft.strategy import Strategy


def restore(folder: CellFolder, strategy: Strategy) -> list[dict[str, Any]]:
    """Give the strategy its packs and outcomes back; returns the records of the experiences that are whole."""
    from cl_graft.skillpack.format.file import SkillPack

    scenario, records = strategy.scenario, folder.experiences()
    for record in records:
        if record["task"]:
            pack = SkillPack.load(
                folder.pack_path(record["experience"], record["task"]), base=strategy.grafted.base
            )
            if pack.digest != record["pack"]:
                raise RecordError(
                    f"{folder.path}: the pack of experience {record['experience']} is not the one that its "
                    "experience.json names; delete that experience's folder and the later ones to compute them anew."
                )
            strategy.packs.append(pack)
        outcomes = _outcomes(folder, record, scenario)
        measured = strategy.examiner.measured
        for name, packs in record["active"].items():
            measured[(name, *packs)] = outcomes[name]
        measured |= general.remembered(scenario.general, record, outcomes)
    if records:
        _restore_shared(folder, strategy, records[-1]["shared"])
    return records


def _restore_shared(folder: CellFolder, strategy: Strategy, shared: Mapping[str, Any]) -> None:
    """Give the strategy the artefacts back that its tasks shared after the last whole experience."""
    from cl_graft.skillpack.format.file import SkillPack

    for name, told in shared.items():
        file = folder.shared_path(told["experience"], name)
        strategy.shared[name] = SkillPack.load(file, base=strategy.grafted.base)
        if strategy.shared[name].digest != told["pack"]:
            raise RecordError(
                f"{file} is not the artefact that the record of the last experience names; "
                "delete that experience's folder and the later ones to compute them anew."
            )
    folder.keep_shared(shared)


def _outcomes(
    folder: CellFolder, record: dict[str, Any], scenario: Scenario
) -> dict[str, dict[str, list[Scored]]]:
    """{task: {metric: outcomes}} of a whole experience. Raises RecordError where some are missing."""
    from cl_graft.evaluation.scorers import Scored

    file = folder.experience_path(record["experience"]) / "examples.jsonl"
    outcomes: dict[str, dict[str, list[Scored]]] = {}
    for line in read_jsonl(file):
        scored = Scored(line["score"], line["answer"], line["note"])
        outcomes.setdefault(line["task"], {}).setdefault(line["metric"], []).append(scored)
    of_tasks = {t: metrics for t, metrics in outcomes.items() if not t.startswith("general:")}
    abilities: dict[str, Any] = {}
    try:
        if task := scenario.general:
            for who in record["general"]:
                abilities[who] = cells(outcomes[general.line(task, who)], task.suites)
        scored_again: Any = by_metric(of_tasks, scenario.tasks), abilities
    except (ValueError, KeyError):  # lines are missing, doubled, or of another task
        scored_again = None
    if scored_again != (record["scores"], record["general"]):
        raise RecordError(
            f"{file} does not hold the outcomes that its experience.json was made of; "
            "delete that experience's folder and the later ones to compute them anew."
        )
    return outcomes


def kl_to_base(strategy: Strategy, task: Task | None, experience: int) -> dict[str, Any] | None:
    """How far what answers the task just learned has moved from the base on its test prompts; None before any task."""
    from cl_graft.evaluation import divergence

    if task is None:
        return None
    groups = strategy.answered[task.name].groups
    return divergence.measure(strategy.examiner, task, groups, experience)


def example_lines(
    results: Mapping[str, Mapping[str, list[Scored]]], taken_for: Mapping[str, list[str | None]]
) -> list[dict[str, Any]]:
    """One line an outcome. taken_for: {task: what each example was answered as}, where that makes a difference."""
    return [
        {"task": task, "metric": metric, "index": i, **asdict(outcome), **taken}
        for task, metrics in results.items()
        for metric, outcomes in metrics.items()
        for i, (outcome, taken) in enumerate(
            zip(outcomes, _taken(taken_for[task], len(outcomes)), strict=True)
        )
    ]


def _taken(names: list[str | None], count: int) -> list[dict[str, Any]]:
    return [{"taken_for": name} for name in names] if names else [{}] * count
