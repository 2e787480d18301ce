"""Options that `cl-graft tune` found: a file of plain data for each scenario and model, with how they were found."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cl_graft.config import Frozen, RunConfig, Tuned
from cl_graft.errors import CLGraftError
from cl_graft.store.files import RecordError, read_json, write_json
from cl_graft.store.locks import locked

PUBLISHED = "tuned"  # the preset that comes with CL-Graft
FORMAT = 1
PACKAGE = Path(__file__).parent


class Trial(Frozen):
    """What was tried, and what came of it.

    score: mean over the tasks of their primary scorer on their validation after the last of them; None where the trial
    failed. stderr: over validation examples. bits: bits per byte of the references there, by which equals are told
    apart. cell: its folder's name. failed: the reason.
    """

    options: dict[str, Any]
    learning_rate_scale: float
    score: float | None = None
    stderr: float | None = None
    bits: float | None = None
    cell: str = ""
    failed: str = ""

    @property
    def values(self) -> dict[str, Any]:
        """All that is tuned, by name."""
        return {"learning_rate_scale": self.learning_rate_scale, **self.options}


class Preset(Frozen):
    """What tuning chose for a strategy with its given options, under a budget, on a scenario from a model.

    given: options that were set and so not tuned. data: what else makes the scenario's training data and scores what
    they are, as `data_of`. budget: None for a method that has none. edges: what was chosen at an end of its range.
    about: versions, code, machine, sources, and fingerprints of the base and the data.
    """

    strategy: str
    given: dict[str, Any] = {}
    scenario: str
    data: dict[str, Any] = {}
    model: str
    budget: str | None = None
    tasks: list[str]
    seed: int
    options: dict[str, Any]
    learning_rate_scale: float
    edges: list[str] = []
    trials: list[Trial]
    about: dict[str, Any] = {}

    @property
    def tuned(self) -> Tuned:
        """What a cell takes of it."""
        count = f"{len(self.trials)} trial{'s' * (len(self.trials) > 1)}"
        return Tuned(
            options=self.options,
            learning_rate_scale=self.learning_rate_scale,
            protocol=f"{count} of {' and '.join(self.tried)}, by the mean score on the validation of "
            f"{' and '.join(self.tasks)}, seed {self.seed}",
        )

    @property
    def tried(self) -> list[str]:
        """Names of what the trials differ in: the learning rate, and the option that was tuned, if there is one."""
        return ["learning_rate_scale", *self.options]

    @property
    def key(self) -> str:
        """What tells presets of one file apart."""
        told = [self.strategy, self.given, self.data, self.budget]
        return json.dumps(told, sort_keys=True)


def applied(config: RunConfig) -> RunConfig:
    """The cell with what its preset says of it, if it names one. Raises CLGraftError where that says nothing of it."""
    if config.preset is None or config.tuned:
        return config
    file = file_of(folder_of(config.preset), config.scenario, config.model)
    for preset in read(file):
        if _fits(preset, config):
            return config.model_copy(update={"tuned": preset.tuned})
    label = config.model_copy(update={"preset": None}).label
    raise CLGraftError(
        f"no preset of {label} on {config.scenario_label} from {config.model} under {config.budget} is in "
        f"{file}; make one by `{command(config)}`, and give --preset FOLDER."
    )


def _fits(preset: Preset, config: RunConfig) -> bool:
    strategy = config.short(config.strategy)
    return (
        (preset.strategy, preset.scenario, preset.model)
        == (strategy, config.short(config.scenario), config.model)
        and preset.given == config.options.get(strategy, {})
        and preset.data == data_of(config)
        and preset.budget in (None, config.budget)
    )


def data_of(config: RunConfig) -> dict[str, Any]:
    """What decides the training data of a cell and how it is scored, beside scenario and seed, where it was set."""
    told = {
        "options": config.options.get(config.short(config.scenario), {}),
        "train_on": {task: str(folder) for task, folder in config.train_on.items()},
        "scoring": config.scoring,
    }
    return {name: value for name, value in told.items() if value}


def command(config: RunConfig) -> str:
    """The command that tunes a cell's strategy, for a shell."""
    words = ["cl-graft", "tune", "--scenarios", config.scenario, "--strategies", config.strategy]
    words += ["--models", config.model, "--budgets", config.budget, "--out", "FOLDER"]
    sets = {f"{owner}.{k}": v for owner, own in config.options.items() for k, v in own.items()}
    for name, value in {**sets, **config.scoring}.items():
        told = value if isinstance(value, str) else json.dumps(value)
        words += ["--set", f"{name}={told}"]
    for task, folder in config.train_on.items():
        words += ["--train-on", f"{task}={folder}"]
    return shlex.join(words)


def folder_of(name: str) -> Path:
    """The folder of a preset's files. Raises CLGraftError for a name that is neither `tuned` nor a folder."""
    if name == PUBLISHED:
        return PACKAGE / PUBLISHED
    if not Path(name).is_dir():
        raise CLGraftError(
            f"there is no preset {name!r}; give {PUBLISHED}, or the folder that --out of `cl-graft tune` named."
        )
    return Path(name)


def file_of(folder: Path, scenario: str, model: str) -> Path:
    """The file of the presets for a scenario and a model."""
    names = (RunConfig.short(scenario), model)
    return folder / f"{'__'.join(re.sub(r'[^A-Za-z0-9.]+', '-', n).strip('-') for n in names)}.json"


def read(file: Path) -> list[Preset]:
    """The presets of a file; none where it is not there. Raises RecordError where it holds something else."""
    if not file.is_file():
        return []
    try:
        held = read_json(file)
        if held["format"] != FORMAT:
            raise RecordError(
                f"{file} holds presets of format {held['format']}, not {FORMAT}; tune again into another folder."
            )
        return [Preset(**preset) for preset in held["presets"]]
    except RecordError:
        raise
    except (ValidationError, KeyError, TypeError) as error:
        wrong = f"{type(error).__name__}: {error}".split("\n", 1)[0]
        raise RecordError(
            f"{file} holds no presets ({wrong}); tune again into another folder."
        ) from error


def keep(presets: Sequence[Preset], folder: Path) -> list[Path]:
    """Write presets into their files, each in the place of the one that it supersedes; returns the files."""
    files: dict[Path, dict[str, Preset]] = {}
    for preset in presets:
        file = file_of(folder, preset.scenario, preset.model)
        files.setdefault(file, {})[preset.key] = preset
    for file, new in files.items():
        with locked(file):
            write_json(file, _held({**{p.key: p for p in read(file)}, **new}))
    return [*files]


def _held(presets: Mapping[str, Preset]) -> dict[str, Any]:
    told = [preset.model_dump(mode="json") for _, preset in sorted(presets.items())]
    return {"format": FORMAT, "presets": told}
