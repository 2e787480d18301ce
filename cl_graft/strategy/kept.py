"""What a method keeps of a task: a pack of its own, and artefacts that its tasks share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from cl_graft.skillpack.codecs import Encoded

Tensors = Mapping[str, Encoded]


@dataclass(frozen=True)
class Kept:
    """What `learn` returns where a task's own tensors are not all.

    own: the delta of the task, {parameter name: encoded}; what answers for it, unless `compose` says otherwise.
    shared: {name of an artefact: its tensors, under names of the method's choice}: Fisher information, a buffer of
    examples, a vector of all tasks. Each takes the place of the last one of its name; the others stay.
    """

    own: Tensors
    shared: Mapping[str, Tensors] = field(default_factory=dict)
