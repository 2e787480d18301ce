"""Eight tasks of TRACE in their published order (arXiv 2310.06762): Chinese, English, German, code and numbers.

C-STANCE, FOMC and NumGLUE are scored by `exact`, MeetingBank by `rouge_l`, Py150 by `edit_similarity`, ScienceQA by
`first_character`, 20Minuten by `sari`, all from 0 to 1 (TRACE mixes 0 to 1 and 0 to 100). Its own setting:

    --set trace.train_size=5000 --set trace.test_size=2000 --set trace.max_length=1536
    --set trace.max_new_tokens=512 --set trace.batch=256 --set trace.learning_rate=0.00001

Its second table is of 500 training rows a task, the default here: figures of the two are not to be compared.
"""

from __future__ import annotations

from pathlib import Path

from cl_graft.data import answered, sample
from cl_graft.data.orders import ordered
from cl_graft.ranges import Count, Positive
from cl_graft.task import Scenario, Task, Training

# the scorer of each task, and TRACE's passes over its examples
TASKS = {
    "C-STANCE": ("exact", 5.0),
    "FOMC": ("exact", 3.0),
    "MeetingBank": ("rouge_l", 7.0),
    "Py150": ("edit_similarity", 5.0),
    "ScienceQA": ("first_character", 3.0),
    "NumGLUE-cm": ("exact", 5.0),
    "NumGLUE-ds": ("exact", 5.0),
    "20Minuten": ("sari", 7.0),
}


def trace(
    *,
    seed: int,
    data_dir: Path | None = None,
    order: Count | str = 1,
    train_size: Count = 500,
    test_size: Count = 100,
    epochs: Positive | None = None,
    batch: Count = 16,
    learning_rate: Positive = 3e-3,
    max_length: Count = 256,
    max_new_tokens: Count = 64,
    chat: bool = False,
) -> Scenario:
    """order: 1, the published one, or tasks joined by commas. epochs: passes over each task's examples, instead of
    TRACE's 5, 3, 7, 5, 3, 5, 5 and 7. The other defaults suit the embedded `text-llama`. chat: put prompts into the
    tokenizer's chat template, which TRACE does not. --data-dir: the folder with the tasks' folders.
    """

    def task(name: str) -> Task:
        score, passes = TASKS[name]
        found = answered.read(name, data_dir)
        return Task(
            name,
            sample(found.train, train_size, f"train/{seed}/{name}"),
            sample(found.test, test_size, f"test/{name}"),
            score=score,
            also=("neg_bits_per_byte",),
            max_new_tokens=max_new_tokens,
            training=Training(
                epochs=epochs or passes,
                batch=batch,
                learning_rate=learning_rate,
                max_length=max_length,
            ),
            notes=found.notes,
        )

    names = ordered("trace", order, {1: tuple(TASKS)}, TASKS)
    return Scenario("trace", tuple(map(task, names)), chat=chat)
