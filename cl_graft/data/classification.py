"""Classification tasks of O-LoRA's CL_Benchmark (arXiv 2310.14152): `{sentence, label}` rows beside `labels.json`.

They are read from a folder of that layout, or without one from the data sets of the hub that it was drawn from.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from cl_graft.data import classification_hub
from cl_graft.data.folders import folder_of
from cl_graft.data.parts import Parts, parts, split
from cl_graft.data.readers import DataError, labels, records, sample
from cl_graft.task import Example, Task, Training

ROOTS = ("cl_benchmark", "CL_Benchmark", "")
NO_CONSENSUS = "-"  # MNLI's mark for pairs on which its annotators did not agree; left out
Prompts = Literal["plain", "o_lora"]


class Source(NamedTuple):
    """A task's folder, and whether its question is at the end of its texts, behind what it is about."""

    folder: str
    last: bool = False


SOURCES = {
    "dbpedia": Source("TC/dbpedia"),
    "amazon": Source("SC/amazon"),
    "yahoo": Source("TC/yahoo"),
    "agnews": Source("TC/agnews"),
    "mnli": Source("NLI/MNLI", last=True),
    "cb": Source("NLI/CB", last=True),
    "wic": Source("WiC/WiC", last=True),
    "copa": Source("COPA/COPA"),
    "qqp": Source("QQP/QQP", last=True),
    "boolq": Source("BoolQA/BoolQA"),
    "rte": Source("NLI/RTE", last=True),
    "imdb": Source("SC/IMDB"),
    "yelp": Source("SC/yelp"),
    "sst2": Source("SC/SST-2"),
    "multirc": Source("MultiRC/MultiRC", last=True),
}
# what O-LoRA's prompts ask before the text, by the first part of the folder; COPA's texts ask themselves
ASKED = {
    "NLI": 'What is the logical relationship between the "sentence 1" and the "sentence 2"?',
    "QQP": 'Whether the "first sentence" and the "second sentence" have the same meaning?',
    "SC": "What is the sentiment of the following paragraph?",
    "TC": "What is the topic of the following paragraph?",
    "BoolQA": "According to the following passage, is the question true or false?",
    "MultiRC": (
        "According to the following passage and question, is the candidate answer true or false?"
    ),
    "WiC": (
        "Given a word and two sentences, whether the word is used with the same sense in both sentence?"
    ),
}

Row = tuple[str, str]  # text and label


def tasks(
    names: Sequence[str],
    *,
    seed: int,
    data_dir: Path | None,
    train_size: int,
    test_size: int,
    training: Training,
    characters: int | None,
    prompts: Prompts = "plain",
) -> tuple[Task, ...]:
    """Tasks of these names, in this order, answered by the likeliest label. Raises DataError.

    characters: length to which texts are cut: at their end, or at their start where a question is at the end.
    """

    def task(name: str) -> Task:
        found = read(name, data_dir, characters, prompts)
        return Task(
            name,
            sample(found.train, train_size, f"train/{seed}/{name}"),
            sample(found.test, test_size, f"test/{name}"),
            score="choice",
            also=("neg_bits_per_byte",),
            training=training,
            notes=found.notes,
        )

    return tuple(task(name) for name in names)


def read(name: str, data_dir: Path | None, characters: int | None, prompts: Prompts) -> Parts:
    """All examples of a task, and what was left out of them. Raises DataError."""
    source = SOURCES[name]
    notes: list[str] = []
    if data_dir is None:
        options, train, test = classification_hub.rows(name)
    else:
        options, train, test, notes = _files(name, source, data_dir)

    choices = tuple(f" {option}" for option in options)
    cut = -characters if characters and source.last else characters

    def made(row: Row) -> Example:
        return Example(
            _prompt(source, row[0], options, cut, prompts), f" {row[1]}", choices=choices
        )

    if train and test:
        return parts(name, [*map(made, train)], [*map(made, test)], notes)
    groups: dict[str, str] = {}
    examples = []
    for row in train or test:
        examples.append(made(row))
        groups.setdefault(examples[-1].prompt, _group(name, row[0]))
    once = parts(name, examples, [])
    together = [groups[example.prompt] for example in once.train]
    trained, tested, note = split(name, once.train, together, of_test=not train)
    return parts(name, trained, tested, [*notes, *once.notes, note])


def _group(name: str, text: str) -> str:
    """What a text shares with others: MultiRC asks several times about one paragraph."""
    return text.partition("\nquestion:")[0] if name == "multirc" else text


def _prompt(
    source: Source, text: str, options: Sequence[str], cut: int | None, prompts: Prompts
) -> str:
    if prompts == "plain":
        return f"{_cut(' '.join(text.split()), cut)}\nLabel:"
    kind, _, data_set = source.folder.partition("/")
    asked = ASKED.get(kind)
    ask = f"{asked} Choose one from the option.\nOption: {', '.join(options)} \n" if asked else ""
    return f"Task:{kind}\nDataset:{data_set}\n{ask}{_cut(text, cut)}\nAnswer:"


def _cut(text: str, characters: int | None) -> str:
    """The first characters of a text, the last ones where their number is negative, or all of it."""
    if characters is None:
        return text
    return text[characters:] if characters < 0 else text[:characters]


def _files(
    name: str, source: Source, data_dir: Path
) -> tuple[list[str], list[Row], list[Row], list[str]]:
    """Label set, training and test rows of a folder, either perhaps none, and notes."""
    folder = folder_of(data_dir, ROOTS, source.folder, f"{name} {classification_hub.told(name)}")
    options = labels(data_dir, f"{folder}/labels.json")
    there = [part for part in ("train", "test") if (data_dir / folder / f"{part}.json").is_file()]
    read: dict[str, list[Row]] = {"train": [], "test": []}
    notes = []
    for part in there or ("train",):
        kept = []
        rows: list[dict[str, Any]] = records(
            data_dir, f"{folder}/{part}.json", {"sentence": str, "label": str}
        )
        for number, row in enumerate(rows, 1):
            if row["label"] == NO_CONSENSUS:
                continue
            if row["label"] not in options:
                raise DataError(
                    f"{data_dir / folder / part}.json, record {number} has label {row['label']!r}, which labels.json "
                    "does not list; mend one of them."
                )
            kept.append((row["sentence"], row["label"]))
        if undecided := len(rows) - len(kept):
            named = {"train": "training", "test": "test"}[part]
            notes.append(
                f"{undecided:,} {named} rows have no label ({NO_CONSENSUS}) and are left out"
            )
        if not kept:
            raise DataError(f"{data_dir / folder / part}.json has no row with a label; replace it.")
        read[part] = kept
    return options, read["train"], read["test"], notes
