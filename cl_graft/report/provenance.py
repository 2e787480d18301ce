"""Where a published table comes from: the command, the versions, the machine and the seeds."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from cl_graft.config import Axes, RunConfig, Settings, Tuned, several
from cl_graft.report.aggregate import KINDS, groups, scored_by
from cl_graft.report.protocols import Cell
from cl_graft.store.files import write_text


def write_provenance(cells: Sequence[Cell], folder: Path) -> Path:
    """`folder/provenance.md`, from what the cells themselves recorded when they ran."""
    lines = ["# Provenance", "", "Made by", "", "```", *commands(cells), "```", ""]
    for title, key in (("Versions", "versions"), ("Machine", "machine")):
        lines += [f"## {title}", ""]
        values = {tuple(sorted(c[key].items())) for c in cells}
        for entries in sorted(values, key=str):
            lines += [*(f"- {name}: {value}" for name, value in entries), ""]
    bases = Counter((c["config"]["model"], c["base"]) for c in cells)
    lines += [
        "## Base",
        "",
        "The fingerprint of the weights; an embedded model that is trained at its first use differs by processor.",
        "",
    ]
    lines += [
        f"- {model}: {base} ({count} cell{'s' * (count > 1)})"
        for (model, base), count in sorted(bases.items())
    ]
    lines += ["", "## Tuning", "", *tuning(cells), ""]
    scored = {title: scored_by(members).strip() for title, members in groups(cells).items()}
    lines += (
        ["## Scorers", "", *(f"- {t}: {s}" for t, s in scored.items() if s), ""]
        if any(scored.values())
        else []
    )
    spent = {kind: sum((c["seconds"] or {}).get(kind, 0.0) for c in cells) for kind in KINDS}
    told = ", ".join(f"{kind} {seconds:.0f}" for kind, seconds in spent.items())
    lines += [
        "## Seconds",
        "",
        f"In all cells together: {told}. Training counts for every cell that used it, shared or not; harness is what "
        "was neither training, generating nor compressing.",
        "",
    ]
    lines += ["## Cells", "", "| cell | seed | complete | seconds |", "|:--|--:|--:|--:|"]
    for c in cells:
        name = f"{c['scenario']} · {c['label']} · {c['model']} · {c['budget']}"
        lines.append(
            f"| {name} | {c['seed']} | {c['complete']} | {sum(c['seconds'].values()):.0f} |"
        )
    path = folder / "provenance.md"
    write_text(path, "\n".join(lines) + "\n")
    return path


def tuning(cells: Sequence[Cell]) -> list[str]:
    """A line for every cell's preset: what it sets, and by which protocol that was found; and who was not tuned."""
    found: dict[str, str] = {}
    for cell in cells:
        tuned = Tuned(**(cell["config"].get("tuned") or {}))
        values = ", ".join(f"{name}={value}" for name, value in tuned.values.items())
        name = f"{cell['scenario']} · {cell['label']} · {cell['model']} · {cell['budget']}"
        if tuned.protocol:
            found[name] = f"- {name}: {values}; {tuned.protocol}"
    without = sorted({c["label"] for c in cells if not c["config"].get("tuned")})
    told = f"- Not tuned, but for what their names say: {', '.join(without)}"
    return [*found.values(), *([told] if without else [])]


def commands(cells: Sequence[Cell]) -> list[str]:
    """`cl-graft sweep` and `tune` commands that make these cells anew; those that differ in strategy and seed, or in
    what is tuned, share one.

    Each for a shell, every word quoted that needs it; DATA stands for the folder of --data-dir. What options cannot
    say, the command says in a sweep file that it writes first.
    """
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        key = {k: v for k, v in cell["config"].items() if k not in ("strategy", "seed", "tuned")}
        key["first"] = _first(cell)
        groups.setdefault(json.dumps(key, sort_keys=True), []).append(cell)
    return [_command(members) for members in groups.values()]


def _command(members: Sequence[Cell]) -> str:
    further = ["--data-dir", "DATA"] if members[0]["reads_data_dir"] else []
    further.append("--allow-code-execution")
    told, words = _fields(members), ["cl-graft", "sweep"]
    if first := _first(members[0]):
        trials = max(Counter(m["config"]["strategy"] for m in members).values())
        words = ["cl-graft", "tune", "--trials", str(trials), "--first", str(first)]
        words += ["--seed", str(told.pop("seeds")[0])]
    lists = [name for value in told.values() if isinstance(value, list) for name in value]
    if any("," in str(name) for name in lists):
        text = yaml.safe_dump(_with_options(told, members), sort_keys=False, allow_unicode=True)
        return (
            f"cat > sweep.yaml <<'END'\n{text}END\n{shlex.join([*words, 'sweep.yaml', *further])}"
        )
    for name, value in told.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, dict):
            words += [word for key, part in value.items() for word in (flag, f"{key}={part}")]
        else:
            words += [flag, ",".join(map(str, value)) if isinstance(value, list) else str(value)]
    for owner, options in sorted(members[0]["config"]["options"].items()):
        for option, value in sorted(options.items()):
            words += ["--set", f"{owner}.{option}={_value(value)}"]
    return shlex.join([*words, *further])


def _first(cell: Cell) -> int:
    """Number of tasks that a trial of `cl-graft tune` learns; of any other cell 0."""
    return (cell["config"].get("tuned") or {}).get("first", 0)


def _fields(members: Sequence[Cell]) -> dict[str, Any]:
    """The fields of a sweep that make these cells, but for their options: the axes, and others that were set."""
    config = members[0]["config"]
    values = {name: [config[name]] for name in Axes.model_fields if name in config}
    values["strategy"] = list(dict.fromkeys(m["config"]["strategy"] for m in members))
    values["seed"] = sorted({m["seed"] for m in members})
    fields: dict[str, Any] = {several(name): value for name, value in values.items()}
    for name, field in Settings.model_fields.items():
        if config.get(name, field.default) != field.default:
            fields[name] = config[name]
    return fields


def _with_options(told: Mapping[str, Any], members: Sequence[Cell]) -> dict[str, Any]:
    """The fields with the options of scenarios and strategies in their entries."""
    options = members[0]["config"]["options"]

    def entry(name: str) -> Any:
        own = options.get(RunConfig.short(name))
        return {name: own} if own else name

    kinds = ("scenarios", "strategies")
    return {k: [*map(entry, v)] if k in kinds else v for k, v in told.items()}


def _value(value: Any) -> str:
    """A value as `--set` reads it."""
    return value if isinstance(value, str) else json.dumps(value)
