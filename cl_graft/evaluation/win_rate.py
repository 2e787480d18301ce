"""How often one model's answers are preferred to another's, and how often they would be at equal length."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np

    from cl_graft.evaluation.scorers import Scored

NOTE = re.compile(
    r"(\w+) first, (\w+) second; (\d+) against (\d+) characters; (\d+) calls, (\d+) \+ (\d+) tokens"
)


class Compared(NamedTuple):
    """What came of one example, as its note tells it.

    first, second: how the answer fared in either place: won, tied, lost, or unclear. length, other: characters of the
    answer and of the base's. calls: of the judge, for `read` and `written` tokens, kept verdicts counted as they were.
    """

    first: str
    second: str
    length: int
    other: int
    calls: int
    read: int
    written: int

    @property
    def note(self) -> str:
        return (
            f"{self.first} first, {self.second} second; {self.length} against {self.other} characters; "
            f"{self.calls} calls, {self.read} + {self.written} tokens"
        )

    @classmethod
    def of(cls, note: str) -> Compared | None:
        """What a note tells; None for one of another kind."""
        told = NOTE.fullmatch(note)
        return cls(told[1], told[2], *map(int, told.groups()[2:])) if told else None


def length_controlled(
    preferences: Sequence[float], lengths: Sequence[int], others: Sequence[int]
) -> float:
    """The win rate that a logistic regression expects of answers as long as the other's (arXiv 2404.04475).

    preferences: one an example, 0 (lost) to 1 (won), 0.5 a tie. lengths, others: characters of the two answers.
    As in AlpacaEval 2, logit P(won) = theta + phi * tanh(d / std(d)) with d the difference of lengths, and what is
    given is P at d = 0. AlpacaEval has a term for how hard each of its own prompts is, from the answers of many models,
    which other prompts do not have, and chooses the weight of phi's ridge by cross-validation, which is 1 here.
    Raises ValueError where there is no example, or not as many of each.
    """
    import numpy as np
    from scipy.optimize import minimize
    from scipy.special import expit

    won = np.asarray(preferences, float)
    if not len(won) or not len(won) == len(lengths) == len(others):
        raise ValueError("give at least one preference, and two lengths for each")
    apart = np.asarray(lengths, float) - np.asarray(others, float)
    if won.min() == won.max() or not apart.std():
        return float(
            won.mean()
        )  # theta of all won is infinite, and without differences it is the mean's
    x = np.tanh(apart / apart.std())

    def loss(theta_phi: np.ndarray) -> tuple[float, np.ndarray]:
        theta, phi = theta_phi
        logits = theta + phi * x
        off = expit(logits) - won
        value = np.logaddexp(0, logits).sum() - won @ logits + phi**2 / 2
        return value, np.array([off.sum(), off @ x + phi])

    fit = minimize(loss, np.zeros(2), jac=True, method="BFGS", options={"gtol": 1e-9})
    return float(expit(fit.x[0]))


def at_equal_length(outcomes: Sequence[Scored]) -> float | None:
    """`length_controlled` of a pairwise judge's outcomes; None for those of another scorer."""
    found = [told for outcome in outcomes if (told := Compared.of(outcome.note))]
    if not found or len(found) < len(outcomes):
        return None
    return length_controlled(
        [outcome.score for outcome in outcomes],
        [told.length for told in found],
        [told.other for told in found],
    )
