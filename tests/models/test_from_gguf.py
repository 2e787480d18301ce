"""A GGUF as a Hugging Face folder: the same model, and a refusal where it would be another one."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from cl_graft.errors import CLGraftError
from cl_graft.models.from_gguf import RECORD, import_gguf, sha256_of
from cl_graft.models.load import check, load
from cl_graft.skillpack.folders.checkpoint import Checkpoint
from cl_graft.skillpack.format.fingerprint import fingerprint
from tests.command import Call
from tests.gguf_files import TEMPLATE, written
from tests.model_folders import llama, tensors
from tests.refusals import one_sentence


@pytest.fixture
def model() -> LlamaForCausalLM:
    return llama(intermediate_size=64, tie_word_embeddings=True)


def refused(action, *words: str) -> None:
    said = one_sentence(action, CLGraftError)
    assert all(word in said for word in words), said


def test_the_folder_is_the_model_that_the_file_was_made_of(
    model: LlamaForCausalLM, tmp_path: Path
) -> None:
    """Every weight, the tied head, the answers; vocabulary, special tokens and chat template."""
    file = written(model, tmp_path / "m.gguf")
    about = import_gguf(file, tmp_path / "out", fingerprint)
    loaded, tokenizer = load(str(tmp_path / "out"))
    for name, weight in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), weight), name
    ids = torch.arange(20)[None]
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-6)
    assert tokenizer("abc de a").input_ids == [38, 36, 40, 39]
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    assert tokenizer.chat_template == TEMPLATE
    assert about.fingerprint == Checkpoint(tmp_path / "out").fingerprint()
    assert about.parameters == sum(p.numel() for p in model.parameters())
    assert about.sha256 == sha256_of(file) and about.types == {"F32": 20}


def test_blocks_are_dequantised_by_their_formula(model: LlamaForCausalLM, tmp_path: Path) -> None:
    """Q8_0: a half-precision scale for each 32 neighbours, times a signed byte; here from the file's own bytes."""
    written(model, tmp_path / "m.gguf", blocks="Q8_0")
    from gguf import GGUFReader

    (stored,) = (
        t for t in GGUFReader(tmp_path / "m.gguf").tensors if t.name == "blk.1.ffn_up.weight"
    )
    blocks = np.asarray(stored.data).reshape(-1, 34)
    scale = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    expected = (scale * blocks[:, 2:].view(np.int8)).reshape(64, 32)
    about = import_gguf(tmp_path / "m.gguf", tmp_path / "out", fingerprint)
    found = tensors(tmp_path / "out")["model.layers.1.mlp.up_proj.weight"]
    assert torch.equal(found, torch.from_numpy(expected))
    weight = model.get_parameter("model.layers.1.mlp.up_proj.weight")
    assert 0 < (found - weight).abs().max() <= weight.abs().max() / 127
    assert about.types == {"F32": 5, "Q8_0": 15}


def test_nothing_says_that_it_was_quantised_or_where(
    model: LlamaForCausalLM, tmp_path: Path, call: Call
) -> None:
    written(model, tmp_path / "m.gguf", blocks="Q8_0")
    done = call(
        "models", "import", tmp_path / "m.gguf", "--out", tmp_path / "out", "--dtype", "bfloat16"
    )
    assert done.code == 0 and "15 Q8_0" in done.out
    told = json.loads((tmp_path / "out" / "config.json").read_text())
    assert told["dtype"] == "bfloat16" and "quantization_config" not in told
    for file in (tmp_path / "out").glob("[!.]*.json"):
        text = file.read_text()
        assert "gguf" not in text and "/tmp" not in text and "A small model" not in text, file
    stored = tensors(tmp_path / "out")
    assert {x.dtype for x in stored.values()} == {torch.bfloat16}
    import_gguf(tmp_path / "m.gguf", tmp_path / "wide", fingerprint)
    for name, x in tensors(tmp_path / "wide").items():
        assert torch.equal(stored[name], x.bfloat16()), name  # rounded once
    record = json.loads((tmp_path / "out" / RECORD).read_text())
    assert (
        record["fingerprint"] == Checkpoint(tmp_path / "out").fingerprint()
        and record["fingerprint"] in done.out
    )


def test_what_lies_beside_the_file_is_no_part_of_it(
    model: LlamaForCausalLM, tmp_path: Path
) -> None:
    """A folder of a repository has a config.json, too, of which transformers would take the tokenizer's class."""
    (tmp_path / "repository").mkdir()
    written(model, tmp_path / "repository" / "m.gguf")
    (tmp_path / "repository" / "config.json").write_text('{"model_type": "gpt2", "vocab_size": 3}')
    (tmp_path / "repository" / "tokenizer_config.json").write_text('{"eos_token": "a"}')
    import_gguf(tmp_path / "repository", tmp_path / "out", fingerprint)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token == "</s>"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.vocab_size == 48


def test_a_folder_with_a_gguf_says_the_command_and_it_works(
    model: LlamaForCausalLM, tmp_path: Path, call: Call
) -> None:
    (tmp_path / "there").mkdir()
    written(model, tmp_path / "there" / "m.gguf")
    said = one_sentence(lambda: check(str(tmp_path / "there")), CLGraftError)
    (words,) = re.findall(r"`cl-graft (.*?)`", said)
    new = str(tmp_path / "new")
    assert call(*(new if word == "NEW" else word for word in words.split())).code == 0
    check(new)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"fields": {"split.count": 3}}, ["one of 3 parts", "llama-gguf-split --merge"]),
        ({"architecture": "rwkv7"}, ["architecture rwkv7 is not supported"]),
        (
            {"tensors": {"rope_freqs.weight": np.ones(8, np.float32)}},
            ["'rope_freqs.weight'", "another model"],
        ),
        (
            {"leave_out": "model.layers.1.mlp.up_proj.weight"},
            ["model.layers.1.mlp.up_proj.weight", "random numbers"],
        ),
    ],
)
def test_what_would_be_another_model_is_refused(
    change: dict, words: list[str], model: LlamaForCausalLM, tmp_path: Path
) -> None:
    written(model, tmp_path / "m.gguf", **change)
    refused(lambda: import_gguf(tmp_path / "m.gguf", tmp_path / "out", fingerprint), *words)
    assert [file.name for file in tmp_path.iterdir()] == ["m.gguf"]


def test_which_file_is_asked(model: LlamaForCausalLM, tmp_path: Path) -> None:
    def importing(source: Path, out: Path = tmp_path / "out", dtype: str = "float32"):
        return lambda: import_gguf(source, out, fingerprint, dtype)

    file = written(model, tmp_path / "a.gguf")
    refused(importing(tmp_path / "none.gguf"), "there is no")
    refused(importing(file, dtype="float8"), "float16")
    refused(importing(file, tmp_path), "is not empty")
    (tmp_path / "empty").mkdir()
    refused(importing(tmp_path / "empty"), "holds no file that ends in .gguf")
    shutil.copy(file, tmp_path / "b.gguf")
    refused(importing(tmp_path), "holds 2 GGUF files", str(file))
    torn = tmp_path / "empty" / "torn.gguf"
    torn.write_bytes(file.read_bytes()[:700])
    refused(importing(torn), "no whole GGUF file")


def test_the_package_that_reads_them_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.utils.is_gguf_available", lambda: False)
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    refused(
        lambda: import_gguf(tmp_path / "m.gguf", tmp_path / "out", fingerprint),
        "`pip install cl-graft[gguf]`",
    )
