"""What the shell offers when Tab is pressed: real names, read without importing anything heavy."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

Offered = list[tuple[str, str]]  # a word, and a line on it
LISTS = ("scenarios", "strategies", "scorers", "routers", "models", "budgets", "fields", "metrics")


def lists(incomplete: str) -> Offered:
    """Complete what `cl-graft list` lists."""
    return _fitting(incomplete, ((name, "") for name in LISTS))


def scenario(incomplete: str) -> Offered:
    """Complete the name of one scenario."""
    return _fitting(incomplete, _plugins("scenario"))


def strategy(incomplete: str) -> Offered:
    """Complete the name of one strategy."""
    return _fitting(incomplete, _plugins("strategy"))


def model(incomplete: str) -> Offered:
    """Complete the name of one embedded or published model."""
    return _fitting(incomplete, _models())


def published(incomplete: str) -> Offered:
    """Complete the name of one model that a command fetches."""
    return _fitting(incomplete, _published())


def scenarios(incomplete: str) -> Offered:
    """The next of comma-separated scenarios."""
    return _next(incomplete, _plugins("scenario"))


def strategies(incomplete: str) -> Offered:
    """The next of comma-separated strategies."""
    return _next(incomplete, _plugins("strategy"))


def models(incomplete: str) -> Offered:
    """The next of comma-separated models."""
    return _next(incomplete, _models())


def one_of(field: FieldInfo) -> Callable[[str], Offered] | None:
    """The next of the values that a field takes, if they can be counted."""
    from cl_graft.config import choices

    known = [(value, "") for value in choices(field)]

    def values(incomplete: str) -> Offered:
        return _next(incomplete, known)

    return values if known else None


def _plugins(kind: str) -> Offered:
    from cl_graft import plugins

    return [(name, plugins.about(kind, name)) for name in plugins.names(kind)]


def _models() -> Offered:
    from cl_graft.models.embedded import SPECS

    return [(name, spec.about) for name, spec in SPECS.items()] + _published()


def _published() -> Offered:
    from cl_graft.models.published import PUBLISHED

    return [(name, entry.about) for name, entry in PUBLISHED.items()]


def _fitting(incomplete: str, known: Iterable[tuple[str, str]]) -> Offered:
    return [(name, about) for name, about in known if name.startswith(incomplete)]


def _next(incomplete: str, known: Offered) -> Offered:
    before, comma, last = incomplete.rpartition(",")
    taken = before.split(",")
    return [(f"{before}{comma}{n}", about) for n, about in _fitting(last, known) if n not in taken]
