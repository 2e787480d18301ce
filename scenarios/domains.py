"""Biomedicine, finance, law: texts to go on with, tested on AdaptLLM's questions (arXiv 2309.09530).

GraftLLM's table 4 (arXiv 2505.18502) has experts that AdaptLLM trained; not all of their making can be had:

- The reading-comprehension texts are not published, nor the general instructions mixed in. Texts are the user's, as
  `domains.bio=PLACE`; their first words are the prompt, which is not trained on.
- Of the test sets, those with options are here: MQP, PubMedQA, RCT, USMLE, ChemProt; FPB, FiQA_SA, Headline; SCOTUS,
  UNFAIR_ToS (rows with one right option). NER and ConvFinQA are answered in words; CaseHOLD has one answer to several
  questions.
- A task's score is the mean of its sets' shares of right answers, the likeliest option by summed log-likelihood.
  AdaptLLM takes the mean over tokens, and F1 for RCT, ChemProt, FPB, FiQA_SA, Headline and SCOTUS.

So figures are to be compared within a table here, and not with the published ones.
"""

from __future__ import annotations

from pathlib import Path

from cl_graft.data import DataError, adaptllm
from cl_graft.data.orders import ordered
from cl_graft.ranges import Count, Positive
from cl_graft.task import Scenario, Task, Training


def domains(
    *,
    seed: int,
    data_dir: Path | None = None,
    order: Count | str = 1,
    bio: str = "",
    finance: str = "",
    law: str = "",
    words: Count = 8,
    train_size: Count = 2000,
    test_size: Count = 100,
    steps: Count = 150,
    epochs: Positive | None = None,
    batch: Count = 16,
    learning_rate: Positive = 3e-3,
    max_length: Count = 128,
) -> Scenario:
    """order: 1 (bio, finance, law), or tasks joined by commas. bio, finance, law: the texts to train on, a folder of
    text files, or a folder or hub data set with a column `text`. words: how many of a text are its prompt. test_size:
    of each test set. The recipe's defaults suit the embedded `text-llama`. --data-dir: the folder with the texts, as
    `texts/bio`, and the test sets, instead of the hub's.
    """
    places = {"bio": bio, "finance": finance, "law": law}
    training = Training(
        steps=steps, epochs=epochs, batch=batch, learning_rate=learning_rate, max_length=max_length
    )

    def task(name: str) -> Task:
        test, notes = adaptllm.tests(name, data_dir, test_size)
        texts = adaptllm.texts(name, places[name], data_dir, train_size, seed)
        begun = [adaptllm.begun(text, words) for text in texts]
        train = [example for example in begun if example is not None]
        if not train:
            raise DataError(
                f"no text of {name} is longer than its prompt of {words} words; give longer ones, or lower "
                "domains.words."
            )
        if short := len(begun) - len(train):
            notes.append(f"{short:,} texts are no longer than their prompt and are left out")
        return Task(
            name,
            train,
            test,
            score="choice",
            also=("neg_bits_per_byte",),
            training=training,
            notes=tuple(notes),
        )

    names = ordered("domains", order, {1: tuple(places)}, places)
    return Scenario("domains", tuple(map(task, names)))
