"""`cl-graft pack`: commands on SkillPack files. Parse, call, print; heavy imports wait."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cl_graft.errors import CLGraftError, UnknownName
from cl_graft.report.packs import cell, print_rows, relative, role_rows, tensor_rows

if TYPE_CHECKING:
    from cl_graft.skillpack.folders.checkpoint import Checkpoint
    from cl_graft.skillpack.format.file import SkillPack

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
    base: BaseDir,
    tuned: Annotated[Path, typer.Option(help="Hugging Face folder of the tuned model.")],
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
    task: Annotated[str, typer.Option(help="Name of the skill, for the header.")] = "delta",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Two checkpoint folders to one pack; run it again to continue what was stopped."""
    from cl_graft.cli.progress import bars, interruptible
    from cl_graft.skillpack.compress.create import Calibration
    from cl_graft.skillpack.compress.create import create as create_pack
    from cl_graft.skillpack.compress.policy import read_policy
    from cl_graft.skillpack.compress.text import calibration_batches
    from cl_graft.skillpack.folders.checkpoint import Checkpoint
    from cl_graft.store.digests import peak_memory_mb

    options = read_policy(method, policy)
    if prefix not in ("tuned", "compressed"):
        raise UnknownName("prefix", prefix, ["tuned", "compressed"])
    text = None
    Checkpoint(base), Checkpoint(tuned)
    if calibration is not None:
        rows = {"samples": samples, "length": length, "batch": batch}
        text = Calibration(calibration_batches(tuned, calibration, **rows), prefix=prefix)  # type: ignore[arg-type]
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
    loaded, checkpoint = _load(file, base)
    roles, errors = _roles(checkpoint), _errors(loaded, checkpoint, tuned)
    header = {
        "task": loaded.task,
        "method": loaded.method,
        "options": loaded.options,
        "base": loaded.base,
        "versions": loaded.versions,
        "digest": loaded.digest,
        "added": loaded.added,
        "grown": loaded.grown,
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
        if value or key not in ("added", "grown"):
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
    loaded, checkpoint = _load(file, base)
    if checkpoint is not None:
        from cl_graft.skillpack.folders.apply import check_base

        check_base(checkpoint, loaded)
    if model is not None:
        _check_model(file, model, data_dir)
    for name in loaded.tensors:
        loaded.delta(name)
    against = "".join(f", for base {named}" for named in (base, model) if named)
    typer.echo(f"{file} is whole: {len(loaded.tensors)} tensors of task {loaded.task!r}{against}.")


@app.command()
def diff(a: Path, b: Path, base: MaybeBase = None, json_: Json = False) -> None:
    """Two packs side by side: codec, bytes, and how alike their deltas are."""
    from cl_graft.skillpack.tools.compare import compare

    (one, checkpoint), (other, _) = _load(a, base), _load(b, base)
    comparison = compare(one, other, _roles(checkpoint))
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
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            help="Folder, as of the tuned model, whose tokenizer, chat template, end token and generation settings "
            "are taken instead of the base's."
        ),
    ] = None,
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
    loaded, _ = _load(pack, base)
    with calibrated(asked, calibration, base, loaded, out) as form:
        notes = apply_pack(base, loaded, out, form=form, tokenizer=tokenizer)
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

    loaded, _ = _load(pack, base)
    count = remove_pack(grafted, loaded, base, out)
    typer.echo(f"{grafted} is {base} with task {loaded.task!r}: {count} tensors, bit for bit.")
    if out is not None:
        typer.echo(f"{out}: the base again, without the pack.")


@app.command()
def export(
    pack: PackFile,
    base: BaseDir,
    out: OutDir,
    to: Annotated[
        str,
        typer.Option(
            help="peft (a LoRA adapter), vllm (one without a head, which vLLM refuses for many models) or hf (a whole "
            "model)."
        ),
    ],
    rank: Annotated[
        int | None, typer.Option(min=1, help="Most ranks of a module; adapters only.")
    ] = None,
) -> None:
    """Write a pack in a form that other programs read, and tell what that costs."""
    if to not in ("peft", "vllm", "hf"):
        raise UnknownName("form to export to", to, ["peft", "vllm", "hf"])
    if to == "hf":
        if rank is not None:
            raise CLGraftError("--rank is for adapters; leave it out, or export --to peft.")
        return apply(base, pack, out)
    from cl_graft.skillpack.tools.export import export_peft

    rows = export_peft(_load(pack, base)[0], base, out, rank, head=to == "peft")
    print_rows([row._asdict() for row in rows])
    kept = sum(row.rank is not None for row in rows)
    typer.echo(f"{out}: a LoRA adapter with {kept} of {len(rows)} tensors.")
    if kept < len(rows):
        typer.echo("What was left out is in no adapter; --to hf writes all of the pack.")
    return None


# what the commands share


def _load(file: Path, base: Path | None) -> tuple[SkillPack, Checkpoint | None]:
    """The pack and, if a folder is given, its base; only shapes are held against each other."""
    from cl_graft.skillpack.folders.checkpoint import Checkpoint
    from cl_graft.skillpack.format.file import SkillPack

    checkpoint = None if base is None else Checkpoint(base)
    tensors = None if checkpoint is None else checkpoint.tensors
    shapes = None if tensors is None else {name: info.shape for name, info in tensors.items()}
    return SkillPack.load(file, shapes=shapes), checkpoint


def _roles(checkpoint: Checkpoint | None) -> dict[str, str]:
    """{tensor of the folder: role}; none without a folder, or where the model does not tell."""
    if checkpoint is None:
        return {}
    from cl_graft.models.meta_model import meta_model
    from cl_graft.models.roles import UnclearRoles

    meta = meta_model(checkpoint.folder)
    try:
        return {name: meta.role_of(name) for name in checkpoint.tensors}
    except UnclearRoles as error:
        typer.echo(f"no roles: {error}", err=True)
        return {}


def _check_model(file: Path, model: str, data_dir: Path | None) -> None:
    from cl_graft.models.load import load
    from cl_graft.skillpack.format.file import SkillPack, WrongBase, fingerprint

    parameters = dict(load(model, data_dir)[0].named_parameters())
    shapes = {name: tuple(p.shape) for name, p in parameters.items()}
    try:
        SkillPack.load(file, base=fingerprint(parameters.items()), shapes=shapes)
    except WrongBase as error:
        raise WrongBase(f"model {model!r} is not the base of this pack: {error}") from error


def _errors(
    pack: SkillPack, base: Checkpoint | None, tuned: Path | None
) -> dict[str, tuple[float, float]]:
    if tuned is None:
        return {}
    if base is None:
        raise CLGraftError("--tuned tells errors only beside --base; name both folders.")
    from cl_graft.skillpack.folders.apply import check_base
    from cl_graft.skillpack.folders.checkpoint import Checkpoint
    from cl_graft.skillpack.folders.pair import pair
    from cl_graft.skillpack.tools.compare import missed

    check_base(base, pack)
    return missed(pack, pair(base, Checkpoint(tuned)))
