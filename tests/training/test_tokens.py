"""One way to make tokens: what SFT and DPO train on is what an answer is generated from, cut the same way."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from cl_graft.config import Launch
from cl_graft.errors import CLGraftError
from cl_graft.evaluation import generate as generation
from cl_graft.evaluation.features import Features
from cl_graft.evaluation.generate import answers, choice_likelihoods, log_likelihoods
from cl_graft.models.pairs import without_equal_pairs
from cl_graft.models.text import encode, encode_prompts
from cl_graft.store.files import read_jsonl
from cl_graft.task import Example, Pair, Preference, Scenario, Task, Training
from cl_graft.training.config import dpo_job, order, sft_job
from cl_graft.training.fit import LOG, _arguments, _trainer, fit
from cl_graft.training.tokens import Tokens, largest
from tests.refusals import refusal

PROMPTS = ("Q: 1+1?\nA:", "Q: 2+2?\nA: ", "clerk " * 40 + "Q: 3+3?\nA: ")
HALF = Preference(steps=2, batch=3, learning_rate=1e-3)
RECIPE = Training(steps=2, batch=3, warmup=0.0, max_length=32, preference=HALF)
EXAMPLES = [Example(prompt, "12") for prompt in PROMPTS]
PAIRS = [Pair(prompt, "12", "zzzz") for prompt in PROMPTS]
TASK = Task("sums", EXAMPLES, EXAMPLES[:1], "exact", training=RECIPE, pairs=PAIRS)


@pytest.fixture(params=["bytes", "merges over blanks"])
def speech(request: Any, nano: Any) -> Any:
    """A tokenizer of characters, and one that makes one token of a blank and what follows, as BPE does."""
    if request.param == "bytes":
        return nano[1]
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", letter) for letter in "12z"]
    vocabulary = [*letters, *("".join(pair) for pair in merges)]
    inner = Tokenizer(models.BPE({word: i for i, word in enumerate(vocabulary)}, merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.add_special_tokens(["</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", pad_token="</s>")


def in_batches(model: Any, tokenizer: Any, job: Any, folder: Any) -> list[tuple[list, list]]:
    """(prompt, answer) ids of every text in the first batch that TRL's trainer would take a step on."""
    rows, config = job
    arguments = _arguments(config, Launch(), folder, None)
    trainer, _ = _trainer(model, tokenizer, rows, config, arguments)
    batch = next(iter(trainer.get_train_dataloader()))
    answer = batch["labels"] != -100 if "labels" in batch else batch["completion_mask"] == 1
    read = batch["attention_mask"].bool()
    ids = batch["input_ids"]
    return [
        (row[m & ~a].tolist(), row[a].tolist()) for row, a, m in zip(ids, answer, read, strict=True)
    ]


def test_sft_dpo_and_generation_read_the_same_tokens(nano, speech, tmp_path, monkeypatch):
    """Prompts that end in a blank, or alone are longer than max_length: TRL's own DPO (1.16) makes ` 1` of the blank and
    the answer, which no prompt ends in when an answer is generated, and drops the long one."""
    model = nano[0]
    model.resize_token_embeddings(len(speech))
    wanted = {tuple(map(tuple, encode(speech, p, "12", 32))) for p in PROMPTS}
    sft = in_batches(model, speech, sft_job(TASK, 0), tmp_path / "sft")
    assert {(tuple(h), tuple(t)) for h, t in sft} == wanted
    dpo = in_batches(model, speech, dpo_job(TASK, PAIRS, 0), tmp_path / "dpo")
    chosen, rejected = dpo[:3], dpo[3:]
    assert [h for h, _ in chosen] == [h for h, _ in rejected], "both answer the same prompt"
    assert {tuple(t) for _, t in chosen} == {tail for _, tail in wanted}
    for head, _ in chosen:
        assert any(tuple(head) == whole[len(whole) - len(head) :] for whole, _ in wanted)
    assert max(len(h) + len(t) for h, t in dpo) == 32
    seen = []
    plain = generation.Decoding

    def read(model, prompts, *more):
        seen.extend(prompts)
        return plain(model, prompts, *more)

    monkeypatch.setattr(generation, "Decoding", read)
    answers(model, speech, PROMPTS[:2], 4)
    assert set() < {tuple(ids) for ids in seen} < {head for head, _ in wanted}


def test_pairs_whose_prompt_is_too_long_are_trained_on(nano, tmp_path):
    """All of them: every step has its rows, and the margin grows though each prompt alone fills max_length."""
    pairs = [Pair("clerk " * 40 + f"Q: {i}?\nA: ", "12", "zz") for i in range(4)]
    half = replace(HALF, steps=8, batch=4, learning_rate=1e-2)
    task = replace(TASK, training=replace(RECIPE, preference=half))
    fit(*nano, *dpo_job(task, pairs, 0), Launch(), tmp_path)
    assert [x["rewards/margins"] for x in read_jsonl(tmp_path / LOG)][-1] > 0.1


def test_pairs_that_differ_only_after_the_cut_are_left_out_and_counted(nano):
    tokenizer = nano[1]
    same = "1" * 40
    alike = [Pair("Q", same + "2", same + "3"), Pair("Q", "4", "4")]
    made = Scenario("s", (replace(TASK, pairs=[PAIRS[0], *alike]),))
    kept, (told,) = without_equal_pairs(made, tokenizer)
    assert kept.tasks[0].pairs == [PAIRS[0]]
    assert "'sums': 2 of 3 preference pairs are left out" in told and "max_length=32" in told
    assert without_equal_pairs(kept, tokenizer) == (kept, [])
    none_left = Scenario("s", (replace(TASK, pairs=alike),))
    words = "'sums' has 2 preference pairs, all with the same"
    refusal(CLGraftError, lambda: without_equal_pairs(none_left, tokenizer), words)
    sft_only = replace(TASK, pairs=alike, training=replace(RECIPE, preference=None))
    assert without_equal_pairs(Scenario("s", (sft_only,)), tokenizer)[1] == []


@pytest.mark.parametrize("begins", [True, False])
def test_an_empty_prompt_is_the_token_that_a_text_begins_with(nano, speech, tmp_path, begins):
    """Without a beginning-of-text token the end-of-sequence token, as in lm-evaluation-harness; alone and among others."""
    model = nano[0]
    model.resize_token_embeddings(len(speech))
    if begins and speech.bos_token is None:
        speech.add_special_tokens({"bos_token": "<s>"})
        model.resize_token_embeddings(len(speech))
    ((first,),) = encode_prompts(speech, [""])
    assert first == (speech.bos_token_id if speech.bos_token else speech.eos_token_id)
    assert encode(speech, "", "12", 32)[0] == [first]
    for prompts in ([""], ["", "Q: 1"]):
        assert len(answers(model, speech, prompts, 2)) == len(prompts)
        assert Features(model, speech)(prompts).isfinite().all()
        assert all(x < 0 for x in log_likelihoods(model, speech, [(p, "12") for p in prompts], 32))
        assert len(choice_likelihoods(model, speech, prompts, ["1", "2"], 32)) == len(prompts)
    empty = replace(TASK, train=[Example("", "12")] * 3, pairs=[Pair("", "12", "z")] * 3)
    fit(model, speech, *sft_job(empty, 0), Launch(), tmp_path / "sft")
    fit(model, speech, *dpo_job(empty, empty.pairs, 0), Launch(), tmp_path / "dpo")


def test_the_largest_micro_batch_of_a_job() -> None:
    """Rows of 5, 3 and 9 tokens with 1, 2 and 4 labels, two in a batch, in the job's own order."""
    sizes, told = (5, 3, 9), (1, 2, 4)
    examples: list[Tokens] = [
        {"input_ids": [7] * n, "labels": [-100] * (n - k) + [7] * k}
        for n, k in zip(sizes, told, strict=True)
    ]
    job = replace(sft_job(TASK, 0)[1], steps=3, batch=2)
    first, second, third = (order(3, job)[i : i + 2] for i in (0, 2, 4))
    pairs = [first, second, third]
    whole = max(sizes[i] + sizes[j] for i, j in pairs), max(told[i] + told[j] for i, j in pairs)
    assert largest(examples, job, 2) == whole
    assert largest(examples, job, 1) == (9, 4)
    pair = {"prompt_ids": [7] * 3, "chosen_ids": [7] * 2, "rejected_ids": [7]}
    assert largest([pair], replace(job, kind="dpo", batch=1), 1) == (3 + 2 + 3 + 1, 2 + 1)
