"""Where a published table comes from: the command, the versions, the machine and the seeds."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..record import write_text

Cell = Mapping[str, Any]


def write_provenance(cells: Sequence[Cell], folder: Path) -> Path:
    """`folder/provenance.md`, from what the cells themselves recorded when they ran."""
    lines = ["# Provenance", "", "Made by", "", "```", *commands(cells), "```", ""]
    for title, key in (("Versions", "versions"), ("Machine", "machine")):
        lines += [f"## {title}", ""]
        found = {tuple(sorted(c[key].items())) for c in cells}
        for entries in sorted(found, key=str):
            lines += [*(f"- {name}: {value}" for name, value in entries), ""]
    spent = {k: sum(c["seconds"].get(k, 0.0) for c in cells) for k in cells[0]["seconds"]}
    told = ", ".join(f"{kind} {seconds:.0f}" for kind, seconds in spent.items())
    lines += [
        "## Seconds",
        "",
        f"In all cells together: {told}. Training counts for every cell that used it,",
        "",
    ]
    lines[-2] += " shared or not; harness is what was neither training, generating nor compressing."
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
    """`cl-graft sweep` commands that make these cells anew; those that differ in strategy and seed alone share one."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        key = {k: v for k, v in cell["config"].items() if k not in ("strategy", "seed")}
        groups.setdefault(json.dumps(key, sort_keys=True), []).append(cell)
    return [_command(members) for members in groups.values()]


def _command(members: Sequence[Cell]) -> str:
    config = members[0]["config"]
    strategies = ",".join(dict.fromkeys(m["config"]["strategy"] for m in members))
    seeds = ",".join(str(s) for s in sorted({m["seed"] for m in members}))
    return " ".join(
        [
            f"cl-graft sweep --scenarios {config['scenario']} --strategies {strategies}",
            f"--seeds {seeds} --models {config['model']} --budgets {config['budget']}",
            *(["--data-dir DATA"] if members[0]["reads_data_dir"] else []),
            *(f"--train-on {task}={folder}" for task, folder in config["train_on"].items()),
            *sorted(
                f"--set {owner}.{option}={_word(value)}"
                for owner, options in config["options"].items()
                for option, value in options.items()
            ),
            "--allow-code-execution",
        ]
    )


def _word(value: Any) -> str:
    """A value as `--set` reads it, as a shell passes it on."""
    return shlex.quote(value if isinstance(value, str) else json.dumps(value))
