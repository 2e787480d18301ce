"""The storage a method may use for one task, and the search that makes it fit."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from cl_graft.errors import CLGraftError, OverBudget

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclass(frozen=True)
class Budget:
    """Storage allowed per task.

    text: as declared. `10%` is ten per cent of the base's bytes in bf16, measured as bytes on disk with
    masks, scales and headers; `800MB` is absolute. `10%:weights` is the convention of the GraftLLM paper's
    comparison: ten per cent of the base's weights, 16 bits each, with masks, scales and headers not counted.
    parameters: number of parameters of the base. less: bytes of it that are spoken for, by what tasks share.
    """

    text: str
    parameters: int
    less: int = 0

    def __post_init__(self) -> None:
        if not re.fullmatch(r"(\d+(\.\d+)?)(%(:weights)?|[KMG]?B)", self.text) or self._whole <= 0:
            raise CLGraftError(
                f"budget {self.text!r} is not a size: write a share of the base such as 10%, "
                "a share of its weights such as 10%:weights, or bytes such as 800MB."
            )

    @property
    def counts_weights(self) -> bool:
        return self.text.endswith(":weights")

    @property
    def base_bytes(self) -> int:
        return 2 * self.parameters

    @property
    def bytes(self) -> int:
        return self._whole - self.less

    @property
    def _whole(self) -> int:
        number, unit = re.match(r"([\d.]+)(%|\w+)", self.text).groups()  # type: ignore[union-attr]
        share = Fraction(self.base_bytes, 100) if unit == "%" else UNITS[unit]
        return int(Fraction(number) * share)  # in floats, 50% of 58 bytes would be 28


def largest(fits: Callable[[int], bool], low: int, high: int) -> int:
    """The largest integer in [low, high] that fits, where fitting is monotone; `low - 1` if none does."""
    if low > high or not fits(low):
        return low - 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def largest_within(
    budget: Budget,
    cost: Callable[[int], int],
    high: int,
    one: str,
    given: int | None = None,
    name: str = "the count",
) -> int:
    """The largest count in [1, high] whose `cost`, in bytes, the budget allows; cost never falls as counts rise.

    one: what the smallest count is of what, for the sentence. given: the count that the user's option `name` asks for,
    which is the answer if it is possible. Raises OverBudget where the smallest, or the one given, costs too much, and
    CLGraftError for a given one above `high`.
    """
    if given is not None and given <= high and cost(given) <= budget.bytes:
        return given
    count = _affordable(cost, budget.bytes, high)
    if count < 1:
        raise OverBudget(
            f"the budget {budget.text} ({budget.bytes} bytes) does not hold {one}; raise it."
        )
    if given is None:
        return count
    if given > high:
        raise CLGraftError(
            f"{name}={given} is more than the {high} that there are; the largest that also fits the budget "
            f"{budget.text} is {count}."
        )
    raise OverBudget(
        f"{name}={given} takes {cost(given)} bytes and the budget {budget.text} allows {budget.bytes}; the largest "
        f"that fits is {count}."
    )


def _affordable(cost: Callable[[int], int], limit: int, high: int) -> int:
    """The largest count in [1, high] that costs at most the limit; 0 if none does.

    It is looked for where a cost that grows evenly would have it, since to tell a cost means to encode, and every third
    time in the middle of what is left, which bounds how often any other cost is asked for.
    """
    low, below, over, above = 0, 0, high + 1, 0
    guesses, fitted = 0, False
    while over - low > 1:
        count = (low + over) // 2 if low else 1
        if low and above:
            guesses += 1
            if guesses % 3:
                even = low + (limit - below) * (over - low) // (above - below)
                count = min(max(even + fitted, low + 1), over - 1)
        found = cost(count)
        fitted = found <= limit
        if fitted:
            low, below = count, found
        elif count == 1:
            return 0
        else:
            over, above = count, found
    return low


def largest_share(
    budget: Budget,
    cost: Callable[[int], int],
    parts: int,
    one: str,
    given: float | None,
    name: str,
) -> int:
    """The largest share that the budget allows, counted in so many parts, or `given`, if that is possible.

    Returns parts, 1 or more. Raises OverBudget.
    """
    if given is None:
        return largest_within(budget, cost, parts, one)
    wanted = max(1, round(given * parts))
    if cost(wanted) <= budget.bytes:
        return wanted
    most = largest_within(budget, cost, wanted, one)
    raise OverBudget(
        f"{name}={given:g} takes {cost(wanted)} bytes and the budget {budget.text} allows {budget.bytes}; the largest "
        f"that fits is {int(1e4 * most / parts) / 1e4:g}."
    )
