"""Commands: parse, call, print. Heavy imports wait until a command needs them."""

from __future__ import annotations

import json
import shlex
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from . import cli_cache, cli_pack, cli_transfer
from .errors import CLGraftError, UnknownName
from .progress import bars, interruptible

app = typer.Typer(
    help="Continual learning of language models: run strategies on task streams, measure forgetting.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(cli_pack.app, name="pack")
app.add_typer(cli_cache.app, name="cache")
app.add_typer(cli_transfer.app, name="transfer")
bench = typer.Typer(help="Measure this machine and this code.", no_args_is_help=True)
app.add_typer(bench, name="bench")

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


@app.command()
def run(
    scenario: Annotated[str, typer.Option(help="Name, or path of a .py file.")],
    strategy: Annotated[str, typer.Option(help="Name, or path of a .py file.")],
    model: Model = "mini-llama",
    seed: Annotated[int, typer.Option(help="Of the data and the training.")] = 0,
    budget: Budget = "10%",
    data_dir: DataDir = None,
    out: Out = Path("results"),
    wandb: Wandb = "auto",
    allow_code_execution: Consent = False,
    set_: Set = None,
    train_on: TrainOn = None,
    launch: Launching = "",
    cache: Cache = None,
) -> None:
    """Run one strategy on one scenario, or continue it where it stopped."""
    from .cell import run as run_cell
    from .report.tables import matrices, ranking

    (config,) = _grid([scenario], [strategy], [seed], [model], [budget], locals())
    with interruptible(), bars() as bar:
        result = run_cell(config, lambda what, done: bar(config.label, what, done))
    _print_tables([*matrices([result]), *ranking([result])])
    typer.echo(f"results: {config.out / config.cell}")
    typer.echo(f"figures: cl-graft report {config.out}")


@app.command()
def sweep(
    scenarios: Annotated[str, typer.Option(help="Names, comma-separated.")],
    strategies: Annotated[str, typer.Option(help="Names, comma-separated.")],
    seeds: Annotated[str, typer.Option(help="Comma-separated integers.")] = "0",
    models: Annotated[str, typer.Option(help="Comma-separated.")] = "mini-llama",
    budgets: Annotated[str, typer.Option(help="Comma-separated.")] = "10%",
    data_dir: DataDir = None,
    out: Out = Path("results"),
    wandb: Wandb = "auto",
    allow_code_execution: Consent = False,
    set_: Set = None,
    train_on: TrainOn = None,
    launch: Launching = "",
    cache: Cache = None,
    workers: Annotated[
        int, typer.Option(min=0, help="Processes; 0 means one a core, or one a GPU.")
    ] = 0,
) -> None:
    """Run every combination; run it again to continue what was stopped."""
    from .cell import finished
    from .sweep import default_workers
    from .sweep import sweep as run_sweep

    numbers = [_integer(s) for s in _names(seeds)]
    cells = _grid(
        _names(scenarios), _names(strategies), numbers, _names(models), _names(budgets), locals()
    )
    if all(finished(c) for c in cells) and (out / "report").is_dir():
        _print_finished(cells, out)
        return
    with interruptible(), bars() as bar:
        failures = run_sweep(cells, workers or default_workers(), bar)
    try:
        if len(failures) < len(cells):
            _report([out], out / "report")
    finally:
        for failure in failures:
            typer.echo(f"failed: {failure.cell}: {failure.reason}", err=True)
    if failures:
        raise typer.Exit(1)


@app.command()
def plan(
    scenarios: Annotated[str, typer.Option(help="Names, comma-separated.")],
    strategies: Annotated[str, typer.Option(help="Names, comma-separated.")],
    seeds: Annotated[str, typer.Option(help="Comma-separated integers.")] = "0",
    models: Annotated[str, typer.Option(help="Comma-separated.")] = "mini-llama",
    budgets: Annotated[str, typer.Option(help="Comma-separated.")] = "10%",
    data_dir: DataDir = None,
    out: Out = Path("results"),
    set_: Set = None,
    train_on: TrainOn = None,
    launch: Launching = "",
    cache: Cache = None,
    probe: Annotated[
        bool, typer.Option("--probe", help="Time three real steps of each kind of stage.")
    ] = False,
    peak: Annotated[
        float | None, typer.Option(help="bf16 operations a second of one device, as 989e12.")
    ] = None,
    utilisation: Annotated[float, typer.Option(help="Share of the peak that is reached.")] = 0.4,
    gpu: Annotated[
        bool, typer.Option("--gpu", help="Plan for GPUs, though this machine has none.")
    ] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """What a sweep is going to do: stages, memory, time, disk, and what is cached; nothing is started."""
    from .plan import plan as make
    from .report.plan import summary, table

    numbers = [_integer(s) for s in _names(seeds)]
    given = locals() | {"wandb": "off", "allow_code_execution": False}
    cells = _grid(
        _names(scenarios), _names(strategies), numbers, _names(models), _names(budgets), given
    )
    found = make(cells, probe, peak, utilisation, gpu)
    if json_:
        typer.echo(json.dumps(found.json(), indent=1, default=str))
    else:
        _print_tables([table(found)])
        typer.echo("\n".join(summary(found)))


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(help="Results folders.")],
    json_: Annotated[
        bool, typer.Option("--json", help="Print one object per cell instead.")
    ] = False,
    to: Annotated[
        Path | None, typer.Option(help="Folder for tables and figures; FOLDER/report if not given.")
    ] = None,
) -> None:
    """Tables in the terminal, as CSV and Markdown, and figures, for all cells in the folders."""
    if json_:
        from .report import gather

        typer.echo(json.dumps(gather(folders), indent=1))
    else:
        _report(folders, to or folders[0] / "report")


@app.command("list")
def list_(
    what: Annotated[str, typer.Argument(help="scenarios, strategies or models.")],
    verbose: Annotated[bool, typer.Option(help="Options and their defaults, too.")] = False,
) -> None:
    """What there is, with a line on each."""
    from . import plugins
    from .models.embedded import SPECS

    kinds = {"scenarios": "scenario", "strategies": "strategy"}
    if what == "models":
        for name, spec in SPECS.items():
            typer.echo(f"{name:16} {spec.about}")
        typer.echo(f"{'FOLDER':16} a Hugging Face causal LM on this machine")
        typer.echo(f"{'owner/model':16} a Hugging Face causal LM on the hub")
        return
    if what not in kinds:
        raise UnknownName("list", what, [*kinds, "models"])
    for name in plugins.names(kinds[what]):
        typer.echo(f"{name:20} {plugins.about(kinds[what], name)}")
        if verbose:
            plugin = plugins.load(kinds[what], name)
            for option, default in plugins.options(plugin).items():
                typer.echo(f"    --set {name}.{option}={json.dumps(default)}")
            typer.echo("    " + " ".join((plugin.__doc__ or "").split()))


@bench.command("pack")
def bench_pack(
    data_dir: DataDir = None,
    only: Annotated[
        str, typer.Option(help="Parts, comma-separated: error, time, memory, merge, bytes.")
    ] = "error,time,memory,merge,bytes",
    threads: Annotated[int, typer.Option(min=1, help="Of the computations.")] = 2,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
    to: Annotated[Path | None, typer.Option(help="Folder for the table, with provenance.")] = None,
) -> None:
    """The pack engine beside a textbook implementation of the paper's scheme: ratios within one run."""
    from .bench.pack import bench_pack as measure
    from .bench.table import markdown, write

    found = measure(_names(only), data_dir, threads, lambda what: typer.echo(what, err=True))
    typer.echo(json.dumps(found, indent=1) if json_ else markdown(found))
    if to is not None:
        write(found, to, [shlex.join(["cl-graft", *sys.argv[1:]])])


@bench.command("plan")
def bench_plan(
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Memory that `plan` estimates against what the allocator counts while TRL really trains two steps."""
    from .bench.plan import bench_plan as measure
    from .report.plan import estimates

    rows = measure()
    if json_:
        typer.echo(json.dumps(rows, indent=1))
    else:
        _print_tables([estimates(rows)])


def main() -> None:
    """Entry point: errors meant for the user are one sentence on stderr and exit code 1."""
    from pydantic import ValidationError

    # Of torchvision, which wants an image library that nothing here uses.
    warnings.filterwarnings("ignore", message="Failed to load image Python extension")
    try:
        app()
    except CLGraftError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)
    except ValidationError as error:
        first = error.errors()[0]
        typer.echo(f"error: {'.'.join(map(str, first['loc']))}: {first['msg']}.", err=True)
        sys.exit(1)


def _names(text: str) -> list[str]:
    """The different parts of a comma-separated list, in order. Raises CLGraftError if there is none."""
    names = [part.strip() for part in text.split(",") if part.strip()]
    if not names:
        raise CLGraftError(f"{text!r} names nothing to run; write names separated by commas.")
    return list(dict.fromkeys(names))


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


def _grid(scenarios, strategies, seeds, models, budgets, given: dict[str, Any]) -> list[Any]:
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


def _report(folders: list[Path], target: Path) -> None:
    from .report import budgets, gather
    from .report.figures import write_figures
    from .report.provenance import write_provenance
    from .report.tables import matrices, ranking, write_tables

    cells = gather(folders)
    _print_tables([*matrices(cells), *ranking(cells)])
    try:
        write_tables(cells, target)
        write_figures(cells, target)
        budgets.write(cells, target)
        write_provenance(cells, target)
    except OSError as error:
        raise CLGraftError(
            f"{target} cannot be written ({error.strerror or error}); free space or copy the results elsewhere."
        ) from error
    typer.echo(f"tables (CSV, Markdown), figures (PNG, SVG) and provenance: {target}")


def _print_finished(cells: list[Any], out: Path) -> None:
    from .cell import finished
    from .report.tables import matrices, ranking

    found = [result for config in cells if (result := finished(config))]
    _print_tables([*matrices(found), *ranking(found)])
    typer.echo(f"finished already; figures and provenance: {out / 'report'}")


def _print_tables(tables: list[Any]) -> None:
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 160)
    for table in tables:
        console.print(table.rich())
