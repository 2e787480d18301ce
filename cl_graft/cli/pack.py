"""`cl-graft pack`: commands on SkillPack files. Parse, call, print; heavy imports wait."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cl_graft.cli.convert import convert
from cl_graft.cli.packs import check_model, errors_of, load_pack, roles_of
from cl_graft.errors import CLGraftError, UnknownName
from cl_graft.report.packs import cell, print_rows, relative, role_rows, tensor_rows

if TYPE_CHECKING:
    from cl_graft.skillpack.tools.adapter import Tables

app = typer.Typer(help="Look into SkillPack files, and put them on models.", no_args_is_help=True)

BaseDir = Annotated[Path, typer.Option(help="Hugging Face folder that the pack was made on.")]
MaybeBase = Annotated[
    Path | None, typer.Option(help="Hugging Face folder of the base; tells the tensors' roles.")
]
PackFile = Annotated[Path, typer.Option(help="SkillPack file.")]
OutDir = Annotated[Path, typer.Option(help="New folder.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")]


@app.command()
def create(
    ctx: typer.Context,
    base: BaseDir,
    tuned: Annotated[
        Path,
        typer.Option(
            help="Hugging Face folder of the tuned model, or a PEFT adapter or GGUF file of it."
        ),
    ],
    out: Annotated[Path, typer.Option(help="SkillPack file to write.")],
    method: Annotated[
        str, typer.Option(help="graftllm_adaptive, or graftllm: the paper's policy.")
    ] = "graftllm_adaptive",
    budget: Annotated[str, typer.Option(help="Share of the base in bf16, or bytes: 5%, 800MB.")] = (
        "5%"
    ),
    calibration: Annotated[
        Path | None,
        typer.Option(help="JSONL of {text} or {prompt, completion} rows; none: data-free."),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Rows of the calibration file.")] = 128,
    length: Annotated[int, typer.Option(min=2, help="Most tokens of a row.")] = 2048,
    batch: Annotated[int, typer.Option(min=1, help="Rows that go through a layer together.")] = 8,
    prefix: Annotated[
        str, typer.Option(help="Layers read what the tuned or the compressed model feeds them.")
    ] = "tuned",
    policy: Annotated[
        Path | None, typer.Option(help="JSON or TOML file with options of the method.")
    ] = None,
    layout: Annotated[
        str | None, typer.Option(help="Of graftllm_adaptive's codes: small (default) or fast.")
    ] = None,
    solver: Annotated[
        str,
        typer.Option(
            help="cl-graft, or auto-gptq: the GPTQ class of auto-gptq 0.7.1, for --method graftllm."
        ),
    ] = "cl-graft",
    task: Annotated[str, typer.Option(help="Name of the skill, for the header.")] = "delta",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    lossless: Annotated[
        bool, typer.Option("--lossless", help="Keep every bit of the tuned model; no budget.")
    ] = False,
) -> None:
    """Two checkpoint folders to one pack; run it again to continue what was stopped."""
    if lossless:
        from cl_graft.cli.lossless import create_lossless

        return create_lossless(ctx, base, tuned, out, task)
    from cl_graft.cli.progress import bars, interruptible
    from cl_graft.skillpack.compress.create import Calibration
    from cl_graft.skillpack.compress.create import create as create_pack
    from cl_graft.skillpack.compress.policy import read_policy, solved_by
    from cl_graft.skillpack.compress.text import calibration_batches
    from cl_graft.skillpack.folders.checkpoint import Checkpoint
    from cl_graft.skillpack.folders.tuned import tuned_checkpoint
    from cl_graft.store.digests import peak_memory_mb

    options = solved_by(read_policy(method, policy, layout), solver)
    if prefix not in ("tuned", "compressed"):
        raise UnknownName("prefix", prefix, ["tuned", "compressed"])
    text = None
    tuned_checkpoint(tuned, Checkpoint(base))
    if calibration is not None:
        rows = {"samples": samples, "length": length, "batch": batch}
        spoken = tuned if any(tuned.glob("token*")) else base
        text = Calibration(calibration_batches(spoken, calibration, **rows), prefix=prefix)  # type: ignore[arg-type]
    with interruptible(), bars() as bar:
        created = create_pack(
            base,
            tuned,
            out,
            budget=budget,
            method=method,
            policy=options,
            calibration=text,
            task=task,
            device=device,
            progress=lambda what, done: bar(out.name, what, done),
        )
    for note in created.notes:
        typer.echo(note)
    if created.rounding:
        print_rows(created.rounding, f"Rounding of the sums in {base}'s dtype")
    seconds = ", ".join(f"{kind} {value:.0f} s" for kind, value in created.seconds.items())
    typer.echo(
        f"{out}: {created.bytes:,} bytes of {created.limit:,} ({created.bytes / created.limit:.1%})."
    )
    typer.echo(f"{seconds}; peak memory {peak_memory_mb():,.0f} MiB.")
    return None


@app.command()
def inspect(
    file: Path,
    base: MaybeBase = None,
    tuned: Annotated[
        Path | None, typer.Option(help="Folder of the tuned model; tells what the pack misses.")
    ] = None,
    json_: Json = False,
) -> None:
    """What is in a pack: header, bytes by role, and codec, bytes and error of every tensor."""
    from cl_graft.skillpack.tools.convert import layouts

    loaded, checkpoint = load_pack(file, base)
    roles, errors = roles_of(checkpoint), errors_of(loaded, checkpoint, tuned)
    header = {
        "task": loaded.task,
        "method": loaded.method,
        "options": loaded.options,
        "base": loaded.base,
        "versions": loaded.versions,
        "digest": loaded.digest,
        "added": loaded.added,
        "grown": loaded.grown,
        "files": {name: file.size for name, file in loaded.files.items()},
        "layout": ", ".join(layouts(loaded)),
        "bytes": file.stat().st_size,
    }
    tensors = tensor_rows(loaded, roles)
    totals = role_rows(tensors) if roles else []
    for row in tensors:
        if row["tensor"] in errors:
            row["error"] = relative([errors[row["tensor"]]])
    for total in totals if errors else []:
        names = [name for name in errors if (roles.get(name) or "(none)") == total["role"]]
        total["error"] = relative([errors[name] for name in names])
    if json_:
        typer.echo(json.dumps({**header, "roles": totals, "tensors": tensors}, indent=1))
        return
    for key, value in header.items():
        if value or key not in ("added", "grown", "files", "layout"):
            typer.echo(f"{'bytes on disk' if key == 'bytes' else key:14} {cell(value)}")
    if totals:
        print_rows(totals, "Bytes by role")
    print_rows(tensors if roles else [{k: v for k, v in t.items() if k != "role"} for t in tensors])


@app.command()
def verify(
    file: Path,
    base: MaybeBase = None,
    model: Annotated[
        str | None, typer.Option(help="Check that the pack is for this base, by name or hub id.")
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder with the data an embedded model is trained on.")
    ] = None,
) -> None:
    """Check everything about a pack: checksums, shapes, values, and its base if one is named."""
    loaded, checkpoint = load_pack(file, base)
    if checkpoint is not None:
        from cl_graft.skillpack.folders.apply import check_base, delta

        check_base(checkpoint, loaded)
    if model is not None:
        check_model(file, model, data_dir)
    for name in loaded.tensors:
        if checkpoint is not None:
            delta(checkpoint, loaded, name)
        elif not loaded.lossless:
            loaded.delta(name)
    if loaded.lossless and checkpoint is None:
        typer.echo(
            "Its tensors are bits beside the base's; name it by --base to have them decoded, too."
        )
    against = "".join(f", for base {named}" for named in (base, model) if named)
    typer.echo(f"{file} is whole: {len(loaded.tensors)} tensors of task {loaded.task!r}{against}.")


app.command()(convert)


@app.command()
def diff(a: Path, b: Path, base: MaybeBase = None, json_: Json = False) -> None:
    """Two packs side by side: codec, bytes, and how alike their deltas are."""
    from cl_graft.skillpack.tools.compare import compare

    (one, checkpoint), (other, _) = load_pack(a, base), load_pack(b, base)
    if checkpoint is None and (one.lossless or other.lossless):
        raise CLGraftError(
            "a lossless pack holds tuned weights and no delta to compare; name the base with --base."
        )
    comparison = compare(one, other, roles_of(checkpoint), checkpoint)
    rows, totals = (
        [row._asdict() for row in part] for part in (comparison.rows, comparison.totals)
    )
    if json_:
        whole = {"same_base": comparison.same_base, "totals": totals, "tensors": rows}
        typer.echo(json.dumps(whole, indent=1))
        return
    if not comparison.same_base:
        typer.echo("the packs are for different bases; their deltas start from different weights.")
    unused = {"codec_a", "codec_b", "role"}
    print_rows([{k: v for k, v in row.items() if k not in unused} for row in totals], "Totals")
    print_rows([{k: v for k, v in row.items() if v or k != "role"} for row in rows])


@app.command()
def apply(
    base: BaseDir,
    pack: PackFile,
    out: OutDir,
    dtype: Annotated[
        str | None, typer.Option(help="float32, float16 or bfloat16; none: the base's.")
    ] = None,
    rounding: Annotated[
        str,
        typer.Option(
            help="Of sums with a delta in 16 bits: stochastic (the mean error is zero), nearest (loses small deltas), "
            "or compensated (by what the layers compute on --calibration)."
        ),
    ] = "stochastic",
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="JSONL of {text} or {prompt, completion} rows, for --rounding compensated."
        ),
    ] = None,
) -> None:
    """Write base + pack as a Hugging Face folder."""
    from cl_graft.cli.form import calibrated, check_form
    from cl_graft.skillpack.folders.apply import apply_pack

    asked = check_form(dtype, rounding, calibration)
    loaded, _ = load_pack(pack, base)
    with calibrated(asked, calibration, base, loaded, out) as form:
        notes = apply_pack(base, loaded, out, form=form)
    for note in notes:
        typer.echo(note)
    typer.echo(f"{out}: {base} with task {loaded.task!r}.")


@app.command()
def remove(
    grafted: Annotated[Path, typer.Option(help="Folder that `pack apply` wrote.")],
    pack: PackFile,
    base: BaseDir,
    out: Annotated[Path | None, typer.Option(help="New folder for the base's tensors.")] = None,
) -> None:
    """Check bit for bit that a folder is base + pack; with --out, write the base again."""
    from cl_graft.skillpack.folders.apply import remove_pack

    loaded, _ = load_pack(pack, base)
    count = remove_pack(grafted, loaded, base, out)
    typer.echo(f"{grafted} is {base} with task {loaded.task!r}: {count} tensors, bit for bit.")
    if out is not None:
        typer.echo(f"{out}: the base again, without the pack.")


@app.command()
def export(
    pack: PackFile,
    base: BaseDir,
    out: Annotated[Path, typer.Option(help="New folder; of gguf, a new file.")],
    to: Annotated[
        str,
        typer.Option(
            help="peft (a LoRA adapter that PEFT, vLLM and SGLang read), token-rows (the same, with the changed rows "
            "of embedding and head), gguf (a LoRA adapter of llama.cpp), mlx (one of MLX), or hf (a whole model)."
        ),
    ],
    rank: Annotated[
        int | None, typer.Option(min=1, help="Most ranks of a module; adapters only.")
    ] = None,
    embeddings: Annotated[
        bool, typer.Option("--embeddings", help="Embedding and head as LoRA, too; adapters only.")
    ] = False,
) -> None:
    """Write a pack in a form that other programs read, and tell what that costs."""
    from cl_graft.skillpack.tools.adapter import adapter_of, totals
    from cl_graft.skillpack.tools.gguf_adapter import export_gguf
    from cl_graft.skillpack.tools.peft_adapter import export_mlx, export_peft

    forms = {"peft": export_peft, "token-rows": export_peft, "gguf": export_gguf, "mlx": export_mlx}
    if to not in (*forms, "hf"):
        raise UnknownName("form to export to", to, [*forms, "hf"])
    if to == "hf":
        if rank is not None or embeddings:
            option = "--rank" if rank is not None else "--embeddings"
            raise CLGraftError(f"{option} is for adapters; leave it out, or export --to peft.")
        return apply(base, pack, out)
    loaded = load_pack(pack, base)[0]
    tables: Tables = "rows" if to == "token-rows" else "lora" if embeddings else "none"
    adapter = adapter_of(loaded, base, rank, tables)
    rows = forms[to](adapter, out)
    shown = ("name", "codec", "rank", "error", "note")
    print_rows([{key: getattr(row, key) for key in shown} for row in rows])
    print_rows([total._asdict() for total in totals(rows)], "Error by role")
    size = sum(file.stat().st_size for file in (out.rglob("*") if out.is_dir() else [out]))
    typer.echo(
        f"{out}: an adapter of rank {adapter.rank} with {sum(row.kept for row in rows)} of {len(rows)} tensors, "
        f"{size:,} bytes."
    )
    if loaded.files:
        typer.echo(f"No adapter holds {', '.join(loaded.files)}, which the pack holds, too.")
    if loaded.files or not all(row.kept for row in rows):
        typer.echo("What was left out is in no adapter; --to hf writes all of the pack.")
    return None
