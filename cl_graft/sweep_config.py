"""What a sweep is: scenarios x strategies, each with grids of options, x models x seeds x budgets. Plain data."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, Field, TypeAdapter, ValidationError, create_model
from pydantic.fields import FieldInfo

from cl_graft import plugins, presets
from cl_graft.budget import Budget
from cl_graft.config import (
    Axes,
    Executor,
    Frozen,
    RunConfig,
    Settings,
    Whereabouts,
    choices,
    listed,
    off,
    several,
    told,
)
from cl_graft.errors import CLGraftError, UnknownName
from cl_graft.store.files import write_text
from cl_graft.store.locks import locked
from cl_graft.yaml_files import parsed

FILE = "sweep.yaml"  # in the results folder: what was asked for last
PLUGINS = ("scenario", "strategy")  # an entry may be {name: {option: value}}, and is needed

Options = dict[str, Any]
Entries = Annotated[list[str | dict[str, Any]], BeforeValidator(listed)]


def _read_as_text(value: Any) -> Any:
    """The entries as text: YAML reads `budgets: [1000]` as a number."""
    return [str(v) if isinstance(v, int | float) else v for v in listed(value)]


class Ray(Frozen):
    """What a cell asks a Ray cluster for."""

    address: str | None = Field(
        default=None,
        description="Of a running cluster; else RAY_ADDRESS, else one is started on this machine.",
    )
    cpus: float = Field(default=1, gt=0, description="That a cell takes while it runs.")
    gpus: float = Field(
        default=0, ge=0, description="The same; a share such as 0.5 puts two cells on one."
    )
    memory: int | None = Field(default=None, gt=0, description="Bytes that a cell takes.")


def _list_of(name: str, field: FieldInfo) -> tuple[Any, FieldInfo]:
    """The field of a sweep that holds several values of an axis."""
    about: dict[str, Any] = {
        "min_length": 1,
        "title": field.title,
        "description": field.description,
    }
    if name in PLUGINS:
        return Entries, Field(**about)
    reads = _read_as_text if field.annotation is str else listed
    kind = Annotated[list[field.annotation], BeforeValidator(reads)]  # type: ignore[name-defined]
    return kind, Field(default=[field.default], **about)


Lists: Any = create_model(
    "Lists",
    __base__=Frozen,
    **{several(name): _list_of(name, field) for name, field in Axes.model_fields.items()},  # type: ignore[call-overload]
)


class Sweep(Whereabouts, Settings, Lists):
    """The cells of a sweep and how they are run.

    scenarios, strategies: names, or {name: {option: value}}. A list where the option takes none is a grid:
    {lora: {rank: [8, 32, 128]}} is three strategies. The other axes of a RunConfig are lists, too, and its other
    fields those of every cell.
    """

    executor: Executor = Field(
        default="local",
        title="executor",
        description="What runs the cells: processes of this machine, or a cluster.",
    )
    workers: int = Field(
        default=0, ge=0, description="Cells at a time; 0 is one a core, or one a GPU."
    )
    ray: Ray = Field(
        default=Ray(),
        description="What a cell asks a Ray cluster for.",
        examples=[{"cpus": 4, "gpus": 1}],
    )

    def cells(self) -> list[RunConfig]:
        """The cells, each once, in the order given, seeds outermost so that early results compare all strategies.

        Raises CLGraftError for a budget that is none, and for a name, an option or a preset that there is none of.
        """
        for text in self.budgets:  # costs less to check than options
            Budget(text, 10**9)
        shared = {k: getattr(self, k) for k in RunConfig.model_fields if k in Sweep.model_fields}
        shared = {k: v for k, v in shared.items() if k not in Axes.model_fields}
        order = sorted(Axes.model_fields, key=lambda name: (name != "seed", name == "strategy"))
        by_name: dict[str, RunConfig] = {}
        for chosen in itertools.product(*map(self._along, order)):
            values = dict(zip(order, chosen, strict=True))
            options: dict[str, Options] = {}
            for kind in PLUGINS:
                values[kind], own = values[kind]
                options |= _owned(values[kind], own)
            config = presets.applied(RunConfig(**values, options=options, **shared))
            by_name.setdefault(config.cell, config)
        return list(by_name.values())

    def _along(self, name: str) -> list[Any]:
        """The values of an axis; of scenarios and strategies, with each choice of their options."""
        values = getattr(self, several(name))
        return list(_each(name, values)) if name in PLUGINS else values

    def save(self, folder: Path) -> None:
        """Write `folder`/sweep.yaml, from which the sweep can be resumed."""
        import yaml

        said = self.model_dump(mode="json", exclude_defaults=True, exclude={"out"})
        with locked(folder / FILE):
            write_text(folder / FILE, yaml.safe_dump(said, sort_keys=False, allow_unicode=True))


def sweep_of(fields: Mapping[str, Any], where: str) -> Sweep:
    """The sweep that these fields say. Raises CLGraftError in one sentence, with the nearest right name."""
    for name in fields:
        if name not in Sweep.model_fields:
            raise UnknownName(f"field of a sweep ({where})", str(name), Sweep.model_fields)
    fields = {name: value for name, value in fields.items() if value is not None}  # `models:` alone
    for name, given in fields.items():
        _check(name, given, Sweep.model_fields[name], where)
    for kind in map(several, PLUGINS):
        if not fields.get(kind):
            raise CLGraftError(
                f"{where} names no {kind}; give some, as `cl-graft list {kind}` shows."
            )
    try:
        return Sweep(**fields)
    except ValidationError as error:
        first = error.errors()[0]
        # of a union's members, the names in brackets tell a user nothing
        place = ".".join(str(part) for part in first["loc"] if "[" not in str(part))
        wrong = "" if ", not " in first["msg"] else f", not {first['input']!r}"
        raise CLGraftError(f"{where}: {place}: {first['msg']}{wrong}.") from error


def _check(name: str, given: Any, field: FieldInfo, where: str) -> None:
    """Raises CLGraftError for settings that a record does not have, and for values that a field does not take."""
    kind = field.annotation
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        if not isinstance(given, dict | kind):
            raise CLGraftError(
                f"{where}: {name} is {given!r}; write its settings: {', '.join(kind.model_fields)}."
            )
        for setting in given if isinstance(given, dict) else ():
            if setting not in kind.model_fields:
                raise UnknownName(f"setting of {name} ({where})", str(setting), kind.model_fields)
    elif known := choices(field):
        for value in listed(off(given)):
            if value not in known:
                what = field.title or f"value of {name}"
                raise UnknownName(f"{what} ({where})", str(value), known)


def template() -> str:
    """A sweep file to begin with: sweep_template.yaml, and the fields that it leaves out as comments."""
    text = resources.files("cl_graft").joinpath("sweep_template.yaml").read_text(encoding="utf-8")
    lines = []
    for name, field in Sweep.model_fields.items():
        if not re.search(rf"^{name}:", text, re.MULTILINE):
            value = yaml_of(field.examples[0] if field.examples else field.default)
            lines.append(f"# {f'{name}: {value}':36}# {told(field)}\n")
    return text + "".join(lines)


def yaml_of(value: Any) -> str:
    """The value of a field on one line of YAML."""
    import yaml  # not for `--help`

    plain = TypeAdapter(Any).dump_python(value, mode="json", exclude_defaults=True)
    return yaml.safe_dump(plain, default_flow_style=True, width=999).removesuffix("...\n").strip()


def read(path: Path) -> dict[str, Any]:
    """The fields that a YAML file sets. Raises CLGraftError where it is none."""
    fields = parsed(path, "`cl-graft init` writes a file to begin with")
    if not isinstance(fields, dict):
        raise CLGraftError(f"{path} sets no fields; `cl-graft init` writes a file to begin with.")
    return fields


def with_options(fields: Mapping[str, Any], sets: Sequence[tuple[str, str, Any]]) -> dict[str, Any]:
    """The fields with (owner, option, value) put into every entry of that scenario or strategy, or else into
    `router_options` or `scoring`.

    Which scorers there are is known once the scenario is made. Raises UnknownName for a scenario or strategy that is
    not of this sweep.
    """
    entries = {
        kind: [(name, dict(options)) for name, options in _pairs(listed(fields.get(kind) or []))]
        for kind in ("scenarios", "strategies")
    }
    everything = [entry for kind in entries.values() for entry in kind]
    scoring = dict(fields.get("scoring") or {})
    routing = dict(fields.get("router_options") or {})
    router = RunConfig.short(fields.get("router") or Settings.model_fields["router"].default)
    for owner, option, value in sets:
        own = [options for name, options in everything if RunConfig.short(name) == owner]
        for options in own:
            options[option] = value
        if owner == router:
            routing[option] = value
        elif not own:
            if any(owner in plugins.names(kind) for kind in PLUGINS):
                names = [RunConfig.short(name) for name, _ in everything]
                raise UnknownName("scenario or strategy in this sweep", owner, names)
            scoring[f"{owner}.{option}"] = value
    return {
        **fields,
        **{
            kind: [{name: options} if options else name for name, options in named]
            for kind, named in entries.items()
            if named
        },
        **({"scoring": scoring} if scoring else {}),
        **({"router_options": routing} if routing else {}),
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
