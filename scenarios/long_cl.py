"""Fifteen classification tasks in orders 4 to 6: the long stream of Progressive Prompts and O-LoRA (arXiv 2310.14152).

The answer is the label of the task's label set that the model finds most likely. One line over the orders:

    cl-graft sweep --scenarios long_cl --set 'long_cl.order=[4,5,6]' --data-dir O-LoRA ...

O-LoRA's own setting is that of `standard_cl`. It averages over all test examples, of which eight tasks have 7,600 each
and CB has 56; OP here is the mean over tasks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from cl_graft.data import classification
from cl_graft.data.orders import ordered
from cl_graft.ranges import Count, Positive
from cl_graft.task import Scenario, Training

ORDERS = {
    4: (
        *("mnli", "cb", "wic", "copa", "qqp", "boolq", "rte", "imdb"),
        *("yelp", "amazon", "sst2", "dbpedia", "agnews", "multirc", "yahoo"),
    ),
    5: (
        *("multirc", "boolq", "wic", "mnli", "cb", "copa", "qqp", "rte"),
        *("imdb", "sst2", "dbpedia", "agnews", "yelp", "amazon", "yahoo"),
    ),
    6: (
        *("yelp", "amazon", "mnli", "cb", "copa", "qqp", "rte", "imdb"),
        *("sst2", "dbpedia", "agnews", "yahoo", "multirc", "boolq", "wic"),
    ),
}


def long_cl(
    *,
    seed: int,
    data_dir: Path | None = None,
    order: Count | str = 4,
    prompts: Literal["plain", "o_lora"] = "plain",
    characters: Count | None = 320,
    train_size: Count = 2000,
    test_size: Count = 250,
    steps: Count = 150,
    epochs: Positive | None = None,
    batch: Count = 16,
    learning_rate: Positive = 3e-3,
    max_length: Count = 96,
) -> Scenario:
    """order: 4 to 6, or tasks joined by commas. prompts: `plain`, or `o_lora`, which name the task and ask for a label.
    characters: length to which texts are cut, at the start where the question is at the end; null cuts none. epochs:
    passes over the examples instead of `steps`. The recipe's defaults suit the embedded `text-llama`. --data-dir: the
    folder with CL_Benchmark, instead of the hub's data sets.
    """
    tasks = classification.tasks(
        ordered("long_cl", order, ORDERS, classification.SOURCES),
        seed=seed,
        data_dir=data_dir,
        train_size=train_size,
        test_size=test_size,
        training=Training(
            steps=steps,
            epochs=epochs,
            batch=batch,
            learning_rate=learning_rate,
            max_length=max_length,
        ),
        characters=characters,
        prompts=prompts,
    )
    return Scenario("long_cl", tasks)
