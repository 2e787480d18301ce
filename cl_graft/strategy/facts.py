"""What there is to know of a method before it is run, from what its class and file declare."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from cl_graft import plugins
from cl_graft.errors import CLGraftError
from cl_graft.strategy.base import Strategy
from cl_graft.strategy.kept import Keeps

ARXIV = re.compile(r"\b\d{4}\.\d{4,5}\b")
STARTS = {"base": "base", "model": "model so far"}  # in words


@dataclass(frozen=True)
class Form:
    """A form of a method.

    convention: its value of the option of that name; empty where the method has one form. keeps: as of Strategy. told:
    whether it has to be told the task of a test prompt, or infer it. start: where a task's training starts.
    """

    convention: str
    keeps: Keeps
    told: bool
    start: str


@dataclass(frozen=True)
class Facts:
    """A method's forms, its default one first; whether it has to hold the budget; the arXiv numbers of its sources."""

    forms: tuple[Form, ...]
    budgeted: bool
    sources: tuple[str, ...]

    @property
    def told(self) -> str:
        """Whether it has to be told the task, for a table."""
        return self._by_form(lambda form: "yes" if form.told else "no")

    @property
    def start(self) -> str:
        """Where it is trained from, for a table."""
        return self._by_form(lambda form: STARTS[form.start])

    @property
    def keeps(self) -> str:
        """Which packs answer, for a table."""
        return self._by_form(lambda form: f"`{form.keeps}`")

    def _by_form(self, of: Callable[[Form], str]) -> str:
        """The default form's, and in brackets the others that differ."""
        first, *others = self.forms
        differ: dict[str, list[str]] = {}
        for form in others:
            if of(form) != of(first):
                differ.setdefault(of(form), []).append(f"`{form.convention}`")
        told = "; ".join(f"{', '.join(names)}: {what}" for what, names in differ.items())
        return f"{of(first)} ({told})" if told else of(first)


def facts(name: str) -> Facts:
    """The facts of the strategy called `name`. Raises UnknownName or CLGraftError as `plugins.load` does."""
    kind: type[Strategy] = plugins.load("strategy", name)
    if not (isinstance(kind, type) and issubclass(kind, Strategy)):
        raise CLGraftError(f"{name} is not a strategy; make it a subclass of cl_graft.Strategy.")
    if isinstance(kind.keeps, str):
        forms = [_form(kind, "", kind.keeps)]
    else:
        default = plugins.options(kind).get("convention")
        forms = [_form(kind, convention, keeps) for convention, keeps in kind.keeps.items()]
        forms.sort(key=lambda form: form.convention != default)
    sources = tuple(dict.fromkeys(ARXIV.findall(plugins.about("strategy", name))))
    return Facts(tuple(forms), kind.budgeted, sources)


def _form(kind: type[Strategy], convention: str, keeps: Keeps) -> Form:
    return Form(convention, keeps, keeps == "per_task", kind.start_by(keeps))
