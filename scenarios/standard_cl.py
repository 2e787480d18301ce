"""DBpedia, Amazon, Yahoo, AG News in orders 1 to 3: the standard stream of O-LoRA (arXiv 2310.14152).

The answer is the label of the task's label set that the model finds most likely. One line over the orders:

    cl-graft sweep --scenarios standard_cl --set 'standard_cl.order=[1,2,3]' --data-dir O-LoRA ...

O-LoRA's own setting, whose prompts name task and data set, on all rows (its learning rate stays as it is):

    --set standard_cl.prompts=o_lora --set standard_cl.characters=null --set standard_cl.max_length=512
    --set standard_cl.train_size=14000 --set standard_cl.test_size=7600 --set standard_cl.epochs=1
    --set standard_cl.batch=64 --set standard_cl.learning_rate=0.001
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from cl_graft.data import classification
from cl_graft.data.orders import ordered
from cl_graft.ranges import Count, Positive
from cl_graft.task import Scenario, Training

ORDERS = {
    1: ("dbpedia", "amazon", "yahoo", "agnews"),
    2: ("dbpedia", "amazon", "agnews", "yahoo"),
    3: ("yahoo", "amazon", "agnews", "dbpedia"),
}


def standard_cl(
    *,
    seed: int,
    data_dir: Path | None = None,
    order: Count | str = 1,
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
    """order: 1 to 3, or tasks joined by commas. prompts: `plain`, or `o_lora`, which name the task and ask for a label.
    characters: length to which texts are cut, at the start where the question is at the end; null cuts none. epochs:
    passes over the examples instead of `steps`. The recipe's defaults suit the embedded `text-llama`. --data-dir: the
    folder with CL_Benchmark, instead of the hub's data sets.
    """
    tasks = classification.tasks(
        ordered("standard_cl", order, ORDERS, classification.SOURCES),
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
    return Scenario("standard_cl", tasks)
