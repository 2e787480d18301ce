"""The options that commands share, and the cells that they name."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import CLGraftError, UnknownName

Model = Annotated[str, typer.Option(help="Embedded model's name, local folder, or hub id.")]
DataDir = Annotated[
    Path | None, typer.Option(help="Folder with the data sets that the scenario reads.")
]
Out = Annotated[Path, typer.Option(help="Folder that results are written into.")]
Wandb = Annotated[str, typer.Option(help="offline, online, off; auto is offline unless logged in.")]
Consent = Annotated[
    bool,
    typer.Option(
        "--allow-code-execution", help="Run programs that the model wrote, in the sandbox."
    ),
]
Set = Annotated[
    list[str] | None, typer.Option("--set", help="name.option=value of the strategy or scenario.")
]
Launching = Annotated[
    str,
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
TrainOn = Annotated[
    list[str] | None,
    typer.Option(
        "--train-on", help="TASK=FOLDER that `transfer build` made, for its training data."
    ),
]
Budget = Annotated[str, typer.Option(help="Storage per task: 10%, 10%:weights, 800MB.")]


def names(text: str) -> list[str]:
    """The different parts of a comma-separated list, in order. Raises CLGraftError if there is none."""
    names = [part.strip() for part in text.split(",") if part.strip()]
    if not names:
        raise CLGraftError(f"{text!r} names nothing to run; write names separated by commas.")
    return list(dict.fromkeys(names))


def integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise CLGraftError(f"seed {text!r} is not an integer; write --seeds 0,1,2.") from None


def _pair(text: str, option: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name.strip() or not value.strip():
        raise CLGraftError(f"{option} takes NAME=VALUE, not {text!r}.")
    return name.strip(), value.strip()


def grid_of(scenarios, strategies, seeds, models, budgets, given: dict[str, Any]) -> list[Any]:
    from .config import Launch
    from .plugins import parse_set
    from .sweep import grid, options_from

    if given["wandb"] not in ("auto", "offline", "online", "off"):
        raise UnknownName("W&B mode", given["wandb"], ["auto", "offline", "online", "off"])
    common = {
        key: given[key] for key in ("data_dir", "out", "wandb", "allow_code_execution", "cache")
    }
    common["launch"] = dict(_pair(part, "--launch") for part in given["launch"].split(",") if part)
    for name in common["launch"]:
        if name not in Launch.model_fields:
            raise UnknownName("setting of --launch", name, Launch.model_fields)
    common["train_on"] = dict(_pair(text, "--train-on") for text in given["train_on"] or [])
    options = options_from([parse_set(text) for text in given["set_"] or []])
    owners = [Path(n).stem if n.endswith(".py") else n for n in (*scenarios, *strategies)]
    for owner in options:
        if owner not in owners:
            raise UnknownName("scenario or strategy in this command", owner, owners)
    return grid(scenarios, strategies, seeds, models, budgets, options=options, **common)
