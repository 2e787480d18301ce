"""Twice the common characters over all characters of answer and reference: the edit similarity of code completion."""

from __future__ import annotations

import re
from difflib import SequenceMatcher
from typing import Literal

from cl_graft.evaluation import sequences
from cl_graft.evaluation.scorers.base import scorer
from cl_graft.store.digests import code_digest
from cl_graft.task import Example

LITERALS = {"<NUM_LIT>": "0", "<STR_LIT>": "", "<CHAR_LIT>": ""}


@scorer(
    convention="ratio of {ratio}, literals of Py150 written out, not rounded; 0 to 1",
    identity={"code": code_digest(sequences)},
)
def edit_similarity(
    example: Example, answer: str, *, ratio: Literal["indel", "difflib"] = "indel"
) -> float:
    """ratio: `indel`, one less the insertions and deletions over both lengths (rapidfuzz, python-Levenshtein, and
    fuzzywuzzy where that is installed); or `difflib`, fuzzywuzzy's without it.
    """
    said, wanted = plain(answer), plain(example.completion)
    if not said or not wanted:
        return 0.0
    if ratio == "difflib":
        return SequenceMatcher(None, said, wanted).ratio()
    return 2 * sequences.common(wanted, said) / (len(said) + len(wanted))


def plain(code: str) -> str:
    """Code with Py150's marks for literals written out: `<STR_LIT:utf-8>` is utf-8, `<NUM_LIT>` is 0."""
    for mark, text in LITERALS.items():
        code = code.replace(mark, text)
    return re.sub(r"<(?:STR|NUM|CHAR)_LIT:(.*?)>", r"\1", code, flags=re.DOTALL).strip()
