"""What the commands on packs share: a pack beside its base, roles, and what it misses."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from cl_graft.errors import CLGraftError

if TYPE_CHECKING:
    from cl_graft.skillpack.folders.checkpoint import Checkpoint
    from cl_graft.skillpack.format.file import SkillPack


def load_pack(file: Path, base: Path | None) -> tuple[SkillPack, Checkpoint | None]:
    """The pack and, if a folder is given, its base; only shapes are held against each other."""
    from cl_graft.skillpack.folders.checkpoint import Checkpoint
    from cl_graft.skillpack.format.file import SkillPack

    checkpoint = None if base is None else Checkpoint(base)
    tensors = None if checkpoint is None else checkpoint.tensors
    shapes = None if tensors is None else {name: info.shape for name, info in tensors.items()}
    return SkillPack.load(file, shapes=shapes), checkpoint


def roles_of(checkpoint: Checkpoint | None) -> dict[str, str]:
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


def check_model(file: Path, model: str, data_dir: Path | None) -> None:
    """Raise WrongBase unless a pack is for this model, by name or hub id."""
    from cl_graft.models.load import load
    from cl_graft.models.spread import named_weights
    from cl_graft.skillpack.format.file import SkillPack, WrongBase, fingerprint

    loaded = load(model, data_dir)[0]
    shapes = {name: tuple(p.shape) for name, p in loaded.named_parameters()}
    try:
        SkillPack.load(file, base=fingerprint(named_weights(loaded)), shapes=shapes)
    except WrongBase as error:
        raise WrongBase(f"model {model!r} is not the base of this pack: {error}") from error


def errors_of(
    pack: SkillPack, base: Checkpoint | None, tuned: Path | None
) -> dict[str, tuple[float, float]]:
    """{tensor: (squares of what the pack misses, squares of the delta)}; none without a tuned folder."""
    if tuned is None:
        return {}
    if base is None:
        raise CLGraftError("--tuned tells errors only beside --base; name both folders.")
    from cl_graft.skillpack.folders.apply import check_base
    from cl_graft.skillpack.folders.pair import pair
    from cl_graft.skillpack.folders.tuned import tuned_checkpoint
    from cl_graft.skillpack.tools.compare import missed

    check_base(base, pack)
    return missed(pack, pair(base, tuned_checkpoint(tuned, base)))
