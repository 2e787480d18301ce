"""F measure of the longest common subsequence of words with the reference: ROUGE-L (Lin 2004) as rouge-score has it."""

from __future__ import annotations

import re

from cl_graft.evaluation import porter, sequences
from cl_graft.evaluation.scorers.base import scorer
from cl_graft.store.digests import code_digest
from cl_graft.task import Example


@scorer(
    convention="F of rouge-score 0.1.2's rougeL, Porter stems: {stem}; 0 to 1",
    identity={"code": code_digest(porter, sequences)},
)
def rouge_l(example: Example, answer: str, *, stem: bool = True) -> float:
    """stem: compare words of four letters and more by their Porter stems, as the published figures of SuperNI do."""
    said, wanted = words(answer, stem), words(example.completion, stem)
    if not said or not wanted:
        return 0.0
    return 2 * sequences.common(wanted, said) / (len(said) + len(wanted))


def words(text: str, stem: bool) -> list[str]:
    """Runs of a-z and 0-9 in small letters: all other signs part words, and letters of other scripts are none."""
    found = re.findall(r"[a-z0-9]+", text.lower())
    return [porter.stem(word) if len(word) > 3 else word for word in found] if stem else found
