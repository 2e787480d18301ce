"""A tokenizer is read as its folder holds it, whatever the type of the model beside it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from cl_graft.models import embedded
from cl_graft.models.load import load_tokenizer
from cl_graft.models.tokenizer import read

TEXT = "Q: Shift cto by 12 and 345.\nA: élan"
KINDS = ["qwen2", "qwen3_5", "hyperclovax_vision_v2", "qwen3", "gpt2", "opt", "gpt_neox", "llama"]


def folder_of(where: Path, kind: str, **told: object) -> list[int]:
    """Write a tokenizer of whole words and bytes beside a model of a type; the ids that TEXT has by it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<pad>", "<s>", "</s>", *alphabet, "ĠShift", "Ġ12"]
    made = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, [], ignore_merges=True))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    saved = PreTrainedTokenizerFast(tokenizer_object=made, padding_side="left", **special)
    saved.chat_template = "{{ messages[0].content }}"
    saved.save_pretrained(where)
    (where / "config.json").write_text(json.dumps({"model_type": kind}))
    settings = where / "tokenizer_config.json"
    merged = json.loads(settings.read_text()) | told
    settings.write_text(json.dumps({k: v for k, v in merged.items() if v is not None}))
    return made.encode(TEXT).ids


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("named", ["TokenizersBackend", "PreTrainedTokenizerFast", None])
def test_a_text_has_the_ids_of_the_folders_own_file(
    tmp_path: Path, kind: str, named: str | None
) -> None:
    """By hand: one token for ` Shift` and one for ` 12`, and bytes for the rest."""
    expected = folder_of(tmp_path, kind, tokenizer_class=named)
    assert len(expected) == len(TEXT.encode()) - len(" Shift 12") + 2
    tokenizer = read(str(tmp_path))
    assert tokenizer(TEXT, add_special_tokens=False)["input_ids"] == expected
    assert tokenizer.decode(expected) == TEXT
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer.padding_side == "left" and tokenizer.chat_template
    tokenizer.save_pretrained(tmp_path / "stage")
    (tmp_path / "stage" / "config.json").write_text(json.dumps({"model_type": kind}))
    again = read(str(tmp_path / "stage"))
    assert again(TEXT, add_special_tokens=False)["input_ids"] == expected


def test_transformers_still_takes_qwen2s_own_class(tmp_path: Path) -> None:
    """findings/transformers_tokenizer_class.sh; where this fails `read` may need to mend nothing any more."""
    expected = folder_of(tmp_path, "qwen2")
    plain = AutoTokenizer.from_pretrained(tmp_path)
    assert type(plain).__name__ == "Qwen2Tokenizer"
    assert plain(TEXT, add_special_tokens=False)["input_ids"] != expected


def test_a_class_that_reads_as_the_file_does_stays(tmp_path: Path) -> None:
    """GPT-2's own, of GPT-2's own splitting; and it is asked for nothing twice."""
    folder_of(tmp_path, "gpt2", tokenizer_class="GPT2Tokenizer")
    own = AutoTokenizer.from_pretrained(tmp_path)
    own.save_pretrained(tmp_path)
    tokenizer = read(str(tmp_path))
    assert type(tokenizer).__name__ == type(own).__name__ == "GPT2Tokenizer"
    assert tokenizer(TEXT)["input_ids"] == own(TEXT)["input_ids"]


@pytest.mark.parametrize("name", ["mini-gpt2", "mini-neox", "mini-opt", "mini-qwen2", "nano-llama"])
def test_an_embedded_model_is_read_by_what_it_was_trained_by(tmp_path: Path, name: str) -> None:
    """mini-qwen2, well trained, answered nothing right before it was."""
    spec = embedded.SPECS[name]
    trained, _ = embedded._kind(spec, [])
    trained.save_pretrained(tmp_path)
    embedded.without_weights(name).config.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(name, str(tmp_path))
    assert tokenizer(TEXT)["input_ids"] == trained(TEXT)["input_ids"]
