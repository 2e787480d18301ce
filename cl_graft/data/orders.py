"""Orders of tasks: a published one by its number, or any list of names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from cl_graft.errors import CLGraftError, UnknownName


def ordered(
    scenario: str, order: int | str, published: Mapping[int, Sequence[str]], known: Iterable[str]
) -> tuple[str, ...]:
    """Names of tasks by a published order's number, or as a list says them, joined by commas.

    Raises CLGraftError for the number of no order, UnknownName for a task that there is none of.
    """
    if str(order).lstrip("-").isdigit():
        if int(order) not in published:
            numbers = ", ".join(map(str, published))
            raise CLGraftError(
                f"{scenario}.order={order} is none of the published orders {numbers}; choose one, or list tasks as "
                f"{scenario}.order={','.join(next(iter(published.values()))[:2])}."
            )
        return tuple(published[int(order)])
    names = tuple(name.strip() for name in str(order).split(","))
    for name in names:
        if name not in {*known}:
            raise UnknownName(f"task of {scenario}", name, known)
    return names
