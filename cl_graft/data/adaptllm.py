"""Domain texts and test sets in AdaptLLM's forms (arXiv 2309.09530): texts to go on with, questions with options.

A test set is `test.json` of rows {input, options, gold_index} in a folder of AdaptLLM's data set of its domain. Texts
are files of a folder, as its `raw2read.py` writes them, or a data set with a column `text`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from cl_graft.data import hub
from cl_graft.data.columns import Misread
from cl_graft.data.folders import folder_of
from cl_graft.data.readers import DataError, records, sample
from cl_graft.task import Example

ROOTS = ("adaptllm", "AdaptLLM", "")
COLUMNS = ("input", "options", "gold_index")


class Domain(NamedTuple):
    """AdaptLLM's data set of a domain. suites: its test sets whose answers are options, with their folders."""

    place: str
    suites: Mapping[str, str]


DOMAINS = {
    "bio": Domain(
        "AdaptLLM/medicine-tasks",
        {
            **{"MQP": "MedQs", "PubMedQA": "pubmed_qa", "RCT": "RCT", "USMLE": "usmle"},
            "ChemProt": "ChemProt",
        },
    ),
    "finance": Domain(
        "AdaptLLM/finance-tasks", {"FPB": "FPB", "FiQA_SA": "FiQA_SA", "Headline": "Headline"}
    ),
    "law": Domain("AdaptLLM/law-tasks", {"SCOTUS": "scotus", "UNFAIR_ToS": "unfair_tos"}),
}


def tests(name: str, data_dir: Path | None, size: int) -> tuple[list[Example], list[str]]:
    """Up to so many examples of each test set of a domain, drawn by its name, and notes. Raises DataError."""
    domain, examples, notes = DOMAINS[name], list[Example](), list[str]()
    for suite, folder in domain.suites.items():
        found = _suite(domain, suite, folder, data_dir)
        single = list(dict.fromkeys(example for example in found if example is not None))
        if several := sum(example is None for example in found):
            notes.append(f"{several:,} rows of {suite} have several right options and are left out")
        if repeated := len(found) - several - len(single):
            notes.append(f"{repeated:,} rows of {suite} are there before and left out")
        examples += sample(single, size, f"test/{suite}")
    return examples, notes


def texts(name: str, place: str, data_dir: Path | None, size: int, seed: int) -> list[str]:
    """Up to so many texts of a domain, drawn by the seed. Raises DataError."""
    if not place:
        if data_dir is None:
            raise DataError(
                f"AdaptLLM does not publish the texts that it trains {name} on; make some by its raw2read.py and give "
                f"their folder, or a data set with a column text, as domains.{name}=PLACE."
            )
        found = folder_of(
            data_dir,
            tuple(f"{root}/texts".lstrip("/") for root in ROOTS),
            name,
            f"put texts to train {name} on there, or give domains.{name}=PLACE",
        )
        place = str(data_dir / found)
    files = sorted(Path(place).glob("*.txt"))
    if files:
        drawn = sample(files, size, f"train/{seed}/{name}")
        return [file.read_text(encoding="utf-8", errors="replace") for file in drawn]
    return hub.rows(place, _text, ("text",), size=size, seed=f"train/{seed}/{name}")


def begun(text: str, words: int) -> Example | None:
    """A text whose first words are the prompt and whose rest is the answer; None for one without a rest."""
    start = text.split(maxsplit=words)
    if len(start) <= words:
        return None
    prompt = text[: text.rindex(start[-1])].rstrip()
    return Example(prompt, text[len(prompt) :].rstrip())


def _text(row: hub.HubRow) -> str:
    if not isinstance(row["text"], str):
        raise Misread(f"has {type(row['text']).__name__} in column 'text'; write text there.")
    return row["text"]


def _suite(domain: Domain, suite: str, folder: str, data_dir: Path | None) -> list[Example | None]:
    def adapt(row: Mapping[str, Any]) -> Example | None:
        return _example(row, suite)

    if data_dir is None:
        return hub.rows(domain.place, adapt, COLUMNS, config=suite, split="test")
    data_set = domain.place.rpartition("/")[2]
    place = folder_of(
        data_dir,
        ROOTS,
        f"{data_set}/{folder}",
        f"{suite} is {domain.place} ({suite}) of the hub, which is read without --data-dir",
    )
    name = f"{place}/test.json"
    made = []
    for number, row in enumerate(records(data_dir, name, COLUMNS), 1):
        try:
            made.append(adapt(row))
        except Misread as error:
            raise DataError(f"{data_dir / name}, record {number} {error}") from error
    return made


def _example(row: Mapping[str, Any], suite: str) -> Example | None:
    """A question with its options; None where several of them are right."""
    options, gold = row["options"], row["gold_index"]
    if not isinstance(row["input"], str) or not _all(options, str):
        raise Misread(
            "is no question with options; write text in input, a list of texts in options."
        )
    right = gold if isinstance(gold, list) else [gold]
    if not _all(right, int) or not all(0 <= k < len(options) for k in right):
        raise Misread(f"has {gold!r} in gold_index; write the number of one of its options there.")
    if len(right) > 1:
        return None
    choices = tuple(f" {option}" for option in options)
    return Example(row["input"].rstrip(), choices[right[0]], choices=choices, suite=suite)


def _all(values: Any, kind: type) -> bool:
    return isinstance(values, list) and bool(values) and all(type(v) is kind for v in values)
