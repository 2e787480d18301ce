"""AG News, Amazon, SST-2, DBpedia, MNLI: the text-classification stream of O-LoRA's benchmark (arXiv 2310.14152).

Yelp, which has Amazon's labels, is there to be named in `tasks`. The answer is the label of the task's label set that
the model finds most likely. DBpedia comes as a test file only, Yelp as a training file, and each is split here by a
fixed seed.
"""

from __future__ import annotations

from pathlib import Path

from cl_graft.data import DataError, labels, records, sample
from cl_graft.errors import UnknownName
from cl_graft.ranges import Count, Positive
from cl_graft.task import Example, Scenario, Task, Training

FOLDERS = {
    "agnews": "cl_benchmark/TC/agnews",
    "amazon": "cl_benchmark/SC/amazon",
    "sst2": "cl_benchmark/SC/SST-2",
    "dbpedia": "cl_benchmark/TC/dbpedia",
    "mnli": "cl_benchmark/NLI/MNLI",
    "yelp": "cl_benchmark/SC/yelp",
}
# those that come as one file, and how many of its examples are to train on
ONLY = {"dbpedia": ("test", 5000), "yelp": ("train", 4000)}

CHARACTERS = 320
NO_CONSENSUS = "-"  # MNLI's mark for pairs on which its annotators did not agree; left out


def text_classification(
    *,
    seed: int,
    data_dir: Path | None = None,
    tasks: str = "agnews,amazon,sst2,dbpedia,mnli",
    train_size: Count = 2000,
    test_size: Count = 250,
    steps: Count = 150,
    batch: Count = 16,
    learning_rate: Positive = 3e-3,
    max_length: Count = 96,
) -> Scenario:
    """Options: tasks and their order, sizes of the sets, the SFT recipe (its defaults suit the embedded `text-llama`).
    A text is cut after 320 characters.
    """
    training = Training(
        steps=steps, batch=batch, learning_rate=learning_rate, max_length=max_length
    )

    def task(name: str) -> Task:
        if name not in FOLDERS:
            raise UnknownName("text-classification task", name, FOLDERS)
        options = tuple(labels(data_dir, f"{FOLDERS[name]}/labels.json"))
        if name in ONLY:
            file, count = ONLY[name]
            whole = read(data_dir, f"{FOLDERS[name]}/{file}.json", options)
            shuffled = sample(whole, len(whole), f"{name} split")
            train, test = shuffled[:count], shuffled[count:]
        else:
            test = read(data_dir, f"{FOLDERS[name]}/test.json", options)
            train = read(data_dir, f"{FOLDERS[name]}/train.json", options)
        return Task(
            name,
            sample(train, train_size, f"train/{seed}/{name}"),
            sample(test, test_size, f"test/{name}"),
            score="choice",
            also=("neg_bits_per_byte",),
            training=training,
        )

    return Scenario("text_classification", tuple(task(name) for name in tasks.split(",")))


def read(data_dir: Path | None, name: str, options: tuple[str, ...]) -> list[Example]:
    """The examples of a file, a text once: the first of those that are alike once they are cut."""
    examples: dict[str, Example] = {}
    for number, row in enumerate(records(data_dir, name, {"sentence": str, "label": str}), 1):
        if row["label"] == NO_CONSENSUS:
            continue
        if row["label"] not in options:
            raise DataError(
                f"{data_dir}/{name}, record {number} has label {row['label']!r}, which labels.json does not list."
            )
        text = " ".join(row["sentence"].split())[:CHARACTERS]
        example = Example(
            f"{text}\nLabel:", f" {row['label']}", choices=tuple(f" {o}" for o in options)
        )
        examples.setdefault(example.prompt, example)
    return list(examples.values())
