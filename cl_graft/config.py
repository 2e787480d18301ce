"""What a run is: frozen, validated, serialisable data. Nothing in it executes."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

WandbMode = Literal["auto", "offline", "online", "off"]
PLAIN = re.compile(r"[A-Za-z0-9.-]+(_[A-Za-z0-9.-]+)*")  # what a folder's name shows as it is


class RunConfig(BaseModel):
    """One cell: scenario x strategy x model x seed x budget, with options.

    options: {scenario or strategy name: {option: value}}. The last five fields say where and how the cell is
    run, and do not change its result.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    scenario: str
    strategy: str
    model: str = "mini-llama"
    seed: int = 0
    budget: str = "10%"
    options: dict[str, dict[str, Any]] = {}
    threads: int = 1

    data_dir: Path | None = None
    out: Path = Path("results")
    wandb: WandbMode = "auto"
    allow_code_execution: bool = False

    def short(self, name: str) -> str:
        """A plugin's name; for a plugin given as a file, the file's stem."""
        return Path(name).stem if name.endswith(".py") else name

    @property
    def label(self) -> str:
        """The strategy with the options that were set, as tables show it."""
        return self._with_options(self.short(self.strategy))

    @property
    def scenario_label(self) -> str:
        """The scenario with the options that were set."""
        return self._with_options(self.short(self.scenario))

    def _with_options(self, name: str) -> str:
        chosen = ", ".join(f"{k}={v}" for k, v in sorted(self.options.get(name, {}).items()))
        return f"{name}({chosen})" if chosen else name

    @property
    def cell(self) -> str:
        """Folder name, the same for the same experiment and different for different ones.

        What cannot be told from names made of letters, digits, `-`, `.` and single `_` is told by a digest.
        """
        scenario, strategy = self.short(self.scenario), self.short(self.strategy)
        model = re.sub(r"[^A-Za-z0-9.]+", "-", self.model).strip("-")
        budget = re.sub(r"[^A-Za-z0-9.]+", "pct", self.budget, count=1)
        readable = [re.sub(r"[^A-Za-z0-9._-]+", "-", name) for name in (scenario, strategy)]
        parts = [*readable, model, budget, f"seed{self.seed}"]
        relevant = {k: v for k, v in self.options.items() if k in (scenario, strategy) and v}
        told: list[Any] = [relevant, self.threads]
        names = [self.scenario, self.strategy, self.model]
        if [*readable, model] != names or not all(map(PLAIN.fullmatch, names)):
            told.append(names)
        if told != [{}, 1]:
            text = json.dumps(told, sort_keys=True)
            parts.insert(2, hashlib.blake2b(text.encode(), digest_size=4).hexdigest())
        return "__".join(parts)
