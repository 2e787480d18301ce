"""Sampling: a chunk's answers depend on the chunk alone."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from cl_graft.errors import CLGraftError
from cl_graft.models import mini_gpt2
from cl_graft.transfer.config import BuildConfig
from cl_graft.transfer.sample import chunks, hf_sampler, vllm_request, vllm_sampler
from cl_graft.transfer.sources import SourceError, check_readable, identify, worded

PROMPTS = ["Q: Copy a.\nA: ", "Q: Copy b.\nA: ", "Q: Copy c.\nA: "]
TEMPLATE = "<s>{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"


def config(**changes) -> BuildConfig:
    return BuildConfig(**{"sources": ("x",), "prompts": "p", "out": Path("o"), **changes})


def test_the_schedule_covers_every_source_and_prompt_once_by_length() -> None:
    prompts = ["aaaa", "a", "aaa", "aa", "b"]
    found = chunks(["s", "t"], prompts, samples=2, seed=0, answers=5)
    assert [(c.source, c.prompts) for c in found] == [
        (name, group) for name in "st" for group in ((1, 4), (3, 2), (0,))
    ]
    assert len({c.seed for c in found}) == 6
    assert all(0 <= c.seed < 2**31 for c in found)


def test_a_chunks_seed_depends_on_the_builds_seed_the_source_and_its_number() -> None:
    seeds = {c.source: c.seed for c in chunks(["s", "t"], ["a"], 1, 0, 8)}
    assert seeds == {c.source: c.seed for c in chunks(["t", "s"], ["b"], 1, 0, 8)}
    assert seeds["s"] != chunks(["s"], ["a"], 1, 1, 8)[0].seed


def test_more_samples_than_fit_a_chunk_are_still_one_prompt_each() -> None:
    assert [c.prompts for c in chunks(["s"], ["a", "b"], 100, 0, 64)] == [(0,), (1,)]


def test_answers_do_not_depend_on_what_was_sampled_before(torn: Path) -> None:
    sample = hf_sampler(config(samples=8), str(torn), 4, chat=False)
    first = sample(PROMPTS, 11)
    other = sample(PROMPTS, 12)
    assert sample(PROMPTS, 11) == first != other
    assert [len(said) for said in first] == [8, 8, 8]
    texts = {answer.text for said in first + other for answer in said}
    assert {"yes", "no"} <= texts
    for answer in (a for said in first for a in said if a.text in ("yes", "no")):
        assert answer.finished and answer.tokens == len(answer.text)  # one token a letter


def test_an_answer_at_the_limit_is_cut_off(torn: Path) -> None:
    sample = hf_sampler(config(samples=8), str(torn), 1, chat=False)
    said = [answer for said in sample(PROMPTS, 0) for answer in said]
    assert {(a.finished, a.tokens) for a in said if a.text} == {(False, 1)}


def test_temperature_0_is_greedy(torn: Path) -> None:
    sample = hf_sampler(config(samples=1, temperature=0), str(torn), 4, chat=False)
    assert sample(PROMPTS, 1) == sample(PROMPTS, 2)


# --- what a source can read ---


def test_a_byte_vocabulary_reads_everything_and_words_do_not(torn: Path, sure: Path) -> None:
    texts = ["plain", "naïve  café\n\t", "日本 ½ <pad"]
    for_bytes, for_words = (AutoTokenizer.from_pretrained(f) for f in (torn, sure))
    check_readable("torn", for_bytes, None, texts, 4)
    with pytest.raises(SourceError, match="prompt 2 .*'ï', 'é'"):
        check_readable("sure", for_words, None, texts, 4)


def test_special_tokens_in_a_prompt_would_be_lost(torn: Path) -> None:
    with pytest.raises(SourceError, match="cannot read prompt 1 "):
        check_readable("torn", AutoTokenizer.from_pretrained(torn), None, ["end </s> here"], 4)


def test_a_prompt_must_leave_room_for_the_answer() -> None:
    tokenizer = mini_gpt2.tokenizer()

    class Small:
        max_position_embeddings = 10

    check_readable("s", tokenizer, Small, ["12345"], 4)  # with <s>: 6 + 4
    with pytest.raises(SourceError, match="reads 10 tokens and prompt 2 .* has 7"):
        check_readable("s", tokenizer, Small, ["12345", "123456"], 4)


def test_a_chat_template_without_its_beginning_twice() -> None:
    tokenizer = mini_gpt2.tokenizer()
    assert worded(tokenizer, "s", "hi", chat=False) == "hi"
    with pytest.raises(SourceError, match="no chat template"):
        worded(tokenizer, "s", "hi", chat=True)
    tokenizer.chat_template = TEMPLATE
    assert worded(tokenizer, "s", "hi", chat=True) == "[user]hi"
    assert worded(tokenizer, "s", "hi", chat=None) == "[user]hi"
    assert worded(tokenizer, "s", "hi", chat=False) == "hi"
    assert tokenizer(worded(tokenizer, "s", "hi", True)).input_ids.count(1) == 1


def test_a_source_is_identified_by_all_its_files(torn: Path, tmp_path: Path) -> None:
    import shutil

    copy = Path(shutil.copytree(torn, tmp_path / "copy"))
    before = identify(str(copy), None)
    assert before["digest"] == identify(str(torn), None)["digest"]
    for name in ("model.safetensors", "tokenizer.json", "generation_config.json"):
        kept = (copy / name).read_bytes()
        (copy / name).write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
        assert identify(str(copy), None) != before
        (copy / name).write_bytes(kept)
    assert identify(str(copy), None) == before


# --- vLLM ---


def test_what_vllm_is_asked() -> None:
    """The tokens that the other engine reads, a seed for every prompt, and nothing left to the model's defaults."""
    tokenizer = mini_gpt2.tokenizer()
    asked = config(samples=3, temperature=0.7, top_p=0.9)
    inputs, parameters = vllm_request(asked, tokenizer, ["hi", "yo"], 16, seed=2**31 - 1)
    assert inputs == [{"prompt_token_ids": tokenizer(text)["input_ids"]} for text in ("hi", "yo")]
    common = {"n": 3, "temperature": 0.7, "top_p": 0.9, "top_k": 0, "max_tokens": 16}
    assert parameters == [{**common, "seed": 2**31 - 1}, {**common, "seed": 0}]


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")
def test_vllm_where_it_is_not_installed() -> None:
    with pytest.raises(CLGraftError, match=r"vLLM is not installed; .*cl-graft\[vllm\]"):
        vllm_sampler(config(backend="vllm"), "x", 4, chat=False)


@pytest.mark.skipif(
    find_spec("vllm") is None or not torch.cuda.is_available(),
    reason="vLLM is not installed, or there is no GPU for it",
)
def test_vllm_answers(torn: Path) -> None:
    sample = vllm_sampler(config(samples=8, backend="vllm"), str(torn), 4, chat=False)
    first = sample(PROMPTS, 11)
    assert sample(PROMPTS, 11) == first
    assert {"yes", "no"} <= {answer.text for said in first for answer in said}
