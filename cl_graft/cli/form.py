"""How `cl-graft pack apply` is told to write weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from cl_graft.cli.progress import bars
from cl_graft.errors import CLGraftError, UnknownName
from cl_graft.skillpack.compress.text import calibration_batches
from cl_graft.skillpack.folders.apply import check_base
from cl_graft.skillpack.folders.checkpoint import Checkpoint
from cl_graft.skillpack.folders.form import DTYPES, ROUNDINGS, Form
from cl_graft.skillpack.format.file import SkillPack


def check_form(dtype: str | None, rounding: str, calibration: Path | None) -> Form:
    """What the options ask for. Raises UnknownName, or CLGraftError where they do not go together."""
    if dtype is not None and dtype not in DTYPES:
        raise UnknownName("dtype", dtype, DTYPES)
    if rounding not in ROUNDINGS:
        raise UnknownName("rounding", rounding, ROUNDINGS)
    if (calibration is not None) != (rounding == "compensated"):
        raise CLGraftError(
            "compensated rounding goes by calibration text, and no other does; give both --rounding compensated and "
            "--calibration FILE, or neither."
        )
    return Form(None if dtype is None else DTYPES[dtype], rounding)  # type: ignore[arg-type]


@contextmanager
def calibrated(
    form: Form, text: Path | None, base: Path, pack: SkillPack, out: Path
) -> Iterator[Form]:
    """The form with the roundings that calibration text decides; moments lie beside `out` meanwhile."""
    if text is None:
        yield form
        return
    from cl_graft.skillpack.tools.compensate import compensation

    checkpoint = Checkpoint(base)
    check_base(checkpoint, pack)
    batches = calibration_batches(base, text, samples=128, length=2048, batch=8)
    beside = out.absolute().parent
    beside.mkdir(parents=True, exist_ok=True)
    with bars() as bar:
        told = partial(bar, out.name, "calibrating")
        with compensation(checkpoint, pack, batches, beside, told) as compensate:
            yield replace(form, compensate=compensate)
