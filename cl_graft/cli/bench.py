"""`cl-graft bench`."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from cl_graft.cli.options import DataDir, integer, names
from cl_graft.cli.progress import interruptible
from cl_graft.cli.show import print_tables
from cl_graft.errors import CLGraftError, UnknownName

app = typer.Typer(help="Measure this machine and this code.", no_args_is_help=True)


def _benchmark(name: str) -> Callable[..., Any]:
    """The function `bench_<name>` of the benchmarks. Raises CLGraftError in an installation, which has none."""
    try:
        module = import_module(f"cl_graft.bench.{name}")
    except ModuleNotFoundError as error:
        if error.name != "cl_graft.bench":
            raise
        raise CLGraftError(
            "the benchmarks are no part of the installed package; run the same command in a checkout of the source, "
            "after `pip install --editable .` there."
        ) from error
    return getattr(module, f"bench_{name}")


@app.command("pack")
def bench_pack(
    data_dir: DataDir = None,
    only: Annotated[
        str,
        typer.Option(
            help="Parts, comma-separated: error, time, memory, disk, merge, bytes, lossless; methods, all of them on "
            "one delta; beside --previous: error_over_previous, bytes_at_equal_error, kl_over_previous, "
            "experts_over_previous; on SmolLM2, which `cl-graft models fetch` gets: anatomy, bf16_kl_share, "
            "bf16_outputs_kept, bytes_over_entropy, peers, deltatensors_kl_ratio."
        ),
    ] = "error,time,memory,disk,merge,bytes",
    base: Annotated[
        Path | None, typer.Option(help="Folder of the base for lossless, in place of mini's.")
    ] = None,
    tuned: Annotated[
        list[Path] | None, typer.Option(help="Folder tuned from --base; may come several times.")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Of the computations.")] = 2,
    previous: Annotated[
        Path | None,
        typer.Option(help="Checkout of an earlier commit; `time` also sets its engine beside."),
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
    to: Annotated[Path | None, typer.Option(help="Folder for the table, with provenance.")] = None,
) -> None:
    """The pack engine beside a textbook implementation of the paper's scheme, its own past, and others' methods.

    Every comparison is a ratio within one run. Parts on real deltas go on where they were stopped.
    """
    measure = _benchmark("pack")
    from cl_graft.bench.table import markdown, write

    if (base is None) != (not tuned):
        raise CLGraftError(
            "a lossless pack is made of two folders; name the base and the tuned model."
        )
    pairs = [(base, folder) for folder in tuned or ()]
    tell = partial(typer.echo, err=True)
    with interruptible():
        figures = measure(names(only), data_dir, threads, tell, pairs, previous)
    typer.echo(json.dumps(figures, indent=1) if json_ else markdown(figures))
    if to is not None:
        write(figures, to, [shlex.join(["cl-graft", *sys.argv[1:]])])


@app.command("deltas")
def bench_deltas(
    data_dir: DataDir = None,
    steps: Annotated[str, typer.Option(help="Of training, comma-separated.")] = "12,300",
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Tune SmolLM2-135M on SST-2 for so many steps and keep what it becomes, for `bench pack`; goes on when stopped."""
    measure = _benchmark("deltas")

    counts = [integer(text, "--steps") for text in names(steps)]
    found = measure(counts, data_dir, lambda what: typer.echo(what, err=True))
    if json_:
        typer.echo(json.dumps(found, indent=1))
        return
    for row in found:
        typer.echo(
            f"{row['tuned']}: {row['delta']}, loss {row['loss']:.3f}, {row['size']:.2e} of the base, "
            f"{row['seconds']:.0f} s"
        )


@app.command("plan")
def bench_plan(
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Memory that `plan` estimates against what the allocator counts while TRL really trains two steps."""
    measure = _benchmark("plan")
    from cl_graft.planning.tables import estimates

    rows = measure()
    if json_:
        typer.echo(json.dumps(rows, indent=1))
    else:
        print_tables([estimates(rows)])


@app.command("routing")
def bench_routing(
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Prompts of several packs answered in one forward, beside a group a pack: processor seconds."""
    measure = _benchmark("routing")
    figures = measure()
    if json_:
        typer.echo(json.dumps(figures, indent=1))
        return
    for model, told in figures.items():
        typer.echo(
            f"{model}: {told['prompts']} prompts, {told['packs']} packs, {told['new_tokens']} new tokens: grouped "
            f"{told['grouped']:.2f} s, attached {told['attached']:.2f} s, "
            f"{told['attached_over_grouped']:.2f} times as long"
        )


@app.command("routers")
def bench_routers(
    data_dir: DataDir = None,
    only: Annotated[
        str, typer.Option(help="Streams, separated by semicolons; by default all of them.")
    ] = "",
    seeds: Annotated[str, typer.Option(help="Of the training prompts, comma-separated.")] = "0,1,2",
    cells: Annotated[
        Path | None,
        typer.Option(help="Folder of results: packs of its graftllm cells are routed to, too."),
    ] = None,
    allow_code_execution: Annotated[
        bool, typer.Option(help="Run programs that the model wrote, for the scores of packs.")
    ] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
    to: Annotated[Path | None, typer.Option(help="Folder for the table, with provenance.")] = None,
) -> None:
    """Routers beside each other: how often right, bytes, prompts of no task that go to the base, time."""
    measure = _benchmark("routers")
    from cl_graft.bench.routers import STREAMS, markdown, write

    chosen = [name.strip() for name in only.split(";") if name.strip()] or list(STREAMS)
    for name in chosen:
        if name not in STREAMS:
            raise UnknownName("stream of the benchmark", name, STREAMS)
    drawn = [integer(text, "--seeds") for text in names(seeds)]
    tell = partial(typer.echo, err=True)
    rows = measure(chosen, drawn, data_dir, cells, allow_code_execution, tell)
    typer.echo(json.dumps(rows, indent=1) if json_ else markdown(rows))
    if to is not None:
        write(rows, to, shlex.join(["cl-graft", *sys.argv[1:]]))


@app.command("compose")
def bench_compose(
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Peak memory of strategies over five tasks on a random Llama of 103 M parameters, training left out."""
    measure = _benchmark("compose")

    figures = measure(say=lambda what: typer.echo(what, err=True))
    if json_:
        typer.echo(json.dumps(figures, indent=1))
        return
    for name, run in figures["runs"].items():
        typer.echo(f"{name:16} {run['peak_mb']:6.0f} MB at most, {run['kept_mb']:6.0f} MB kept")
    typer.echo(f"ties over individual {figures['ties_over_individual']:.2f}")


@app.command("train")
def bench_train(
    data_dir: DataDir = None,
    only: Annotated[
        str,
        typer.Option(
            help="Parts, comma-separated: loop, on random models; classification and math, on SmolLM2, which "
            "`cl-graft models fetch` gets."
        ),
    ] = "loop,classification,math",
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """An SFT stage beside a bare PyTorch loop over the same batches: time, set-up, memory, and where it goes.

    On SmolLM2 beside plain TRL on the same rows: `classification_speedup` and `math_speedup` are examples a second
    over TRL's, by the processor's time.
    """
    measure = _benchmark("train")
    from cl_graft.bench.train import markdown

    figures = measure(names(only), data_dir, lambda what: typer.echo(what, err=True))
    typer.echo(json.dumps(figures, indent=1) if json_ else markdown(figures))


@app.command("evaluate")
def bench_evaluate(
    model: Annotated[str, typer.Option(help="Name or path.")] = "smollm2-135m",
    turns: Annotated[int, typer.Option(min=1, help="That each way has, one after the other.")] = 3,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Answers beside plain `generate`, choices beside a row for each pair: processor seconds, equality, memory."""
    measure = _benchmark("evaluate")
    from cl_graft.bench.evaluate import markdown

    figures = measure(model, turns, say=lambda what: typer.echo(what, err=True))
    typer.echo(json.dumps(figures, indent=1) if json_ else markdown(figures))


@app.command("sweep")
def bench_sweep(
    cells: Annotated[int, typer.Option(min=4, help="That only sleep.")] = 24,
    seconds: Annotated[float, typer.Option(min=0.1, help="That each sleeps.")] = 1.0,
) -> None:
    """What executors take beside the cells, and 4 Ray workers against 1, with cells that only sleep."""
    measure = _benchmark("sweep")

    for name, value in measure(cells, seconds).items():
        typer.echo(f"{name:16} {value:.3g}")


@app.command("report")
def bench_report(
    cells: Annotated[int, typer.Option(min=50, help="How many.")] = 500,
    examples: Annotated[int, typer.Option(min=1, help="Of each of their three tasks.")] = 64,
) -> None:
    """Seconds of a report of many cells, the first and one where nothing has changed, and the bytes of its page."""
    measure = _benchmark("report")

    typer.echo(
        json.dumps(measure(cells, examples, lambda what: typer.echo(what, err=True)), indent=1)
    )


@app.command("agreement")
def bench_agreement(
    data_dir: DataDir = None,
    some: Annotated[int, typer.Option(min=1, help="Of MATH's references.")] = 5000,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """The scorer `math` beside math-verify and lm-eval (where installed): on judged pairs and on MATH's references."""
    measure = _benchmark("agreement")
    from cl_graft.bench.agreement import table

    figures = measure(data_dir, some, lambda what: typer.echo(what, err=True))
    if json_:
        typer.echo(json.dumps(figures, indent=1, ensure_ascii=False))
    else:
        print_tables([table(figures)])
