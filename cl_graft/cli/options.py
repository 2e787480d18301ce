"""The options that commands share, and the sweep that they say."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cl_graft.cli import complete
from cl_graft.errors import CLGraftError

if TYPE_CHECKING:
    from cl_graft.sweep_config import Sweep

# What is not given is None, so that a sweep file's own fields hold.
File = Annotated[
    Path | None,
    typer.Argument(help="Sweep file, as `cl-graft init` writes one; options go before it."),
]
Scenarios = Annotated[
    str | None, typer.Option(help="Names, comma-separated.", autocompletion=complete.scenarios)
]
Strategies = Annotated[
    str | None, typer.Option(help="Names, comma-separated.", autocompletion=complete.strategies)
]
Seeds = Annotated[str | None, typer.Option(help="Integers, comma-separated; 0 if not given.")]
Models = Annotated[
    str | None,
    typer.Option(
        help="Embedded models, folders or hub ids, comma-separated; mini-llama.",
        autocompletion=complete.models,
    ),
]
Budgets = Annotated[
    str | None, typer.Option(help="Storage per task, comma-separated: 10% (default), 800MB.")
]
Model = Annotated[
    str | None,
    typer.Option(
        help="Embedded model's name, local folder, or hub id; mini-llama.",
        autocompletion=complete.model,
    ),
]
Budget = Annotated[
    str | None, typer.Option(help="Storage per task: 10% (default), 10%:weights, 800MB.")
]
DataDir = Annotated[
    Path | None, typer.Option(help="Folder with the data sets that the scenario reads.")
]
Out = Annotated[
    Path | None, typer.Option(help="Folder that results are written into; results if not given.")
]
Wandb = Annotated[
    str | None, typer.Option(help="offline, online, off; auto is offline unless logged in.")
]
Track = Annotated[
    str | None,
    typer.Option(
        help="tensorboard, csv or both, comma-separated: beside W&B, in each cell's folder."
    ),
]
Consent = Annotated[
    bool,
    typer.Option(
        "--allow-code-execution", help="Run programs that the model wrote, in the sandbox."
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="name.option=value of a strategy, scenario or scorer; lora.rank=[8,32] is a grid.",
    ),
]
Launching = Annotated[
    str | None,
    typer.Option(
        help="How stages train, as processes=8,zero=3,offload=true,hostfile=FILE,micro_batch=4,checkpointing=true,"
        "save_steps=100; processes=0 is in this process."
    ),
]
Cache = Annotated[
    Path | None,
    typer.Option(
        help="Folder of finished stages and evaluations to share; OUT/cache if not given."
    ),
]
Mirror = Annotated[
    str | None,
    typer.Option(help="fsspec URL that keeps a copy, from which another machine goes on: s3://…"),
]
TrainOn = Annotated[
    list[str] | None,
    typer.Option(
        "--train-on", help="TASK=FOLDER that `transfer build` made, for its training data."
    ),
]

LISTS = ("scenarios", "strategies", "models", "budgets", "track")
PLAIN = (
    *("data_dir", "out", "wandb", "allow_code_execution", "cache", "mirror", "executor", "workers"),
)


def names(text: str) -> list[str]:
    """The different parts of a comma-separated list, in order. Raises CLGraftError if there is none."""
    names = [part.strip() for part in text.split(",") if part.strip()]
    if not names:
        raise CLGraftError(f"{text!r} names nothing to run; write names separated by commas.")
    return list(dict.fromkeys(names))


def sweep_from(file: Path | None, given: dict[str, Any]) -> Sweep:
    """A sweep file's fields, under the options that a command was given (its `locals()`)."""
    from cl_graft.plugins import parse_set
    from cl_graft.sweep_config import read, sweep_of, with_options

    fields: dict[str, Any] = {name: names(given[name]) for name in LISTS if given.get(name)}
    fields |= {name: given[name] for name in PLAIN if given.get(name) not in (None, False)}
    if seeds := given.get("seeds"):
        fields["seeds"] = [_integer(s) for s in names(seeds)]
    if launch := given.get("launch"):
        fields["launch"] = dict(_pair(part, "--launch") for part in names(launch))
    if train_on := given.get("train_on"):
        fields["train_on"] = dict(_pair(text, "--train-on") for text in train_on)
    where = str(file) if file else "the command"
    everything = {**(read(file) if file else {}), **fields}
    sets = [parse_set(text) for text in given.get("set_") or []]
    return sweep_of(with_options(everything, sets), where)


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise CLGraftError(f"seed {text!r} is not an integer; write --seeds 0,1,2.") from None


def _pair(text: str, option: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name.strip() or not value.strip():
        raise CLGraftError(f"{option} takes NAME=VALUE, not {text!r}.")
    return name.strip(), value.strip()
