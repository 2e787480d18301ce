"""Pre-training text for `text-llama`: the training files of the data directory, without what a test file asks, too.

Labels of the classification sets are left out, so that the model knows the words but not the tasks.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

from cl_graft.data.readers import records
from cl_graft.models.vocabulary import SPECIAL, byte_level, wrapped

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VOCABULARY = 1024
CHARACTERS = 320  # of a text, about a hundred tokens

SENTENCES = ("TC/agnews", "SC/amazon", "SC/SST-2", "NLI/MNLI")
TESTS = {  # {file: its field with the question}
    "gsm8k/test.jsonl": "question",
    "mawps/test.jsonl": "input",
    **{f"cl_benchmark/{name}/test.json": "sentence" for name in (*SENTENCES, "TC/dbpedia")},
}


def texts(data_dir: Path | None) -> list[str]:
    """GSM8K training problems, MBPP training programs (task ids 601-974), training sentences of four
    classification sets; none whose question a test asks, whatever its blanks and capitals.

    Raises DataError for a missing training file or field.
    """
    problems = records(data_dir, "gsm8k/train.jsonl", {"question": str, "answer": str})
    asked = [(r["question"], f"Question: {r['question']}\nAnswer: {r['answer']}") for r in problems]
    programs = records(data_dir, "mbpp/mbpp.jsonl", {"text": str, "code": str, "task_id": int})
    train = [row for row in programs if 601 <= row["task_id"] <= 974]
    asked += [(row["text"], f"# {row['text']}\n{row['code']}") for row in train]
    for name in SENTENCES:
        rows = records(data_dir, f"cl_benchmark/{name}/train.json", {"sentence": str})
        asked += [(row["sentence"], row["sentence"]) for row in rows]
    tested = {plain(row["text"]) for row in programs if row["task_id"] < 601}
    for file, field in TESTS.items():
        if data_dir and (data_dir / file).is_file():
            tested |= {plain(row[field]) for row in records(data_dir, file, {field: str})}
    kept = [text for question, text in asked if plain(question) not in tested]
    return [text.replace("\r\n", "\n")[:CHARACTERS] for text in kept]


def plain(question: str) -> str:
    """A question without what makes no other question of it: blanks, capitals, what a cut text lacks."""
    return " ".join(question.split()).lower()[: CHARACTERS - 20]


def tokenizer(sentences: list[str]) -> PreTrainedTokenizerBase:
    """Byte-level BPE, so that any text can be written."""
    from tokenizers import models, pre_tokenizers, trainers

    made = byte_level(models.BPE(unk_token=None))
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(sentences, trainer)
    return wrapped(made)


def batches(sentences: list[str], size: int, seed: int) -> Iterator[list[tuple[str, str]]]:
    """Endless batches of (empty prompt, text)."""
    rng = Random(seed)
    while True:
        yield [("", text) for text in rng.sample(sentences, size)]
