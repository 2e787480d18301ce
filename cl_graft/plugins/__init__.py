"""Plug-ins of every kind: found by name, entry point or path; their options; and the files they are made of."""

from cl_graft.plugins.find import (
    KINDS,
    Kind,
    about,
    import_file,
    load,
    names,
    origin,
    sources,
    sources_of,
    within,
)
from cl_graft.plugins.signature import check_options, choices, options, parse_set

__all__ = [
    "KINDS",
    "Kind",
    "about",
    "check_options",
    "choices",
    "import_file",
    "load",
    "names",
    "options",
    "origin",
    "parse_set",
    "sources",
    "sources_of",
    "within",
]
