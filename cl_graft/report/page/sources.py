"""Digests of what a figure and a page are made of: told cheaply, by the times and sizes of a cell's files."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib import metadata, resources

from cl_graft.report import (
    ReportedCell,
    aggregate,
    budgets,
    divergence,
    examples,
    figures,
    panels,
    protocols,
    provenance,
    routing,
    style,
    table,
    tables,
    tradeoff,
    units,
)
from cl_graft.store import digests, prompts


@cache
def of_figures() -> str:
    """The code that draws figures, and the version of the library that it draws with."""
    drawn = (
        budgets,
        divergence,
        figures,
        aggregate,
        protocols,
        panels,
        routing,
        style,
        table,
        tables,
        tradeoff,
    )
    code = digests.code_digest(*drawn)
    return digests.digest(code, metadata.version("matplotlib"))


@cache
def of_pages() -> str:
    """The code and the templates that make a cell's page."""
    from cl_graft.report.page import cell, template

    hashed = hashlib.blake2b(digest_size=16)
    code = (
        examples,
        provenance,
        aggregate,
        protocols,
        routing,
        table,
        tables,
        units,
        cell,
        template,
        prompts,
    )
    hashed.update(digests.code_digest(*code).encode())
    for file in sorted(resources.files(__package__).joinpath("templates").iterdir(), key=str):
        hashed.update(file.read_bytes())
    return hashed.hexdigest()


def of_cell(reported: ReportedCell, group: str) -> str:
    """What a cell's page is made of. group: the section of the index that it leads back to."""
    path, cell = reported.path, reported.cell
    files = [
        path / "cell.json",
        path / "result.json",
        *sorted(path.glob("experiences/*/experience.json")),
    ]
    files.append(prompts.file(path.parent, cell.get("data", "")))
    told = [(str(f), f.stat().st_mtime_ns, f.stat().st_size) for f in files if f.is_file()]
    # names, for those of plugins hang on what else is reported
    return digests.digest(told, group, cell["label"], cell["scenario"], cell["model"], of_pages())
