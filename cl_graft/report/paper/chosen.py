"""Who is named in a figure for a paper: 45 curves in 45 colours tell a reader nothing.

Methods that are told the task at test and methods that are not have a panel each. Of more than ALL strategies in a
panel, these are named and in colour: the NAMED with the best OP among those that hold the budget, the references, and
whom the author asks for. The others are grey.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from cl_graft.errors import UnknownName
from cl_graft.report.aggregate import Line, lines_of
from cl_graft.report.protocols import TOLD, UNTOLD, Cell
from cl_graft.report.references import REFERENCES
from cl_graft.report.style import KNOWN, MARKERS, PALETTE, looks_of, shortened

NAMED, ALL = 5, 8
LONGEST = 26  # characters of a name in a figure
ALWAYS = ("sequential", *REFERENCES)
GREY = "#888888"  # of PALETTE
INFERRED = "task_ids=inferred"  # a panel says it
RULE = (
    f"Named are the {NAMED} with the best OP within the budget, {', '.join(ALWAYS[:-1])} and {ALWAYS[-1]}; the "
    "other "
)


Looks = dict[str, dict[str, Any]]  # {short name: colour, marker, fill and dash}


class _Look(NamedTuple):
    name: str
    strategy: str
    complete: bool = True


@dataclass(frozen=True)
class Panel:
    """Lines that may be compared. part: UNTOLD or TOLD. lines: complete ones, the best OP first. named: those with a
    look, in their order."""

    part: str
    lines: tuple[Line, ...]
    named: tuple[Line, ...]

    @property
    def rest(self) -> tuple[Line, ...]:
        """The lines that are grey."""
        return tuple(line for line in self.lines if line not in self.named)

    @property
    def title(self) -> str:
        """What stands above it."""
        return self.part.removesuffix(" at test")


def panels(cells: Sequence[Cell], wanted: Collection[str] = ()) -> list[Panel]:
    """The panels that cells of one group fill. wanted: strategies or labels that are named whatever their rank."""
    lines = [line for line in lines_of(cells) if line.complete]
    found = []
    for part in (UNTOLD, TOLD):
        own = [line for line in lines if line.part.startswith(part)]
        own.sort(key=lambda line: -line.metric("op")[0])
        best = [line for line in own if line.part == part][:NAMED]
        named = tuple(
            line
            for line in own
            if len(own) <= ALL
            or line in best
            or line.strategy in ALWAYS
            or {line.strategy, line.name} & {*wanted}
        )
        found += [Panel(part, tuple(own), named)] if own else []
    return found


def check(cells: Iterable[Cell], wanted: Iterable[str]) -> None:
    """Raises UnknownName for a name in `wanted` that is neither a strategy nor a label of these cells."""
    known = {cell[key] for cell in cells for key in ("strategy", "label")}
    for name in wanted:
        if name not in known:
            raise UnknownName("strategy among these cells", name, known)


def short_names(labels: Iterable[str], most: int = LONGEST) -> dict[str, str]:
    """{label: the strategy's name, with those of its options that tell it from its other labels}.

    An option that alone tells a strategy's labels apart is there by its value. That tasks are inferred is left out:
    methods that are told the task are never beside it. most: characters, beyond which a name is without its middle.
    """
    options: dict[str, dict[str, list[str]]] = {}
    for label in labels:
        strategy, _, told = label.removesuffix(")").partition("(")
        own = [option for option in told.split(", ") if option and option != INFERRED]
        options.setdefault(strategy, {})[label] = own
    short = {}
    for strategy, by_label in options.items():
        common = set.intersection(*map(set, by_label.values()))
        differ = {k: [o for o in own if o not in common] for k, own in by_label.items()}
        keys = {option.partition("=")[0] for own in differ.values() for option in own}
        for label, own in differ.items():
            told = ", ".join(o.partition("=")[2] if len(keys) == 1 else o for o in own)
            short[label] = f"{strategy} ({told})" if told else strategy
    names = list(dict.fromkeys(short.values()))  # a name may be of two labels
    cut = dict(zip(names, shortened(names, most), strict=True))
    return {label: cut[name] for label, name in short.items()}


def looks(shown: Sequence[Panel], short: Mapping[str, str]) -> Looks:
    """{short name: colour, marker, fill and dash} of all that are named.

    A strategy has the colour and the marker that it has on the page, unless another one of a panel has them: then it
    has the first that are free, since colours alone do not tell strategies apart for every reader. GREY is of others.
    """
    named = [line for panel in shown for line in panel.named]
    found = looks_of(list({_Look(short[line.name], line.strategy) for line in named}))
    beside: dict[str, set[str]] = {}
    for panel in shown:
        for line in panel.named:
            beside.setdefault(line.strategy, set()).update(s.strategy for s in panel.named)
    for key, all_ in (("color", PALETTE), ("marker", MARKERS)):
        chosen: dict[str, str] = {}
        for line in sorted(named, key=_known):
            if line.strategy not in chosen:
                own = found[short[line.name]][key]
                near = {chosen.get(other) for other in beside[line.strategy]}
                free = [x for x in (own, *all_) if x not in near and x != GREY]
                alone = [x for x in free if x not in chosen.values()]
                chosen[line.strategy] = (*alone, *free, own)[0]
        for line in named:
            found[short[line.name]][key] = chosen[line.strategy]
    return found


def _known(line: Line) -> int:
    """The place among KNOWN, so that the colours that readers know by now move last."""
    return KNOWN.index(line.strategy) if line.strategy in KNOWN else len(KNOWN)


def told(shown: Sequence[Panel]) -> str:
    """The rule as sentences of a caption, where it was applied; with the number of seeds."""
    seeds = sorted({len(line.cells) for panel in shown for line in panel.lines})
    over = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    counts = [str(len(panel.rest)) for panel in shown if panel.rest]
    rule = f"{RULE}{' and '.join(counts)} are grey. " if counts else ""
    return f"{rule}Means over {over} seed{'s' if seeds[-1] > 1 else ''}."
