"""Fifteen generation tasks of Super-NaturalInstructions in SAPT's two orders (arXiv 2401.08295), scored by ROUGE-L.

    cl-graft sweep --scenarios superni --set 'superni.order=[1,2]' --data-dir SAPT ...

A prompt is the task's definition, the input and `Output:`; ROUGE-L is rouge-score's, with stems, from 0 to 1. SAPT has
whole inputs, all rows, LoRA, and 50 epochs at 5e-5 (LLaMA) or 100 at 3e-4 (T5):

    --set superni.characters=null --set superni.max_length=1024 --set superni.epochs=50
    --set superni.batch=32 --set superni.learning_rate=0.00005

Of several references SAPT draws one anew at each loading, in the test, too; here the first one counts.
"""

from __future__ import annotations

import re
from pathlib import Path

from cl_graft.data import instructions, sample
from cl_graft.data.orders import ordered
from cl_graft.ranges import Count, Positive
from cl_graft.task import Scenario, Task, Training

FOLDERS = {
    "task002": "task002_quoref_answer_generation",
    "task073": "task073_commonsenseqa_answer_generation",
    "task181": "task181_outcome_extraction",
    "task363": "task363_sst2_polarity_classification",
    "task511": "task511_reddit_tifu_long_text_summarization",
    "task591": "task591_sciq_answer_generation",
    "task639": "task639_multi_woz_user_utterance_generation",
    "task748": "task748_glucose_reverse_cause_event_detection",
    "task875": "task875_emotion_classification",
    "task1290": "task1290_xsum_summarization",
    "task1510": "task1510_evalution_relation_extraction",
    "task1572": "task1572_samsum_summary",
    "task1590": "task1590_diplomacy_text_generation",
    "task1687": "task1687_sentiment140_classification",
    "task1729": "task1729_personachat_generate_next",
}
ORDERS = {
    1: (
        *("task1572", "task363", "task1290", "task181", "task002", "task1510", "task639"),
        *("task1729", "task073", "task1590", "task748", "task511", "task591", "task1687"),
        "task875",
    ),
    2: (
        *("task748", "task073", "task1590", "task639", "task1572", "task1687", "task591"),
        *("task363", "task1510", "task1729", "task181", "task511", "task002", "task1290"),
        "task875",
    ),
}
SUMMARIES = ("task511", "task1290", "task1572")  # what matters most of an input is at its start


def superni(
    *,
    seed: int,
    data_dir: Path | None = None,
    order: Count | str = 1,
    characters: Count | None = 320,
    train_size: Count = 1000,
    test_size: Count = 100,
    steps: Count = 150,
    epochs: Positive | None = None,
    batch: Count = 16,
    learning_rate: Positive = 3e-3,
    max_length: Count = 256,
    max_new_tokens: Count = 50,
) -> Scenario:
    """order: 1 or 2, or tasks joined by commas (`task1572,task363`). characters: length to which inputs are cut, at the
    start unless they are to be summed up; null cuts none. epochs: passes over the examples instead of `steps`. The
    recipe's defaults suit the embedded `text-llama`. --data-dir: the folder with SuperNI, instead of the hub.
    """
    training = Training(
        steps=steps, epochs=epochs, batch=batch, learning_rate=learning_rate, max_length=max_length
    )

    def task(name: str) -> Task:
        found = instructions.read(FOLDERS[name], data_dir, characters, name not in SUMMARIES)
        return Task(
            name,
            sample(found.train, train_size, f"train/{seed}/{name}"),
            sample(found.test, test_size, f"test/{name}"),
            score="rouge_l",
            also=("exact", "neg_bits_per_byte"),
            max_new_tokens=max_new_tokens,
            training=training,
            notes=found.notes,
        )

    named = (
        re.sub(r"\b(?=\d+,)|(?<=,)(?=\d+\b)", "task", order) if isinstance(order, str) else order
    )
    return Scenario("superni", tuple(map(task, ordered("superni", named, ORDERS, FOLDERS))))
