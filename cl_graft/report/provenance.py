"""Where a published table comes from: the command, the versions, the machine and the seeds."""

from __future__ import annotations

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
    """One `cl-graft sweep` a scenario, model, data and budget, that makes these cells anew."""
    groups: dict[tuple[str, ...], list[Cell]] = {}
    for cell in cells:
        trained_on = [f"--train-on {t}={f}" for t, f in cell["config"]["train_on"].items()]
        key = (cell["scenario"], cell["model"], cell["budget"], *trained_on)
        groups.setdefault(key, []).append(cell)
    found = []
    for (_, model, budget, *trained_on), members in groups.items():
        config = members[0]["config"]
        sets = sorted(
            f"--set {owner}.{option}={value}"
            for owner, options in config["options"].items()
            for option, value in options.items()
        )
        strategies = ",".join(dict.fromkeys(m["config"]["strategy"] for m in members))
        seeds = ",".join(str(s) for s in sorted({m["seed"] for m in members}))
        data = ["--data-dir DATA"] if members[0]["reads_data_dir"] else []
        parts = [
            f"cl-graft sweep --scenarios {config['scenario']} --strategies {strategies}",
            f"--seeds {seeds} --models {model} --budgets {budget}",
            *data,
            *trained_on,
            *sets,
            "--allow-code-execution",
        ]
        found.append(" ".join(parts))
    return found
