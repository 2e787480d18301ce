"""A pack in another layout of its codes."""

from __future__ import annotations

from dataclasses import replace

from cl_graft.skillpack import codecs
from cl_graft.skillpack.codecs import CodeLayout
from cl_graft.skillpack.format.errors import CorruptPack
from cl_graft.skillpack.format.file import SkillPack


def converted(pack: SkillPack, layout: CodeLayout) -> SkillPack:
    """A pack with every tensor in this layout, as far as its codec has more than one; all else as it was.

    Raises CorruptPack where a tensor's codes cannot be read.
    """
    tensors = {}
    for name, encoded in pack.tensors.items():
        try:
            tensors[name] = codecs.relaid(encoded, layout)
        except ValueError as error:
            raise CorruptPack(f"tensor {name!r} of task {pack.task!r}: {error}") from error
    return replace(pack, tensors=tensors)


def of_one_layout(pack: SkillPack) -> list[str]:
    """Names of the tensors that `converted` leaves as they are whatever is asked for."""
    return [name for name, e in pack.tensors.items() if codecs.layout_name(e) is None]


def layouts(pack: SkillPack) -> list[str]:
    """Layouts of the tensors that have one, sorted."""
    return sorted({codecs.layout_name(e) or "" for e in pack.tensors.values()} - {""})
