"""`cl-graft pack convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cl_graft.errors import CLGraftError, UnknownName


def convert(
    file: Path,
    layout: Annotated[str, typer.Option(help="small (entropy-coded) or fast (aligned widths).")],
    out: Annotated[Path, typer.Option(help="SkillPack file to write.")],
) -> None:
    """Write a pack in the other layout, bit for bit the same: small to keep and send, fast to merge."""
    from cl_graft.skillpack.codecs.coded_rows import LAYOUTS
    from cl_graft.skillpack.format.file import SkillPack
    from cl_graft.skillpack.tools.convert import converted, layouts, of_one_layout

    if layout not in LAYOUTS:
        raise UnknownName("layout", layout, LAYOUTS)
    pack, before = SkillPack.load(file), file.stat().st_size
    if not layouts(pack):
        raise CLGraftError(
            f"no tensor of {file} has more than one layout; convert a pack of graftllm_adaptive."
        )
    written = converted(pack, layout).save(out)  # type: ignore[arg-type]
    typer.echo(f"{out}: {written:,} bytes in layout {layout}; {file} has {before:,}.")
    if alone := of_one_layout(pack):
        typer.echo(f"Tensors of one layout, which are as they were: {', '.join(alone)}.")
