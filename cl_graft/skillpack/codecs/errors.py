"""The base of every error about SkillPacks, and the one of a codec that nobody knows."""

from __future__ import annotations

from cl_graft.errors import CLGraftError


class SkillPackError(CLGraftError):
    """A pack that cannot be written, read or used."""


class UnknownCodec(SkillPackError):
    """A tensor is stored in a way that this code does not know."""
