"""Commands: parse, call, print. Heavy imports wait until a command needs them."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import CLGraftError, UnknownName

app = typer.Typer(
    help="Continual learning of language models: run strategies on task streams, measure forgetting.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
pack = typer.Typer(help="Look into SkillPack files.", no_args_is_help=True)
app.add_typer(pack, name="pack")

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
) -> None:
    """Run one strategy on one scenario, or continue it where it stopped."""
    from .cell import run as run_cell
    from .report.tables import matrices, ranking

    (config,) = _grid([scenario], [strategy], [seed], [model], [budget], locals())
    with _interruptible(), _bars() as bar:
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
    workers: Annotated[
        int, typer.Option(min=0, help="Processes; 0 means one a core, or one a GPU.")
    ] = 0,
) -> None:
    """Run every combination; run it again to continue what was stopped."""
    from .sweep import default_workers
    from .sweep import sweep as run_sweep

    numbers = [_integer(s) for s in _names(seeds)]
    cells = _grid(
        _names(scenarios), _names(strategies), numbers, _names(models), _names(budgets), locals()
    )
    with _interruptible(), _bars() as bar:
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


@pack.command()
def inspect(file: Path) -> None:
    """What is in a pack: header, and codec and bytes of every tensor."""
    from rich.console import Console
    from rich.table import Table

    from .skillpack.codecs import payload_bytes
    from .skillpack.file import SkillPack

    found = SkillPack.load(file)
    header = {
        "task": found.task,
        "method": found.method,
        "options": json.dumps(found.options),
        "base": found.base,
        "versions": json.dumps(found.versions),
        "digest": found.digest,
        "bytes on disk": f"{file.stat().st_size:,}",
    }
    for key, value in header.items():
        typer.echo(f"{key:14} {value}")
    table = Table("tensor", "shape", "codec", "bytes", "stored as")
    for name, encoded in found.tensors.items():
        size = payload_bytes(*encoded.spec)
        meta = json.dumps(encoded.meta, separators=(",", ":"))
        table.add_row(name, "x".join(map(str, encoded.shape)), encoded.codec, f"{size:,}", meta)
    Console(width=None if sys.stdout.isatty() else 200).print(table)


@pack.command()
def verify(
    file: Path,
    model: Annotated[str | None, typer.Option(help="Check that the pack is for this base.")] = None,
    data_dir: DataDir = None,
) -> None:
    """Check everything about a pack: digest, shapes, values, and its base if one is named."""
    from .skillpack.file import SkillPack, WrongBase, fingerprint

    found = SkillPack.load(file)
    if model is not None:
        from .models.load import load

        parameters = dict(load(model, data_dir)[0].named_parameters())
        shapes = {name: tuple(p.shape) for name, p in parameters.items()}
        try:
            SkillPack.load(file, base=fingerprint(parameters.items()), shapes=shapes)
        except WrongBase as error:
            raise WrongBase(f"model {model!r} is not the base of this pack: {error}") from error
    found.decode()
    against = f", for base {model}" if model else ""
    typer.echo(f"{file} is whole: {len(found.tensors)} tensors of task {found.task!r}{against}.")


def main() -> None:
    """Entry point: errors meant for the user are one sentence on stderr and exit code 1."""
    from pydantic import ValidationError

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


def _grid(scenarios, strategies, seeds, models, budgets, given: dict[str, Any]) -> list[Any]:
    from .plugins import parse_set
    from .sweep import grid, options_from

    if given["wandb"] not in ("auto", "offline", "online", "off"):
        raise UnknownName("W&B mode", given["wandb"], ["auto", "offline", "online", "off"])
    common = {key: given[key] for key in ("data_dir", "out", "wandb", "allow_code_execution")}
    options = options_from([parse_set(text) for text in given["set_"] or []])
    owners = [Path(n).stem if n.endswith(".py") else n for n in (*scenarios, *strategies)]
    for owner in options:
        if owner not in owners:
            raise UnknownName("scenario or strategy in this command", owner, owners)
    return grid(scenarios, strategies, seeds, models, budgets, options=options, **common)


def _report(folders: list[Path], target: Path) -> None:
    from .report import gather
    from .report.figures import write_figures
    from .report.provenance import write_provenance
    from .report.tables import matrices, ranking, write_tables

    cells = gather(folders)
    _print_tables([*matrices(cells), *ranking(cells)])
    try:
        write_tables(cells, target)
        write_figures(cells, target)
        write_provenance(cells, target)
    except OSError as error:
        raise CLGraftError(
            f"{target} cannot be written ({error.strerror or error}); free space or copy the results elsewhere."
        ) from error
    typer.echo(f"tables (CSV, Markdown), figures (PNG, SVG) and provenance: {target}")


def _print_tables(tables: list[Any]) -> None:
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 160)
    for table in tables:
        console.print(table.rich())


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C, or SIGTERM, says how to go on and exits with 130."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("stopped; run the same command again to continue.", err=True)
        raise typer.Exit(130) from None
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _bars() -> Iterator[Callable[[str, str, float], None]]:
    """Progress bars with the time left, one a cell under way; plain lines where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _lines
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[what]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    known: dict[str, Any] = {}
    with Progress(*columns, console=console) as progress:

        def bar(cell: str, what: str, done: float) -> None:
            if cell not in known:
                known[cell] = progress.add_task(cell, total=1.0, what=what)
            progress.update(known[cell], completed=done, what=what)
            if what == "done":
                progress.update(known[cell], visible=False)

        yield bar


_last_line: dict[str, str] = {}


def _lines(cell: str, what: str, done: float) -> None:
    if _last_line.get(cell) != what:
        _last_line[cell] = what
        typer.echo(f"[{done:4.0%}] {cell}: {what}", err=True)
