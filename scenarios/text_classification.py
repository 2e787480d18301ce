"""AG News, Amazon, SST-2, DBpedia, MNLI: the text-classification stream of O-LoRA's benchmark (arXiv 2310.14152).

The answer is the label of the task's label set that the model finds most likely. DBpedia is split here by a fixed seed
where it comes as a test file only. Yelp, which has Amazon's labels, may be named in `tasks`, too.
"""

from __future__ import annotations

from pathlib import Path

from cl_graft.data import DataError, classification
from cl_graft.errors import UnknownName
from cl_graft.ranges import Count, Positive
from cl_graft.task import Scenario, Training

TASKS = ("agnews", "amazon", "sst2", "dbpedia", "mnli", "yelp")
CHARACTERS = 320


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
    A text is cut to 320 characters: its first, or its last where it ends in what is asked (MNLI).
    """
    names = tasks.split(",")
    for name in names:
        if name not in TASKS:
            raise UnknownName("text-classification task", name, TASKS)
    if data_dir is None:
        raise DataError(
            "text_classification reads O-LoRA's CL_Benchmark; give the folder that holds it with --data-dir."
        )
    made = classification.tasks(
        names,
        seed=seed,
        data_dir=data_dir,
        train_size=train_size,
        test_size=test_size,
        training=Training(
            steps=steps, batch=batch, learning_rate=learning_rate, max_length=max_length
        ),
        characters=CHARACTERS,
    )
    return Scenario("text_classification", made)
