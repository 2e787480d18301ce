"""Training stages: what the loss is taken over, what changes, what is deterministic."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cl_graft.errors import CLGraftError
from cl_graft.models.text import encode
from cl_graft.task import Example, Pair, Preference, Training
from cl_graft.training.preferences import preference_pairs
from cl_graft.training.stage import dpo, sft

EXAMPLES = [Example(f"Q: Copy ab{c}.\nA: ", f"ab{c}") for c in "cdefghij"]


def weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def test_the_loss_is_over_the_completion_and_its_end_only(nano):
    """TRL's first logged loss against the mean of -log p of the completion tokens, by hand."""
    model, tokenizer = nano
    total, count = 0.0, 0
    for example in EXAMPLES:
        head, tail = encode(tokenizer, example.prompt, example.completion, 512)
        with torch.no_grad():
            logits = model(torch.tensor([head + tail])).logits[0].log_softmax(-1)
        total -= sum(logits[len(head) + i - 1, token].item() for i, token in enumerate(tail))
        count += len(tail)
    log = sft(model, tokenizer, EXAMPLES, Training(steps=1, batch=8, warmup=0.0), seed=0)
    assert log.losses[0]["loss"] == pytest.approx(total / count, rel=1e-3)


def test_the_prompt_is_not_learned(nano):
    """With one fixed answer the model still does not learn to write questions."""
    model, tokenizer = nano
    start = weights(model)
    sft(
        model,
        tokenizer,
        [replace(e, completion="") for e in EXAMPLES],
        Training(steps=3, batch=8),
        0,
    )
    head, _ = encode(tokenizer, EXAMPLES[0].prompt, "", 512)

    def prompt_likelihood():
        with torch.no_grad():
            logits = model(torch.tensor([head])).logits[0].log_softmax(-1)
        return sum(logits[i, head[i + 1]].item() for i in range(len(head) - 1))

    after = prompt_likelihood()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(start[name])
    assert after < prompt_likelihood() + 0.5 * len(head)


def test_the_same_seed_gives_the_same_weights_and_another_does_not(nano):
    model, tokenizer = nano
    start, ends = weights(model), []
    for seed in (0, 0, 1):
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(start[name])
        sft(model, tokenizer, EXAMPLES, Training(steps=4, batch=4), seed)
        ends.append(weights(model))
    assert all(torch.equal(ends[0][n], ends[1][n]) for n in start)
    assert any(not torch.equal(ends[0][n], ends[2][n]) for n in start)


def test_micro_batches_hold_the_declared_batch(nano):
    """Four micro-batches of two are one batch of eight: the same step, up to the order of sums."""
    model, tokenizer = nano
    start, ends = weights(model), []
    for micro in (None, 2):
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(start[name])
        recipe = Training(steps=1, batch=8, warmup=0.0, micro_batch=micro)
        ends.append((sft(model, tokenizer, EXAMPLES, recipe, 0).losses[0]["loss"], weights(model)))
    assert ends[0][0] == pytest.approx(ends[1][0], rel=1e-4)
    with pytest.raises(CLGraftError, match="multiple"):
        sft(model, tokenizer, EXAMPLES, Training(steps=1, batch=8, micro_batch=3), 0)


def test_dpo_raises_the_margin_of_the_better_answer_over_the_worse(nano):
    model, tokenizer = nano
    pairs = [Pair(e.prompt, e.completion, "zzz") for e in EXAMPLES]
    recipe = Preference(steps=12, batch=8, learning_rate=1e-3)
    log = dpo(model, tokenizer, pairs, Training(warmup=0.0), recipe, 0)
    margins = [x["rewards/margins"] for x in log.losses]
    assert margins[0] == pytest.approx(0.0, abs=1e-5), "the reference is the model at the start"
    assert margins[-1] > 0.1
    assert log.losses[0]["loss"] == pytest.approx(0.6931, abs=1e-3)


def test_preference_pairs_are_a_right_answer_against_a_wrong_one(nano, tiny_scenario):
    from cl_graft.evaluation.scorers import number_is_right

    model, tokenizer = nano
    task = tiny_scenario.tasks[0]
    sft(model, tokenizer, task.train, Training(steps=80, batch=16, learning_rate=5e-3), 0)
    pairs = preference_pairs(
        model, tokenizer, task, Preference(prompts=24, samples=8, temperature=1.3), 0, False
    )
    assert pairs
    by_prompt = {e.prompt: e for e in task.train}
    for pair in pairs:
        assert number_is_right(by_prompt[pair.prompt], pair.chosen)
        assert not number_is_right(by_prompt[pair.prompt], pair.rejected)


def test_a_long_example_loses_the_start_of_its_prompt_and_keeps_its_answer(nano):
    _, tokenizer = nano
    head, tail = encode(tokenizer, "Q: " + "x" * 100 + "\nA: ", "abc", 20)
    assert len(head) + len(tail) == 20
    assert (
        tokenizer.decode(tail, skip_special_tokens=True) == "abc"
        and tail[-1] == tokenizer.eos_token_id
    )
    assert tokenizer.decode(head).endswith("\nA: ")
