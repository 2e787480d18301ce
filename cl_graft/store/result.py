"""What a cell came to: one plain object, from what is on disk, complete or not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from cl_graft.config import RunConfig
from cl_graft.matrix import PerformanceMatrix
from cl_graft.store.files import RecordError, read_json
from cl_graft.store.record import CellFolder, states

Grid = list[list[float | None]]  # a row an experience, the base's first; a column a task


class Result(BaseModel):
    """What a report cannot do without, of what `result_object` gives."""

    model_config = ConfigDict(protected_namespaces=(), defer_build=True)

    scenario: str
    strategy: str
    label: str
    model: str
    seed: int
    budget: str
    tasks: list[str]
    matrix: Grid
    n: Grid
    stderr: Grid
    identical: list[list[bool]]
    metrics: dict[str, float | None]
    extra_matrices: dict[str, Grid]
    general: list[float | None]
    pack_bytes: list[int]
    shared_bytes: dict[str, int]
    alive_bytes: list[int]
    routing: list[dict[str, dict[str, int]]]
    base_bytes: int
    seconds: dict[str, float]
    tokens: float
    options: dict[str, Any]
    versions: dict[str, Any]
    config: dict[str, Any]
    complete: bool


def result_object(identity: dict[str, Any], records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The object of one cell: matrix with row 0 the base, null where unmeasured, and everything beside it."""
    config, tasks = RunConfig(**identity["config"]), list(identity["tasks"])
    rows = len(tasks) + 1

    def table(metric: str, key: str) -> list[list[float | None]]:
        filled = [[r["scores"].get(metric, {}).get(t, {}).get(key) for t in tasks] for r in records]
        return filled + [[None] * len(tasks)] * (rows - len(filled))

    matrix = table("score", "value")
    further = sorted({m for r in records for m in r["scores"]} - {"score"})
    metrics = PerformanceMatrix(matrix, tasks=tasks).metrics()
    kinds = records[0]["seconds"] if records else {}
    last = records[-1] if records else {}
    routing = [r["routing"] for r in records]
    return {
        "scenario": config.scenario_label,
        "strategy": config.short(config.strategy),
        "label": config.label,
        "model": config.model,
        "seed": config.seed,
        "budget": config.budget,
        "budget_bytes": identity["budget_bytes"],
        "budgeted": identity.get("budgeted", True),
        "tasks": tasks,
        "matrix": matrix,
        "n": table("score", "n"),
        "stderr": table("score", "stderr"),
        "identical": [[t in r["identical"] for t in tasks] for r in records]
        + [[False] * len(tasks)] * (rows - len(records)),
        "metrics": {k: None if v != v else v for k, v in metrics.items()},
        "extra_matrices": {m: table(m, "value") for m in further},
        "general": [ability(r["general"], "score") for r in records],
        "general_packs": [[_value(r["general"], t) for t in tasks] for r in records],
        "kl_to_base": [r.get("kl_to_base") for r in records if r["task"]],
        "pack_bytes": [r["pack_bytes"] for r in records if r["pack_bytes"] is not None],
        "shared_bytes": {name: kept["bytes"] for name, kept in last.get("shared", {}).items()},
        "alive_bytes": [r["alive_bytes"] for r in records if r["task"]],
        "routing": routing,
        "routing_accuracy": _accuracy(tasks, routing, config.task_ids == "inferred"),
        "overhead": [r.get("overhead") for r in records],
        "unlearning": _unlearning(identity.get("unlearns", {}), records),
        "base_bytes": identity["base_bytes"],
        "seconds": {kind: sum(r["seconds"][kind] for r in records) for kind in kinds},
        "spent": sum(r["spent"] for r in records),
        "tokens": sum(r["tokens"] for r in records),
        "peak_memory_mb": max((r["peak_memory_mb"] for r in records), default=None),
        "notes": [note for r in records for note in r.get("notes", [])],
        "options": identity["options"],
        "versions": identity["versions"],
        "code": identity.get("code"),
        "base": identity["base"],
        "machine": identity["machine"],
        "reads_data_dir": identity["reads_data_dir"],
        "config": identity["config"],
        "data": identity["data"],
        "conventions": identity.get("conventions", {}),
        "complete": len(records) == rows,
    }


def _unlearning(
    unlearns: Mapping[str, str], records: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Each experience so far that unlearned a task: its seconds without evaluation, and whether what then answers the
    forgotten task's prompts is the base itself."""
    return [
        {
            "task": r["task"],
            "of": unlearns[r["task"]],
            "seconds": r["seconds"]["train"] + r["seconds"]["compress"],
            "base": not r["active"][unlearns[r["task"]]],
        }
        for r in records
        if r["task"] in unlearns
    ]


def ability(general: Mapping[str, Mapping[str, Any]], metric: str) -> float | None:
    """General ability after an experience: of what answers a prompt of no task, or else the mean over the packs, each
    on alone; None where it was not measured. general: {what answers: {metric: cell}}."""
    whose = [general[""]] if "" in general else list(general.values())
    return sum(cells[metric]["value"] for cells in whose) / len(whose) if whose else None


def _value(general: Mapping[str, Mapping[str, Any]], task: str) -> float | None:
    """General ability with the task's pack on."""
    return general[task]["score"]["value"] if task in general else None


def collect(path: Path) -> dict[str, Any]:
    """The result of the cell in `path`, complete or not. Raises RecordError where its files do not hold one."""
    folder = CellFolder(path)
    cure = "delete the folder to compute the cell anew"
    identity, records = folder.identity(), folder.experiences()
    try:
        result = result_object(identity, records)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        wrong = f"{type(error).__name__}: {error}".split("\n", 1)[0]
        raise RecordError(f"{path} holds records that are not whole ({wrong}); {cure}.") from error
    return _checked(result, path, cure)


def kept(path: Path) -> dict[str, Any] | None:
    """What `collect` found when the cell was complete; None where it is not, or where an earlier version wrote less.

    Raises RecordError for a file that is torn, or that lacks what a report needs.
    """
    folder = CellFolder(path)
    if not folder.complete:
        return None
    folder.identity()  # refuses another version's
    file, cure = path / "result.json", "run the same command again to make it anew"
    try:
        result = read_json(file)
    except RecordError as error:
        raise RecordError(f"{file} cannot be read ({error.__cause__}); {cure}.") from error
    earlier = {"matrix", "routing_accuracy"} if isinstance(result, dict) else set()
    if earlier and earlier <= result.keys() and not {"budgeted", "general_packs"} <= result.keys():
        return None
    return _checked(result, file, cure)


def _checked(result: Any, file: Path, cure: str) -> dict[str, Any]:
    """The result. Raises RecordError where one of its parts is missing, or of another type or size."""
    try:
        Result.model_validate(result)
        rows, tasks = len(result["tasks"]) + 1, len(result["tasks"])
        for name in ("matrix", "n", "stderr", "identical"):
            if [len(row) for row in result[name]] != [tasks] * rows:
                raise RecordError(f"{file}: {name} is not {rows} rows for {tasks} tasks; {cure}.")
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the whole"
        raise RecordError(f"{file}: {place}: {first['msg']}; {cure}.") from error
    return result


def known_states(folder: Path) -> dict[Path, dict[str, Any]]:
    """`record.states`, in which a finished cell whose result cannot be read is `unreadable`, with the reason."""
    known = states(folder)
    for path, state in known.items():
        if state["state"] == "done":
            try:
                kept(path)
            except RecordError as error:
                state |= {"state": "unreadable", "reason": str(error)}
    return known


def _accuracy(
    tasks: Sequence[str], routing: Sequence[Mapping[str, Mapping[str, int]]], inferred: bool
) -> list[float | None]:
    """The share, by experience, of the tasks' test examples so far that were taken for the task that they are of.

    None where nothing was inferred: before the first task, where tasks are given, and where all are answered alike.
    """
    shares: list[float | None] = []
    for learned, counts in enumerate(routing):
        seen = {task: counts.get(task, {}) for task in tasks[:learned]} if inferred else {}
        examples = sum(sum(taken.values()) for taken in seen.values())
        right = sum(taken.get(task, 0) for task, taken in seen.items())
        shares.append(right / examples if examples else None)
    return shares
