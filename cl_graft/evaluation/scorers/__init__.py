"""How an answer is scored: a plug-in a file, and what is common to all of them."""

from cl_graft.evaluation.scorers.base import (
    Examinee,
    Scored,
    Scorer,
    asked_of_model,
    can_score,
    compared,
    conventions,
    described,
    judge_of,
    judges_of,
    needs_of,
    require_consents,
    resolved,
    score,
    scorer,
)

__all__ = [
    "Examinee",
    "Scored",
    "Scorer",
    "asked_of_model",
    "can_score",
    "compared",
    "conventions",
    "described",
    "judge_of",
    "judges_of",
    "needs_of",
    "require_consents",
    "resolved",
    "score",
    "scorer",
]
