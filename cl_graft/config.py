"""What a run is: frozen, validated, serialisable data. Nothing in it executes.

A field is declared here, once, and the class that declares it says where it belongs: `Axes`, `Settings` or
`Whereabouts`. Sweeps, the options of commands, the names of cells, the file that `cl-graft init` writes and the
documentation are made from these declarations. `description` is the help, `examples` what a sweep file shows where the
default tells nothing, `title` what a wrong value is called, and `when` in `json_schema_extra` the values of other
fields without which a field decides nothing.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from pkgutil import iter_modules
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic.fields import FieldInfo

from cl_graft.errors import UnknownName

PLAIN = re.compile(r"[A-Za-z0-9.-]+(_[A-Za-z0-9.-]+)*")  # what a folder's name shows as it is
# Told by every cell. A field that came later is told where it is set, so that the cells before it keep their names.
FIRST = ("scenario", "strategy", "model", "seed", "budget", "options", "threads", "train_on")
SOURCES = (".py", ".yaml", ".yml")  # what the file of a plug-in of the user's may be called
HINT = 40  # characters of a folder's name that say of which options it is
CELL = ("options", "tuned")  # fields of a cell that a sweep says in other ways
SHOWN = ("scenario", "strategy", "model", "seed", "budget")  # each has a part of a cell's name


@dataclass(frozen=True)
class ModuleOf:
    """Checks the name of a module of a package, which is how trackers and executors are found.

    besides: modules that are chosen in another way. Raises UnknownName with the nearest names.
    """

    package: str
    what: str
    besides: tuple[str, ...] = ()

    def names(self) -> list[str]:
        spec = find_spec(self.package)
        modules = iter_modules(spec.submodule_search_locations if spec else None)
        return sorted({module.name for module in modules} - {*self.besides})

    def __call__(self, name: str) -> str:
        if name not in self.names():
            raise UnknownName(self.what, name, self.names())
        return name


def listed(value: Any) -> Any:
    """The value in a list, if it is a single one."""
    return [value] if isinstance(value, str | int | float | dict) else value


def off(value: Any) -> Any:
    """The word that YAML reads as false, as in `wandb: off`."""
    return "off" if value is False else value


def _values(value: Any) -> Any:
    """The values of {name: value} that are written as JSON, read; others are words."""
    return {k: json_or_word(v) for k, v in value.items()} if isinstance(value, dict) else value


def json_or_word(text: Any) -> Any:
    """The value that a text is in JSON, or else the text; NaN and infinities are words."""
    if not isinstance(text, str):
        return text
    try:
        return json.loads(text, parse_constant=_no_number)
    except (ValueError, RecursionError):
        return text


MEMORY = re.compile(r"\d+(\.\d+)?[KMG]i?B", re.IGNORECASE)


def _memory(value: Any) -> Any:
    """{GPU's number or cpu: bytes}, as text, where it is written so."""
    if not isinstance(value, dict):
        return value
    told = {str(name).lower(): str(size) for name, size in value.items()}
    for name, size in told.items():
        if not (name.isdecimal() or name == "cpu"):
            raise ValueError(f"{name!r} is no device; write a GPU's number, as 0, or cpu")
        if not (size.isdecimal() or MEMORY.fullmatch(size)):
            raise ValueError(f"{size!r} is no memory of device {name}; write bytes, as 70GiB")
    return told


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is a word here")


WandbMode = Literal["auto", "offline", "online", "off"]
Tracker = Annotated[str, AfterValidator(ModuleOf("cl_graft.tracking", "tracker", ("wandb",)))]
Executor = Annotated[str, AfterValidator(ModuleOf("cl_graft.experiment.executors", "executor"))]


class Frozen(BaseModel):
    """A record that is never changed and has no other fields."""

    # built when it is first used, which `--help` does not wait for
    model_config = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), defer_build=True
    )


class Launch(Frozen):
    """How training stages are run: in this process, or each as a job of several processes under DeepSpeed.

    The batch of a recipe is held whatever these say; how sums are ordered, and so the last digits, may differ.
    """

    processes: int = Field(
        default=0,
        ge=0,
        description="Of each training job, a device each; 0 trains in the cell's process.",
    )
    zero: int = Field(
        default=2,
        ge=2,
        le=3,
        description="2 shares out optimizer states and gradients, 3 parameters, too.",
    )
    offload: bool = Field(default=False, description="Optimizer states stay in the host's memory.")
    hostfile: Path | None = Field(
        default=None, description="DeepSpeed's list of nodes, a line `host slots=8` each."
    )
    micro_batch: int | None = Field(
        default=None,
        ge=1,
        description="Examples that a process takes at a time; else its whole share.",
    )
    checkpointing: bool = Field(
        default=False,
        description="Activations are computed again for the gradient: less memory, more time.",
    )
    save_steps: int | None = Field(
        default=None,
        ge=1,
        description="Steps between two checkpoints of a stage; else a fifth of it, at least 50.",
    )


class Tuned(Frozen):
    """What a preset sets in a cell, or what a trial of `cl-graft tune` tries.

    options: of the strategy, below those that were given. learning_rate_scale: times the learning rates of recipes.
    protocol: of a preset, how the two were found. first: of a trial, how many tasks of the stream it learns, on whose
    validation it is scored; 0 is no trial.
    """

    options: dict[str, Any] = {}
    learning_rate_scale: float = Field(default=1.0, gt=0)
    protocol: str = ""
    first: int = Field(default=0, ge=0)

    @property
    def values(self) -> dict[str, Any]:
        """All that was tuned, by name."""
        return {"learning_rate_scale": self.learning_rate_scale, **self.options}


class Axes(Frozen):
    """What decides a cell's result and is a list in a sweep, whose cells are all combinations."""

    scenario: str = Field(description="Name, or path of a .py or .yaml file.")
    strategy: str = Field(description="Name, or path of a .py file.")
    model: str = Field(
        default="mini-llama", description="Embedded model's name, local folder, or hub id."
    )
    seed: int = Field(default=0, description="Of the data and the training.")
    budget: str = Field(
        default="10%",
        description="Storage per task: a share of the base model, or bytes, as 800MB.",
    )
    task_ids: Literal["given", "inferred"] = Field(
        default="given", description="Whether a prompt's task is told, or inferred from the prompt."
    )


class Settings(Frozen):
    """What decides a cell's result and is the same for all cells of a sweep."""

    threads: int = Field(
        default=1, ge=1, description="Of each cell, on a CPU; they determine the last digits."
    )
    train_on: dict[str, Path] = Field(
        default={},
        description="TASK=FOLDER that `cl-graft transfer build` made, for its training data; {seed} is the cell's.",
        examples=[{"math": "data/math"}],
    )
    scoring: Annotated[dict[str, Any], BeforeValidator(_values)] = Field(
        default={},
        description="SCORER.OPTION=VALUE, over the options that the scenario gives its scorers.",
        examples=[{"number.tolerance": 0.01}],
    )
    general: Annotated[list[str], BeforeValidator(listed)] = Field(
        default=[],
        title="task of lm-eval",
        description="General ability by tasks of lm-eval: NAME or FILE.yaml, as hellaswag:acc_norm@200.",
        examples=[["gsm8k", "hellaswag:acc_norm@200", "tasks/mine.yaml"]],
    )
    router: str = Field(
        default="ridge",
        description="Name, or path of a .py file, of what infers the task where task_ids is inferred.",
        json_schema_extra={"when": {"task_ids": "inferred"}},
    )
    router_options: Annotated[dict[str, Any], BeforeValidator(_values)] = Field(
        default={},
        description="OPTION=VALUE of the router.",
        examples=[{"regularisation": 0.01}],
        json_schema_extra={"when": {"task_ids": "inferred"}},
    )
    router_top_k: int = Field(
        default=1,
        ge=1,
        description="Packs that answer a prompt: the likeliest, as many as there are.",
        json_schema_extra={"when": {"task_ids": "inferred"}},
    )
    router_combine: Literal["ensemble", "merge"] = Field(
        default="ensemble",
        description="How several packs answer: mean probabilities of a pass each, or one weighted merge.",
        json_schema_extra={"when": {"task_ids": "inferred"}},
    )
    router_reject: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Share of the tasks' own prompts that may go to the base, as out-of-stream ones do; 0: none.",
        json_schema_extra={"when": {"task_ids": "inferred"}},
    )

    engine: str = Field(default="hf", description="Answers at test: hf, vllm, or a server's URL.")
    preset: str | None = Field(
        default=None,
        description="Options found by `cl-graft tune`: tuned, those published here, or the folder of yours.",
        examples=["tuned"],
    )


class Whereabouts(Frozen):
    """Where and how a cell is run, which does not change its result."""

    data_dir: Path | None = Field(
        default=None,
        description="Folder with the data sets that the scenario reads.",
        examples=["data"],
    )
    out: Path = Field(default=Path("results"), description="Folder that results are written into.")
    cache: Path | None = Field(
        default=None,
        description="Folder of finished stages and evaluations to share; else OUT/cache.",
        examples=["/shared/cache"],
    )
    mirror: str | None = Field(
        default=None,
        description="fsspec URL that keeps a copy, from which another machine goes on: s3://…",
        examples=["s3://bucket/sweep"],
    )
    launch: Launch = Field(
        default=Launch(),
        description="How stages train: here, or each as a DeepSpeed job of several processes.",
        examples=[{"processes": 8, "zero": 3}],
    )
    max_memory: Annotated[dict[str, str], BeforeValidator(_memory)] = Field(
        default={},
        description="DEVICE=BYTES, as 0=70GiB or cpu=100GiB, of a model spread over devices; else what is free.",
        examples=[{"0": "70GiB", "cpu": "100GiB"}],
    )
    wandb: Annotated[WandbMode, BeforeValidator(off)] = Field(
        default="auto",
        title="W&B mode",
        description="Weights & Biases; auto is offline unless somebody is logged in.",
    )
    track: Annotated[list[Tracker], BeforeValidator(listed)] = Field(
        default=[],
        title="tracker",
        description="Trackers beside W&B, in each cell's folder.",
        examples=[["tensorboard", "csv"]],
    )
    allow_code_execution: bool = Field(
        default=False, description="Run programs that the model wrote, in the sandbox."
    )


class RunConfig(Whereabouts, Settings, Axes):
    """One cell: scenario x strategy x model x seed x budget, with options.

    options: {scenario or strategy name: {option: value}}. tuned: what the preset says of this cell.
    """

    options: dict[str, dict[str, Any]] = {}
    tuned: Tuned | None = None

    @property
    def store(self) -> Path:
        """Where finished training stages and evaluations are kept for other cells: `cache`, or a folder of `out`."""
        return self.cache or self.out / "cache"

    @property
    def trained_on(self) -> dict[str, Path]:
        """{task: folder} of `train_on`, with the cell's seed in the place of `{seed}`."""
        told = {task: str(folder) for task, folder in self.train_on.items()}
        return {
            task: Path(folder.replace("{seed}", str(self.seed))) for task, folder in told.items()
        }

    @staticmethod
    def short(name: str) -> str:
        """A plugin's name; for a plugin given as a file, the file's stem."""
        return Path(name).stem if name.endswith(SOURCES) else name

    def experiment(self) -> dict[str, Any]:
        """The fields that decide the result, as JSON holds them."""
        tuned = {"tuned"} if self.tuned else set()
        return self.model_dump(mode="json", include={*FIRST, *self._set(), *tuned})

    def _set(self) -> dict[str, Any]:
        """The fields that decide the result, differ from their defaults, and have no part of a cell's name."""
        changed = {}
        for name, field in {**Axes.model_fields, **Settings.model_fields}.items():
            value = getattr(self, name)
            tells = all(getattr(self, k) == v for k, v in _extra(field).get("when", {}).items())
            if name not in SHOWN and value != field.default and tells:
                changed[name] = value
        return changed

    @property
    def scorers(self) -> dict[str, dict[str, Any]]:
        """{scorer: {option: value}} of `scoring`."""
        options: dict[str, dict[str, Any]] = {}
        for told, value in self.scoring.items():
            scorer, _, option = told.rpartition(".")
            options.setdefault(scorer, {})[option] = value
        return options

    @property
    def label(self) -> str:
        """The strategy with the options that were set, and what else tells its cells apart, as tables show it."""
        more: dict[str, Any] = {}
        for name, value in self._set().items():
            if name == "general":  # what is measured, not by what
                continue
            if name == "train_on":
                value = _together(self.train_on)
            elif name == "preset":
                value = Path(value).name
            several = value if isinstance(value, dict) else {"": value}
            more |= {f"{name}.{key}".rstrip("."): part for key, part in several.items()}
        if self.tuned and self.tuned.first:
            more |= self.tuned.values
        return self._with_options(self.short(self.strategy), more)

    @property
    def scenario_label(self) -> str:
        """The scenario with the options that were set; of a trial, what of it that is scored on."""
        measured = {"general": ",".join(self.general)} if self.general else {}
        told = self._with_options(self.short(self.scenario), measured)
        first = self.tuned.first if self.tuned else 0
        return f"{told}, validation of the first {first}" if first else told

    def _with_options(self, name: str, more: dict[str, Any]) -> str:
        told = [*sorted(self.options.get(name, {}).items()), *sorted(more.items())]
        return f"{name}({', '.join(f'{k}={v}' for k, v in told)})" if told else name

    @property
    def cell(self) -> str:
        """Folder name, the same for the same experiment and different for different ones.

        What cannot be told from names made of letters, digits, `-`, `.` and single `_` is told by a digest, before
        which stand the strategy's options, for a reader.
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
        names = [self.scenario, self.strategy, self.model]
        if [*readable, model] != names or not all(map(PLAIN.fullmatch, names)):
            told.append(names)
        if later := {k: v for k, v in self.experiment().items() if k not in FIRST}:
            told.append({"later": later})
        if told != [{}, 1]:
            text = json.dumps(told, sort_keys=True)
            digest = hashlib.blake2b(text.encode(), digest_size=4).hexdigest()
            parts.insert(2, "-".join([*self._hints(relevant.get(strategy, {})), digest]))
        return "__".join(parts)

    def _hints(self, options: dict[str, Any]) -> list[str]:
        """What a person reads of the digest in a folder's name: the strategy's options, as many as are short."""
        trial = self.tuned.values if self.tuned and self.tuned.first else {}
        told = [f"{k}-{v}" for k, v in sorted((options | trial).items())]
        told += [self.task_ids] if self.task_ids != "given" else []
        plain = re.sub(r"[^A-Za-z0-9.]+", "-", "-".join(told))[:HINT].strip("-.")
        return [plain] if plain else []


def _together(folders: dict[str, Path]) -> dict[str, str]:
    """Folders that differ by the task's name alone as one: {"code+math": "data/{task}"} of data/code and data/math."""
    alike: dict[str, list[str]] = {}
    for task, folder in folders.items():
        alike.setdefault(str(folder).replace(task, "{task}"), []).append(task)
    return {
        "+".join(tasks): told if len(tasks) > 1 else str(folders[tasks[0]])
        for told, tasks in alike.items()
    }


def several(name: str) -> str:
    """What the list of an axis is called: strategies of strategy, task_ids of task_ids."""
    if name.endswith("y"):
        return f"{name[:-1]}ies"
    return name if name.endswith("s") else f"{name}s"


def choices(field: FieldInfo) -> list[str]:
    """The values that a field takes, or that an entry of its list does, where they can be counted; else none."""
    return _choices([field.annotation, *field.metadata])


def told(field: FieldInfo) -> str:
    """A field's help: its description, and the values that it takes where they can be counted."""
    known = ", ".join(choices(field))
    return f"{field.description} One of {known}." if known else str(field.description)


def _choices(parts: Iterable[Any]) -> list[str]:
    for part in parts:
        check = part.func if isinstance(part, AfterValidator) else None
        if isinstance(check, ModuleOf):
            return check.names()
        inner = get_args(part)
        if inner and all(isinstance(value, str) for value in inner):
            return list(inner)
        if values := _choices(inner):
            return values
    return []


def _extra(field: FieldInfo) -> dict[str, Any]:
    return field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
