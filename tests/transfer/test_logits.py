"""What a source says of given answers: held against single forward passes, stored, and stored again."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from cl_graft.evaluation.generate import log_likelihoods
from cl_graft.models.load import load
from cl_graft.store.files import RecordError
from cl_graft.transfer import folder, logits
from cl_graft.transfer.read import read_examples, read_logits
from tests.command import Call
from tests.transfer.conftest import QUESTIONS

ROWS = [(QUESTIONS[0], "yes"), (QUESTIONS[1], "no way"), ("", "yes")]


def test_it_is_what_one_pass_a_row_says(torn: Path) -> None:
    model, tokenizer = load(str(torn))
    said = logits.say(model, tokenizer, ROWS, 3)
    for i, (prompt, answer) in enumerate(ROWS):
        head = tokenizer(prompt)["input_ids"]
        tail = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            wanted = model(torch.tensor([head + tail])).logits[0, len(head) - 1 : -1].topk(3)
        tokens, ids, values = said.row(i)
        assert tokens.tolist() == tail and torch.equal(ids.long(), wanted.indices)
        torch.testing.assert_close(values, wanted.values)
        assert {*tokens.tolist(), *ids.flatten().tolist()} <= said.texts.keys()
    lengths = said.starts.diff().double()
    likely = log_likelihoods(model, tokenizer, ROWS, 64)
    torch.testing.assert_close(-said.nll * lengths, torch.tensor(likely).double())


def test_an_answer_longer_than_the_model_reads_is_not_read(torn: Path) -> None:
    model, tokenizer = load(str(torn))
    rows = [ROWS[0], (QUESTIONS[2], "a" * 300), (300 * "b", "yes")]
    said = logits.say(model, tokenizer, rows, 3)
    assert [math.isfinite(x) for x in said.nll.tolist()] == [True, False, True]
    assert len(said.row(1)[0]) == 0 and len(said.row(2)[0]) == len(said.row(0)[0]), "a cut prompt"


def test_a_file_gives_back_what_was_written(torn: Path, tmp_path: Path) -> None:
    said = logits.say(*load(str(torn)), ROWS, 3)
    logits.write(tmp_path / "x.safetensors", said, "torn", "asked")
    back = logits.read(tmp_path / "x.safetensors")
    assert all(torch.equal(getattr(back, name), getattr(said, name)) for name in logits.TENSORS)
    assert back.texts == said.texts and back.source == "torn"
    assert logits.asked_of(tmp_path / "x.safetensors") == "asked"
    (tmp_path / "y.safetensors").write_text("no tensors")
    assert logits.asked_of(tmp_path / "y.safetensors") is None
    with pytest.raises(RecordError, match="holds no logits of a source; build the data again"):
        logits.read(tmp_path / "y.safetensors")


def test_a_build_stores_them_for_every_source_and_goes_on_after_a_kill(
    call: Call, torn: Path, sure: Path, questions: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = ["--source", torn, "--source", sure, "--prompts", questions, "--task", "exact"]
    words += ["--max-new-tokens", 6, "--samples", 2, "--limit", 6, "--out", out]
    assert call(*words).code == 0
    assert read_logits(out) is None and {e.row for e in read_examples(out)} == {None}
    assert call(*words, "--logits", 4).code == 0, "the answers stay as they are"
    files = [folder.file_of(out, n) for n in (0, 1)]
    first = {file: file.read_bytes() for file in files}
    train = read_examples(out)
    assert [e.row for e in train] == list(range(len(train)))
    for file, source in zip(files, (torn, sure), strict=True):
        said = logits.read(file)
        assert said.source == str(source) and said.ids.shape[1] == 4
        assert len(said.nll) == len(train)
    told = read_logits(out)
    assert told and told.folder == out
    files[1].write_text("no tensors")
    with pytest.raises(RecordError, match="is not as the build left it"):
        read_logits(out)
    with pytest.raises(RecordError, match="by `cl-graft transfer build --logits`"):
        logits.read(files[1])
    stamp = files[0].stat().st_mtime_ns
    assert call(*words, "--logits", 4).code == 0
    assert {file: file.read_bytes() for file in files} == first and read_logits(out) == told
    assert files[0].stat().st_mtime_ns == stamp, "what is there is not made again"
