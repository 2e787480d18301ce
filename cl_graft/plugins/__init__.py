"""Plug-ins of every kind: found by name, entry point or path; their options; and the files they are made of."""

from cl_graft.plugins.authors import authored, line_of, line_with, place, reason, require_call
from cl_graft.plugins.find import (
    about,
    file_of,
    import_file,
    load,
    names,
    origin,
    sources,
    sources_of,
    within,
)
from cl_graft.plugins.kinds import KINDS, Kind
from cl_graft.plugins.signature import (
    check_options,
    choices,
    declared,
    options,
    parse_set,
    strength,
)

__all__ = [
    "KINDS",
    "Kind",
    "about",
    "authored",
    "check_options",
    "choices",
    "declared",
    "file_of",
    "import_file",
    "line_of",
    "line_with",
    "load",
    "names",
    "options",
    "origin",
    "parse_set",
    "place",
    "reason",
    "require_call",
    "sources",
    "sources_of",
    "strength",
    "within",
]
