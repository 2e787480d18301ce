"""What can be wrong with a SkillPack, each by its own name."""

from __future__ import annotations

from cl_graft.skillpack.codecs.errors import NoDelta, SkillPackError, UnknownCodec

__all__ = [
    "CorruptPack",
    "NoDelta",
    "NonFinite",
    "NotASkillPack",
    "PackNotFound",
    "ShapeMismatch",
    "SkillPackError",
    "TruncatedPack",
    "UnknownCodec",
    "UnsupportedVersion",
    "WrongBase",
]


class PackNotFound(SkillPackError):
    """A path at which there is no file."""


class NotASkillPack(SkillPackError):
    """A file of another kind."""


class TruncatedPack(SkillPackError):
    """A file that ends too early."""


class CorruptPack(SkillPackError):
    """The file is not what `save` wrote."""


class UnsupportedVersion(SkillPackError):
    """A format that this code does not read."""


class ShapeMismatch(SkillPackError):
    """A tensor that the base does not have, or not in this shape."""


class WrongBase(SkillPackError):
    """A delta of another base."""


class NonFinite(SkillPackError):
    """NaN or Inf among the values."""
