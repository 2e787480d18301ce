"""What a sweep is: scenarios x strategies, each with grids of options, x models x seeds x budgets. Plain data."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from cl_graft import plugins
from cl_graft.config import Launch, RunConfig, Track, WandbMode
from cl_graft.errors import CLGraftError, UnknownName
from cl_graft.store.files import write_text
from cl_graft.store.locks import locked

FILE = "sweep.yaml"  # in the results folder: what was asked for last


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str | int | float | dict) else value


def _off(value: Any) -> Any:
    """YAML reads `wandb: off` as false."""
    return "off" if value is False else value


def _read_as_text(value: Any) -> Any:
    """YAML reads `budgets: [1000]` as a number."""
    return [str(v) if isinstance(v, int | float) else v for v in _listed(value)]


Executor = Literal["local", "ray"]
EXECUTORS = get_args(Executor)

Options = dict[str, Any]
Entries = Annotated[list[str | dict[str, Any]], BeforeValidator(_listed)]
Names = Annotated[list[str], Field(min_length=1), BeforeValidator(_read_as_text)]


class Ray(BaseModel):
    """What a cell asks a Ray cluster for.

    address: of a running cluster; else the one of RAY_ADDRESS, else one is started on this machine.
    cpus, gpus, memory (bytes): that a cell takes while it runs.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    address: str | None = None
    cpus: float = Field(default=1, gt=0)
    gpus: float = Field(default=0, ge=0)
    memory: int | None = Field(default=None, gt=0)


class Sweep(BaseModel):
    """The cells of a sweep and how they are run.

    scenarios, strategies: names, or {name: {option: value}}. A list where the option takes none is a grid:
    {lora: {rank: [8, 32, 128]}} is three strategies. scorers: {name: {option: value}}. The other fields are those of
    RunConfig.
    executor: `local`, processes of this machine, or `ray`. workers: cells at a time; 0 is one a GPU, or one a core.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    scenarios: Entries = Field(min_length=1)
    strategies: Entries = Field(min_length=1)
    models: Names = ["mini-llama"]
    seeds: Annotated[list[int], Field(min_length=1), BeforeValidator(_listed)] = [0]
    budgets: Names = ["10%"]
    scorers: dict[str, Options] = {}
    train_on: dict[str, Path] = {}
    threads: int = Field(default=1, ge=1)

    data_dir: Path | None = None
    out: Path = Path("results")
    cache: Path | None = None
    mirror: str | None = None
    launch: Launch = Launch()
    wandb: Annotated[WandbMode, BeforeValidator(_off)] = "auto"
    track: Annotated[list[Track], BeforeValidator(_listed)] = []
    allow_code_execution: bool = False
    executor: Executor = "local"
    workers: int = Field(default=0, ge=0)
    ray: Ray = Ray()

    def cells(self) -> list[RunConfig]:
        """Each once, in the order given, seeds outermost so that early results compare all strategies.

        Raises CLGraftError for a name or an option that there is none of.
        """
        shared = {k: getattr(self, k) for k in RunConfig.model_fields if k in Sweep.model_fields}
        found: dict[str, RunConfig] = {}
        for seed, (scenario, of_scenario), model, budget, (
            strategy,
            of_strategy,
        ) in itertools.product(
            self.seeds,
            list(_each("scenario", self.scenarios)),
            self.models,
            self.budgets,
            list(_each("strategy", self.strategies)),
        ):
            config = RunConfig(
                scenario=scenario,
                strategy=strategy,
                model=model,
                seed=seed,
                budget=budget,
                options={**_owned(scenario, of_scenario), **_owned(strategy, of_strategy)},
                **shared,
            )
            found.setdefault(config.cell, config)
        return list(found.values())

    def save(self, folder: Path) -> None:
        """As `folder`/sweep.yaml, from which it can be resumed."""
        said = self.model_dump(mode="json", exclude_defaults=True, exclude={"out"})
        with locked(folder / FILE):
            write_text(folder / FILE, yaml.safe_dump(said, sort_keys=False, allow_unicode=True))


def sweep_of(fields: Mapping[str, Any], where: str) -> Sweep:
    """The sweep that these fields say. Raises CLGraftError in one sentence, with the nearest right name."""
    for name in fields:
        if name not in Sweep.model_fields:
            raise UnknownName(f"field of a sweep ({where})", str(name), Sweep.model_fields)
    fields = {name: value for name, value in fields.items() if value is not None}  # `models:` alone
    parts: dict[str, type[BaseModel]] = {"launch": Launch, "ray": Ray}
    for part, kind in parts.items():
        given = fields.get(part, {})
        if not isinstance(given, dict | kind):
            raise CLGraftError(
                f"{where}: {part} is {given!r}; write its settings: {', '.join(kind.model_fields)}."
            )
        for name in given if isinstance(given, dict) else ():
            if name not in kind.model_fields:
                raise UnknownName(f"setting of {part} ({where})", str(name), kind.model_fields)
    for what, field, known in (
        ("tracker", "track", get_args(Track)),
        ("W&B mode", "wandb", get_args(WandbMode)),
        ("executor", "executor", EXECUTORS),
    ):
        for name in _listed(_off(fields.get(field, []))):
            if name not in known:
                raise UnknownName(f"{what} ({where})", str(name), known)
    for name in ("scenarios", "strategies"):
        if not fields.get(name):
            raise CLGraftError(
                f"{where} names no {name}; give some, as `cl-graft list {name}` shows."
            )
    try:
        return Sweep(**fields)
    except ValidationError as error:
        first = error.errors()[0]
        # of a union's members, the names in brackets tell a user nothing
        place = ".".join(str(part) for part in first["loc"] if "[" not in str(part))
        told = "" if ", not " in first["msg"] else f", not {first['input']!r}"
        raise CLGraftError(f"{where}: {place}: {first['msg']}{told}.") from error


def read(path: Path) -> dict[str, Any]:
    """The fields that a YAML file sets. Raises CLGraftError where it is none."""
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise CLGraftError(
            f"{path} cannot be read ({getattr(error, 'strerror', None) or error}); `cl-graft init` writes a file to "
            "begin with."
        ) from error
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise CLGraftError(f"{path}{line} is not YAML ({problem or error}); mend it.") from error
    if not isinstance(found, dict):
        raise CLGraftError(f"{path} sets no fields; `cl-graft init` writes a file to begin with.")
    return found


def with_options(fields: Mapping[str, Any], sets: Sequence[tuple[str, str, Any]]) -> dict[str, Any]:
    """The fields with (owner, option, value) put into every entry of that scenario or strategy, or else of scorers.

    Which scorers there are is known once the scenario is made.
    """
    entries = {
        kind: [(name, dict(options)) for name, options in _pairs(_listed(fields.get(kind) or []))]
        for kind in ("scenarios", "strategies")
    }
    everything = [entry for kind in entries.values() for entry in kind]
    scorers = {name: dict(options) for name, options in (fields.get("scorers") or {}).items()}
    for owner, option, value in sets:
        own = [options for name, options in everything if RunConfig.short(name) == owner]
        for options in own or [scorers.setdefault(owner, {})]:
            options[option] = value
    return {
        **fields,
        **{
            kind: [{name: options} if options else name for name, options in found]
            for kind, found in entries.items()
            if found
        },
        **({"scorers": scorers} if scorers else {}),
    }


def _pairs(entries: Sequence[Any]) -> Iterator[tuple[str, Options]]:
    for entry in entries:
        if isinstance(entry, str):
            yield entry, {}
        elif isinstance(entry, dict) and len(entry) == 1:
            ((name, options),) = entry.items()
            if not isinstance(options, dict | None):
                raise CLGraftError(
                    f"{options!r} is no option of {name}; write `- {name}: {{rank: 8}}`."
                )
            yield str(name), options or {}
        else:
            raise CLGraftError(
                f"{entry!r} is neither a name nor one name with its options; write `- lora: {{rank: 8}}`."
            )


def _each(kind: str, entries: Sequence[Any]) -> Iterator[tuple[str, Options]]:
    """Every name with every choice of its options."""
    for name, options in _pairs(entries):
        for chosen in plugins.choices(kind, name, options):
            yield name, chosen


def _owned(name: str, options: Options) -> dict[str, Options]:
    return {RunConfig.short(name): options} if options else {}
