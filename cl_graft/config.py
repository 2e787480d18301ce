"""What a run is: frozen, validated, serialisable data. Nothing in it executes."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

WandbMode = Literal["auto", "offline", "online", "off"]
Track = Literal["tensorboard", "csv"]
PLAIN = re.compile(r"[A-Za-z0-9.-]+(_[A-Za-z0-9.-]+)*")  # what a folder's name shows as it is


class Launch(BaseModel):
    """How training stages are run: in this process, or each as a job of several processes under DeepSpeed.

    The batch of a recipe is held whatever these say; how sums are ordered, and so the last digits, may differ.

    processes: of the whole job, a device each; 0 trains in this process.
    zero: 2 shares optimizer states and gradients out between the processes, 3 the parameters, too.
    offload: optimizer states stay in the host's memory. hostfile: DeepSpeed's list of nodes, `host slots=8` a line.
    micro_batch: examples that a process takes at a time; None takes its whole share of the batch.
    checkpointing: activations are computed again for the gradient, which takes time and saves memory.
    save_steps: a stage that is killed loses at most so many steps; None is a fifth of it, at least 50.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    processes: int = Field(default=0, ge=0)
    zero: int = Field(default=2, ge=2, le=3)
    offload: bool = False
    hostfile: Path | None = None
    micro_batch: int | None = Field(default=None, ge=1)
    checkpointing: bool = False
    save_steps: int | None = Field(default=None, ge=1)


class RunConfig(BaseModel):
    """One cell: scenario x strategy x model x seed x budget, with options.

    options: {scenario or strategy name: {option: value}}. scorers: {scorer of the scenario's tasks: {option: value}},
    over the options that the scenario gives it. train_on: {task: folder made by `cl-graft transfer build`},
    whose answers and pairs take the place of the task's own training data. The fields from `data_dir` on say where
    and how the cell is run, and do not change its result. mirror: an fsspec URL that keeps a copy of the cell and of
    the stages it trains, from which another machine goes on. track: what beside W&B follows the cell.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    scenario: str
    strategy: str
    model: str = "mini-llama"
    seed: int = 0
    budget: str = "10%"
    options: dict[str, dict[str, Any]] = {}
    scorers: dict[str, dict[str, Any]] = {}
    threads: int = 1
    train_on: dict[str, Path] = {}

    data_dir: Path | None = None
    out: Path = Path("results")
    cache: Path | None = None
    mirror: str | None = None
    launch: Launch = Launch()
    wandb: WandbMode = "auto"
    track: list[Track] = []
    allow_code_execution: bool = False

    @property
    def store(self) -> Path:
        """Where finished training stages and evaluations are kept for other cells: `cache`, or a folder of `out`."""
        return self.cache or self.out / "cache"

    @staticmethod
    def short(name: str) -> str:
        """A plugin's name; for a plugin given as a file, the file's stem."""
        return Path(name).stem if name.endswith(".py") else name

    @property
    def label(self) -> str:
        """The strategy with the options that were set, and what else tells its cells apart, as tables show it."""
        more: dict[str, Any] = {
            f"train_on.{task}": folder for task, folder in self.train_on.items()
        }
        if self.threads != 1:
            more["threads"] = self.threads
        return self._with_options(self.short(self.strategy), more)

    @property
    def scenario_label(self) -> str:
        """The scenario with the options that were set, those of scorers included."""
        of_scorers = {
            f"{name}.{option}": value
            for name, options in self.scorers.items()
            for option, value in options.items()
        }
        return self._with_options(self.short(self.scenario), of_scorers)

    def _with_options(self, name: str, more: dict[str, Any]) -> str:
        told = [*sorted(self.options.get(name, {}).items()), *sorted(more.items())]
        return f"{name}({', '.join(f'{k}={v}' for k, v in told)})" if told else name

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
        if self.train_on:
            told.append({task: str(folder) for task, folder in self.train_on.items()})
        if self.scorers:
            told.append({"scorers": self.scorers})
        names = [self.scenario, self.strategy, self.model]
        if [*readable, model] != names or not all(map(PLAIN.fullmatch, names)):
            told.append(names)
        if told != [{}, 1]:
            text = json.dumps(told, sort_keys=True)
            parts.insert(2, hashlib.blake2b(text.encode(), digest_size=4).hexdigest())
        return "__".join(parts)
