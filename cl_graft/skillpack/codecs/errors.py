"""The base of every error about SkillPacks, and those of a codec that nobody knows or that has no delta."""

from __future__ import annotations

from cl_graft.errors import CLGraftError


class SkillPackError(CLGraftError):
    """A pack that cannot be written, read or used."""


class UnknownCodec(SkillPackError):
    """A tensor is stored in a way that this code does not know."""


class NoDelta(SkillPackError):
    """A delta is asked for, and the pack has the tuned weights themselves."""
