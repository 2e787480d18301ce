"""Sources that are trained in seconds and whose answers a test knows, and the command itself."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2ForSequenceClassification, PreTrainedTokenizerBase

from cl_graft.models import embedded, mini_gpt2
from cl_graft.models.recipe import ModelRecipe
from tests.command import Call

QUESTIONS = [f"Q: Copy {letter}.\nA: " for letter in "abcdefghijklmnopqrstuvwxyz"]


@pytest.fixture
def call(call: Call) -> Call:
    """Run `cl-graft transfer build` with these words in this process."""
    return partial(call, "transfer", "build")


def trained(
    folder: Path, says: Sequence[str], tokenizer: PreTrainedTokenizerBase, seed: int
) -> Path:
    """A GPT-2 that answers every question with one of these words at random."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    spec = ModelRecipe("", 32, 1, 2, 64, 150, 1e-2, family="gpt2")
    model = mini_gpt2.new_gpt2(spec, len(tokenizer))

    def batches() -> Iterator[list[tuple[str, str]]]:
        rng = Random(seed)
        while True:
            yield [(rng.choice(QUESTIONS), rng.choice(says)) for _ in range(16)]

    embedded.pretrain(model, tokenizer, batches(), spec.steps, spec.lr)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def torn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Says "yes" or "no", of bytes."""
    return trained(
        tmp_path_factory.mktemp("sources") / "torn", ["yes", "no"], mini_gpt2.tokenizer(), 0
    )


@pytest.fixture(scope="session")
def sure(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Says "yes", of the other embedded vocabulary."""
    tokenizer = embedded.toy_tokenizer()
    return trained(tmp_path_factory.mktemp("sources") / "sure", ["yes"], tokenizer, 1)


def classifier(folder: Path, outputs: int = 1) -> Path:
    """A sequence classifier with random weights."""
    torch.manual_seed(5)
    tokenizer = mini_gpt2.tokenizer()
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=64,
        n_embd=32,
        n_layer=1,
        n_head=2,
        num_labels=outputs,
        pad_token_id=0,
    )
    model = GPT2ForSequenceClassification(config)
    torch.nn.init.normal_(model.score.weight)  # far from 0, so that rewards differ
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def reward_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return classifier(tmp_path_factory.mktemp("rewards") / "one")


@pytest.fixture(scope="session")
def two_outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return classifier(tmp_path_factory.mktemp("rewards") / "two", outputs=2)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write rows as a JSONL file."""

    def rows(found: Sequence[dict[str, Any]], name: str = "prompts.jsonl") -> Path:
        file = tmp_path / name
        file.write_text("".join(json.dumps(row) + "\n" for row in found))
        return file

    return rows


@pytest.fixture
def questions(write: Callable[..., Path]) -> Path:
    """24 questions to which "yes" is the right answer."""
    return write([{"prompt": prompt, "completion": "yes"} for prompt in QUESTIONS[:24]])
