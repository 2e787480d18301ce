"""Pre-training text for `text-llama`: the training files of the data directory, never a test file.

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


def texts(data_dir: Path | None) -> list[str]:
    """GSM8K training problems, MBPP training programs (task ids 601-974), training sentences of four
    classification sets. Raises DataError for a missing file or field."""
    sentences = [
        f"Question: {row['question']}\nAnswer: {row['answer']}"
        for row in records(data_dir, "gsm8k/train.jsonl", {"question": str, "answer": str})
    ]
    sentences += [
        f"# {row['text']}\n{row['code']}"
        for row in records(data_dir, "mbpp/mbpp.jsonl", {"text": str, "code": str, "task_id": int})
        if 601 <= row["task_id"] <= 974
    ]
    for name in SENTENCES:
        rows = records(data_dir, f"cl_benchmark/{name}/train.json", {"sentence": str})
        sentences += [row["sentence"] for row in rows]
    return [text.replace("\r\n", "\n")[:CHARACTERS] for text in sentences]


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
