"""The data sets of the hub that O-LoRA's CL_Benchmark was drawn from, in the form of its rows: a text and a label.

As many training rows as the benchmark has are drawn, and at most its 7,600 test rows, by seeds that are the tasks'
names: of the same sources, but not the same rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from cl_graft.data import hub
from cl_graft.data.columns import Misread
from cl_graft.data.readers import DataError

TESTED = 7600


class DataSet(NamedTuple):
    """Where a task is on the hub. text: its form, filled in by the columns. labels: in the order of their numbers."""

    place: str
    config: str | None
    test: str
    text: str
    labels: tuple[str, ...]
    trained: int
    label: str = "label"


STARS = ("very negative", "negative", "neutral", "positive", "very positive")
TRUTH = ("False", "True")
KINDS = (
    *("Company", "Educational Institution", "Artist", "Athlete", "Office Holder"),
    *("Mean of Transportation", "Building", "Natural Place", "Village", "Animal", "Plant"),
    *("Album", "Film", "Written Work"),
)
TOPICS = (
    *("Society & Culture", "Science & Mathematics", "Health", "Education & Reference"),
    *("Computers & Internet", "Sports", "Business & Finance", "Entertainment & Music"),
    *("Family & Relationships", "Politics & Government"),
)
NEWS = ("World", "Sports", "Business", "Science or Technology")
GLUE, SUPER_GLUE = "nyu-mll/glue", "aps/super_glue"
PAIR = "sentence 1: {}\nsentence 2: {}"
COPA = (
    'Which sentence is the {question} of "{premise}"? Choose one between A and B.\n'
    "A: {choice1}\nB: {choice2}"
)
QUESTIONS = "first sentence: {question1}\nsecond sentence: {question2}"
BOOLQ = "question: {question}\npassage: {passage}"
MULTIRC = "paragraph: {paragraph}\nquestion: {question}\ncandidate answer: {answer}"
WIC = "word: {word}\n{sentence1}\n{sentence2}"
ANSWERED = "Title: {question_title}\nText: {question_content}\nAnswer: {best_answer}"
TITLED = "Title: {title}\nText: {content}"
PREMISE = PAIR.format("{premise}", "{hypothesis}")
SENTENCES = PAIR.format("{sentence1}", "{sentence2}")
THREE = ("entailment", "neutral", "contradiction")
TWO = ("entailment", "contradiction")
CB = ("entailment", "contradiction", "neutral")
SIDES = ("Bad", "Good")

DATA_SETS = {
    "dbpedia": DataSet("fancyzhx/dbpedia_14", None, "test", TITLED, KINDS, 14_000),
    "yahoo": DataSet(
        "community-datasets/yahoo_answers_topics", None, "test", ANSWERED, TOPICS, 10_000, "topic"
    ),
    "agnews": DataSet("fancyzhx/ag_news", None, "test", "Text: {text}", NEWS, 4000),
    "yelp": DataSet("Yelp/yelp_review_full", None, "test", "Text: {text}", STARS, 5000),
    "imdb": DataSet("stanfordnlp/imdb", None, "test", "{text}", SIDES, 2000),
    "sst2": DataSet(GLUE, "sst2", "validation", "Text: {sentence}", SIDES, 2000),
    "mnli": DataSet(GLUE, "mnli", "validation_matched", PREMISE, THREE, 3000),
    "qqp": DataSet(GLUE, "qqp", "validation", QUESTIONS, TRUTH, 2000),
    "rte": DataSet(GLUE, "rte", "validation", SENTENCES, TWO, 2000),
    "cb": DataSet(SUPER_GLUE, "cb", "validation", PREMISE, CB, 250),
    "copa": DataSet(SUPER_GLUE, "copa", "validation", COPA, ("A", "B"), 400),
    "boolq": DataSet(SUPER_GLUE, "boolq", "validation", BOOLQ, TRUTH, 2000),
    "multirc": DataSet(SUPER_GLUE, "multirc", "validation", MULTIRC, TRUTH, 2000),
    "wic": DataSet(SUPER_GLUE, "wic", "validation", WIC, TRUTH, 2000),
}


def told(name: str) -> str:
    """Where a task's data are to be had, as the end of a sentence that begins with its name."""
    folder = "comes with CL_Benchmark of github.com/cmnfriend/O-LoRA"
    if name in DATA_SETS:
        there = DATA_SETS[name]
        config = f" ({there.config})" if there.config else ""
        return f"{folder}, or is read from {there.place}{config} of the hub without --data-dir"
    return f"{folder}; the hub has none that is known here"


def rows(name: str) -> tuple[list[str], list[tuple[str, str]], list[tuple[str, str]]]:
    """Label set, training and test rows of a task. Raises DataError, also for a task that is not on the hub."""
    if name not in DATA_SETS:
        raise DataError(f"{name} {told(name)}, so give the folder that holds it with --data-dir.")
    data_set = DATA_SETS[name]

    def read(split: str, size: int) -> list[tuple[str, str]]:
        return hub.rows(
            data_set.place,
            _adapted(data_set),
            _columns(data_set),
            config=data_set.config,
            split=split,
            size=size,
            seed=f"{name} of the hub/{split}",
        )

    train, test = read("train", data_set.trained), read(data_set.test, TESTED)
    return list(data_set.labels), train, test


def _columns(data_set: DataSet) -> tuple[str, ...]:
    from string import Formatter

    named = [field for _, field, _, _ in Formatter().parse(data_set.text) if field]
    return (*named, data_set.label)


def _adapted(data_set: DataSet) -> Callable[[hub.HubRow], tuple[str, str]]:
    def adapt(row: hub.HubRow) -> tuple[str, str]:
        number = row[data_set.label]
        if isinstance(number, bool) or not isinstance(number, int):
            raise Misread(f"has {number!r} in column {data_set.label!r}; write a label's number.")
        if not 0 <= number < len(data_set.labels):
            raise Misread(
                f"has {number} in column {data_set.label!r}, and the labels are numbered 0 to "
                f"{len(data_set.labels) - 1}; leave out the row."
            )
        return data_set.text.format(**row), data_set.labels[number]

    return adapt
