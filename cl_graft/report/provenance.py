"""Where a published table comes from: the command, the versions, the machine and the seeds."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from cl_graft.config import RunConfig
from cl_graft.report.aggregate import KINDS, Cell
from cl_graft.store.files import write_text


def write_provenance(cells: Sequence[Cell], folder: Path) -> Path:
    """`folder/provenance.md`, from what the cells themselves recorded when they ran."""
    lines = ["# Provenance", "", "Made by", "", "```", *commands(cells), "```", ""]
    for title, key in (("Versions", "versions"), ("Machine", "machine")):
        lines += [f"## {title}", ""]
        found = {tuple(sorted(c[key].items())) for c in cells}
        for entries in sorted(found, key=str):
            lines += [*(f"- {name}: {value}" for name, value in entries), ""]
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


def commands(cells: Sequence[Cell]) -> list[str]:
    """`cl-graft sweep` commands that make these cells anew; those that differ in strategy and seed alone share one.

    Each for a shell, every word quoted that needs it; DATA stands for the folder of --data-dir. What options cannot
    say, the command says in a sweep file that it writes first.
    """
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        key = {k: v for k, v in cell["config"].items() if k not in ("strategy", "seed")}
        groups.setdefault(json.dumps(key, sort_keys=True), []).append(cell)
    return [_command(members) for members in groups.values()]


def _command(members: Sequence[Cell]) -> str:
    config = members[0]["config"]
    strategies = list(dict.fromkeys(m["config"]["strategy"] for m in members))
    seeds = sorted({m["seed"] for m in members})
    further = ["--data-dir", "DATA"] if members[0]["reads_data_dir"] else []
    further.append("--allow-code-execution")
    lists = [config["scenario"], config["model"], config["budget"], *strategies]
    if config["threads"] != 1 or any("," in name for name in lists):
        told = _file(config, strategies, seeds)
        return f"cat > sweep.yaml <<'END'\n{told}END\n{shlex.join(['cl-graft', 'sweep', 'sweep.yaml', *further])}"
    words = ["cl-graft", "sweep", "--scenarios", config["scenario"]]
    words += ["--strategies", ",".join(strategies), "--seeds", ",".join(map(str, seeds))]
    words += ["--models", config["model"], "--budgets", config["budget"]]
    for task, folder in config["train_on"].items():
        words += ["--train-on", f"{task}={folder}"]
    for owner, options in sorted({**config["options"], **config["scorers"]}.items()):
        for option, value in sorted(options.items()):
            words += ["--set", f"{owner}.{option}={_value(value)}"]
    return shlex.join([*words, *further])


def _file(config: Mapping[str, Any], strategies: Sequence[str], seeds: Sequence[int]) -> str:
    """The sweep file of these cells."""

    def entry(name: str) -> Any:
        options = config["options"].get(RunConfig.short(name))
        return {name: options} if options else name

    told = {
        "scenarios": [entry(config["scenario"])],
        "strategies": [entry(name) for name in strategies],
        "models": [config["model"]],
        "seeds": list(seeds),
        "budgets": [config["budget"]],
        **({"scorers": config["scorers"]} if config["scorers"] else {}),
        **({"train_on": dict(config["train_on"])} if config["train_on"] else {}),
        **({"threads": config["threads"]} if config["threads"] != 1 else {}),
    }
    return yaml.safe_dump(told, sort_keys=False, allow_unicode=True)


def _value(value: Any) -> str:
    """As `--set` reads it."""
    return value if isinstance(value, str) else json.dumps(value)
