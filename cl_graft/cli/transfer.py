"""`cl-graft transfer`: training data from source models' answers. Parse, call, print; heavy imports wait."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from cl_graft.cli.show import print_tables
from cl_graft.errors import CLGraftError, UnknownName

app = typer.Typer(help="Make training data from other models' answers.", no_args_is_help=True)


@app.command()
def build(
    source: Annotated[
        list[str], typer.Option(help="Model that answers: embedded, folder or hub id; repeatable.")
    ],
    prompts: Annotated[
        str, typer.Option(help="JSONL, CSV or Parquet file, SCENARIO/TASK, or a hub data set.")
    ],
    out: Annotated[Path, typer.Option(help="Folder of the data sets.")],
    task: Annotated[
        str | None,
        typer.Option(help="How answers are verified: SCENARIO/TASK, or a scorer of answers."),
    ] = None,
    reward_model: Annotated[
        str | None,
        typer.Option(help="Sequence classifier with one output, for prompts without a verifier."),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Answers per prompt and source.")] = 4,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.8,
    top_p: Annotated[
        float, typer.Option(max=1.0, help="Share of probability sampled from.")
    ] = 0.95,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest answer; the task's own, or else 512.")
    ] = None,
    min_gap: Annotated[
        float | None, typer.Option(min=0.0, help="Least gap of rewards in a pair.")
    ] = None,
    max_gap: Annotated[
        float | None, typer.Option(min=0.0, help="Greatest gap of rewards in a pair.")
    ] = None,
    logits: Annotated[
        int, typer.Option(min=0, help="Likeliest tokens of each source stored for the SFT rows.")
    ] = 0,
    limit: Annotated[int | None, typer.Option(min=1, help="First so many prompts only.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of sampling and of the scenario's data.")] = 0,
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder with the data sets that the scenario reads.")
    ] = None,
    backend: Annotated[str, typer.Option(help="hf, or vllm where it is installed.")] = "hf",
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat",
            help="Put prompts into each source's chat template, or never; by default where it has one.",
        ),
    ] = None,
    allow_code_execution: Annotated[
        bool,
        typer.Option(
            "--allow-code-execution", help="Run programs that the source wrote, in the sandbox."
        ),
    ] = False,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="name.option=value of the scenario or scorer.")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Sample, judge and select answers into an SFT and a DPO data set; run it again to continue."""
    from transformers.utils import logging

    from cl_graft.cli.progress import bars, interruptible
    from cl_graft.transfer.build import build as build_data
    from cl_graft.transfer.build import shortfall
    from cl_graft.transfer.config import BuildConfig
    from cl_graft.transfer.report import tables

    logging.set_verbosity_error()  # what matters of its warnings is checked, and said in a sentence
    if backend not in ("hf", "vllm"):
        raise UnknownName("backend", backend, ["hf", "vllm"])
    config = BuildConfig(
        sources=tuple(source),
        prompts=prompts,
        out=out,
        task=task,
        reward_model=reward_model,
        samples=samples,
        temperature=temperature,
        top_p=top_p,
        max_new_tokens=max_new_tokens,
        min_gap=min_gap,
        max_gap=max_gap,
        logits=logits,
        seed=seed,
        limit=limit,
        backend=backend,  # type: ignore[arg-type]
        chat=chat,
        data_dir=data_dir,
        options=_options(set_ or []),
        allow_code_execution=allow_code_execution,
    )
    with interruptible(), bars() as bar:
        built = build_data(config, lambda what, done: bar(out.name, what, done))
    if json_:
        typer.echo(json.dumps(built, indent=1))
    else:
        print_tables(tables(built))
        typer.echo(f"data: {out} ({built['sft']:,} SFT rows, {built['dpo']:,} DPO pairs)")
    if reason := shortfall(built, config):
        raise CLGraftError(reason)


def _options(sets: list[str]) -> dict[str, dict[str, Any]]:
    from cl_graft.plugins import parse_set

    chosen: dict[str, dict[str, Any]] = {}
    for owner, option, value in map(parse_set, sets):
        chosen.setdefault(owner, {})[option] = value
    return chosen
