"""What a declared budget means in bytes, and the search that meets it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cl_graft.budget import Budget, largest, largest_within
from cl_graft.errors import CLGraftError, OverBudget

BASE = 1_000_000  # parameters, so 2,000,000 bytes in bf16


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("10%", 200_000),
        ("2.5%", 50_000),
        ("100%", 2_000_000),
        ("250%", 5_000_000),
        ("10%:weights", 200_000),
        ("512B", 512),
        ("20KB", 20_000),
        ("800MB", 800_000_000),
        ("1.5GB", 1_500_000_000),
    ],
)
def test_a_budget_in_bytes(text: str, size: int) -> None:
    assert Budget(text, BASE).bytes == size
    assert Budget(text, BASE).base_bytes == 2_000_000


def test_only_the_papers_convention_counts_weights_alone() -> None:
    assert Budget("10%:weights", BASE).counts_weights
    assert not Budget("10%", BASE).counts_weights
    assert not Budget("800MB", BASE).counts_weights


REFUSED = ["", "ten", "10", "-1", "-1%", "0%", "0MB", "10 %", "%", "1e3MB", "10%%", "10mb"]
REFUSED += ["10.%", ".5%", "1.2.3%", "10%:", "10%:bytes", "5MB:weights", "10%\n", "nan%", "5TB"]


@pytest.mark.parametrize("text", REFUSED)
def test_what_is_no_size_is_refused_in_one_sentence(text: str) -> None:
    with pytest.raises(CLGraftError) as refused:
        Budget(text, BASE)
    message = str(refused.value)
    assert repr(text) in message and "10%" in message and "800MB" in message
    assert "\n" not in message and message.endswith(".")


def test_a_share_that_rounds_to_no_byte_is_refused() -> None:
    assert Budget("10%", 5).bytes == 1
    with pytest.raises(CLGraftError):
        Budget("10%", 4)


@settings(deadline=None)
@given(st.integers(1, 10**12), st.integers(1, 100))
@example(29, 50)
def test_a_share_is_exact_in_integers(parameters: int, share: int) -> None:
    """In floats 50% of 58 bytes would be 28."""
    wanted = 2 * parameters * share // 100
    if wanted:
        assert Budget(f"{share}%", parameters).bytes == wanted


@settings(deadline=None)
@given(st.integers(-5, 30), st.integers(-5, 30), st.integers(-10, 40))
def test_largest_agrees_with_a_linear_scan(low: int, high: int, limit: int) -> None:
    asked: list[int] = []

    def fits(n: int) -> bool:
        asked.append(n)
        return n <= limit

    scan = low - 1
    for n in range(low, high + 1):
        if n <= limit:
            scan = n
    assert largest(fits, low, high) == scan
    assert all(low <= n <= high for n in asked)


def test_largest_asks_a_logarithmic_number_of_times() -> None:
    asked: list[int] = []
    assert largest(lambda n: asked.append(n) or n <= 654_321, 1, 10**6) == 654_321  # type: ignore[func-returns-value]
    assert len(asked) <= 22


def within(costs: Callable[[int], int], limit: int, high: int) -> tuple[int, list[int]]:
    """The largest count that the budget allows, and the counts whose costs were asked for."""
    asked: list[int] = []

    def cost(n: int) -> int:
        asked.append(n)
        return costs(n)

    return largest_within(Budget(f"{limit}B", 1), cost, high, "one"), asked


@settings(deadline=None)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=60), st.integers(1, 900))
def test_largest_within_agrees_with_a_linear_scan(steps: list[int], limit: int) -> None:
    """Costs that do not fall, by any steps, none among them."""
    costs = [sum(steps[:n]) for n in range(len(steps) + 1)]
    fitting = [n for n in range(1, len(steps) + 1) if costs[n] <= limit]
    if not fitting:
        with pytest.raises(OverBudget, match="does not hold one"):
            within(costs.__getitem__, limit, len(steps))
        return
    found, asked = within(costs.__getitem__, limit, len(steps))
    assert found == max(fitting)
    assert len(asked) == len(set(asked)) and all(1 <= n <= len(steps) for n in asked)


@pytest.mark.parametrize(
    ("costs", "most"),
    [
        (lambda n: 100 + 3 * n, 5),
        (lambda n: 100 + 3 * n + n // 7, 7),
        (lambda n: n * n, 20),
        (lambda n: 0 if n < 700_000 else 10**12, 60),
    ],
    ids=["even", "almost even", "square", "a jump"],
)
def test_costs_that_grow_evenly_are_asked_for_a_few_times(
    costs: Callable[[int], int], most: int
) -> None:
    limit = costs(654_321)
    found, asked = within(costs, limit or 5, 10**6)
    assert costs(found) <= (limit or 5) < costs(found + 1)
    assert len(asked) <= most
