"""The embedded sources: another architecture and vocabulary, and the Llamas' folders as they were."""

from __future__ import annotations

import hashlib
import json
import platform
from collections import Counter
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cl_graft.evaluation.generate import log_likelihoods
from cl_graft.models import embedded, mini_gpt2, mini_sources, toy_language
from cl_graft.models.load import load

TOKENIZER = mini_gpt2.tokenizer()


@given(st.text())
def test_its_vocabulary_writes_any_text(text: str) -> None:
    ids = TOKENIZER(text)["input_ids"]
    assert ids[0] == TOKENIZER.bos_token_id
    assert TOKENIZER.decode(ids[1:]) == text


def test_words_are_whole_and_digits_and_other_letters_are_not() -> None:
    assert TOKENIZER.tokenize("Tom has 41 xq?") == [
        "Tom",
        "Ġhas",
        "Ġ",
        "4",
        "1",
        "Ġ",
        "x",
        "q",
        "?",
    ]
    llama = embedded.toy_tokenizer()
    prompt = toy_language.prompt("Tom has 3 apples.")
    assert TOKENIZER(prompt)["input_ids"] != llama(prompt)["input_ids"]
    assert len(TOKENIZER) != len(llama)


def test_every_batch_holds_the_tasks_in_the_same_shares() -> None:
    starts = {"Shift": "cipher", "Write": "code"}
    for batch in islice(mini_gpt2.batches(32, 0), 5):
        kinds = Counter(starts.get(prompt.split()[1], "math") for prompt, _ in batch)
        assert kinds == {"math": 22, "code": 4, "cipher": 6}
    first, again = next(mini_gpt2.batches(32, 7)), next(mini_gpt2.batches(32, 7))
    assert first == again != next(mini_gpt2.batches(32, 8))


def test_it_is_a_gpt2_that_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CL_GRAFT_CACHE", str(tmp_path))
    spec = replace(embedded.SPECS["nano-gpt2"], steps=30)
    monkeypatch.setitem(embedded.SPECS, "nano-gpt2", spec)
    model, tokenizer = load("nano-gpt2")
    assert type(model).__name__ == "GPT2LMHeadModel"
    assert tokenizer("Q: Tom")["input_ids"] == TOKENIZER("Q: Tom")["input_ids"]
    torch.manual_seed(0)
    fresh = mini_gpt2.new_gpt2(spec, len(tokenizer))
    rng = Random(99)
    pairs = [
        (toy_language.prompt(i.question), i.answer)
        for i in (toy_language.math(rng) for _ in range(20))
    ]
    before, after = (sum(log_likelihoods(m, tokenizer, pairs, 128)) for m in (fresh, model))
    assert after > 0.8 * before


def test_the_llamas_folders_are_those_of_before_there_were_families() -> None:
    """The digest as it was computed then: every field of the recipe but the family."""
    for name in ("mini-llama", "nano-llama"):
        recipe = asdict(embedded.SPECS[name])
        assert recipe.pop("family") == "llama"
        recipe |= {"torch": torch.__version__, "machine": platform.machine()}
        digest = hashlib.blake2b(json.dumps(recipe, sort_keys=True).encode(), digest_size=6)
        digest.update(Path(toy_language.__file__).read_bytes())
        assert embedded.folder(name, []).name == f"{name}-{digest.hexdigest()}"


@pytest.mark.parametrize("name", ["mini-neox", "mini-opt", "mini-qwen2"])
def test_each_expert_has_an_architecture_and_a_vocabulary_of_its_own(name: str) -> None:
    family = mini_sources.FAMILIES[embedded.SPECS[name].family]
    tokenizer = family.tokenizer()
    text = "Q: Tom has 41 bags.\nA: def f(x): return (x+35)*2 ÄŽ~"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id and tokenizer.decode(ids[1:]) == text
    assert family.tokenizer().get_vocab() == tokenizer.get_vocab(), "the same each time"
    others = [f.tokenizer for f in mini_sources.FAMILIES.values() if f is not family]
    others += [mini_gpt2.tokenizer, embedded.toy_tokenizer]
    assert all(other()(text)["input_ids"] != ids for other in others)
    model = embedded.without_weights(name)
    assert model.config.model_type == {"gpt-neox": "gpt_neox"}.get(
        embedded.SPECS[name].family, embedded.SPECS[name].family
    )
    said = embedded.SPECS[name].about.split()[0]
    assert f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}" == said
    prompts = [prompt.split()[1] for prompt, _ in next(family.batches(32, 0))]
    kinds = Counter({"Shift": "cipher", "Write": "code"}.get(p, "math") for p in prompts)
    task = {"mini-neox": "math", "mini-opt": "code", "mini-qwen2": "cipher"}[name]
    assert kinds[task] >= 24 and len(kinds) == 3
