"""Training stages: what the loss is taken over, what changes, what is deterministic."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cl_graft.config import Launch
from cl_graft.errors import CLGraftError
from cl_graft.models.text import encode
from cl_graft.store.files import read_jsonl
from cl_graft.task import Example, Pair, Preference, Task, Training
from cl_graft.training import preferences
from cl_graft.training.config import dpo_job, order, sft_job
from cl_graft.training.fit import LOG, fit
from cl_graft.training.preferences import sampled

EXAMPLES = [Example(f"Q: Copy ab{c}.\nA: ", f"ab{c}") for c in "cdefghij"]


@pytest.fixture
def train(tmp_path):
    """Run one job in a folder of its own; returns its log."""
    count = 0

    def run(nano, rows, config, **launch):
        nonlocal count
        count += 1
        work = tmp_path / str(count)
        fit(*nano, rows, config, Launch(**launch), work)
        return list(read_jsonl(work / LOG))

    return run


def sft(examples, recipe, seed=0):
    return sft_job(Task("t", examples, (), "exact", training=recipe), seed)


def dpo(pairs, recipe, half, seed=0):
    return dpo_job(
        Task("t", (), (), "exact", training=replace(recipe, preference=half)), pairs, seed
    )


def weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def test_the_loss_is_over_the_completion_and_its_end_only(nano, train):
    """TRL's first logged loss against the mean of -log p of the completion tokens, by hand."""
    model, tokenizer = nano
    total, count = 0.0, 0
    for example in EXAMPLES:
        head, tail = encode(tokenizer, example.prompt, example.completion, 512)
        with torch.no_grad():
            logits = model(torch.tensor([head + tail])).logits[0].log_softmax(-1)
        total -= sum(logits[len(head) + i - 1, token].item() for i, token in enumerate(tail))
        count += len(tail)
    log = train(nano, *sft(EXAMPLES, Training(steps=1, batch=8, warmup=0.0)))
    assert log[0]["loss"] == pytest.approx(total / count, rel=1e-3)


def test_the_prompt_is_not_learned(nano, train):
    """With one fixed answer the model still does not learn to write questions."""
    model, tokenizer = nano
    start = weights(model)
    bare = [replace(e, completion="") for e in EXAMPLES]
    train(nano, *sft(bare, Training(steps=3, batch=8)))
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


def test_the_same_seed_gives_the_same_weights_and_another_does_not(nano, train):
    model, tokenizer = nano
    start, ends = weights(model), []
    for seed in (0, 0, 1):
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(start[name])
        train(nano, *sft(EXAMPLES, Training(steps=4, batch=4), seed))
        ends.append(weights(model))
    assert all(torch.equal(ends[0][n], ends[1][n]) for n in start)
    assert any(not torch.equal(ends[0][n], ends[2][n]) for n in start)


def test_micro_batches_hold_the_declared_batch(nano, train):
    """Four micro-batches of two are one batch of eight: the same step, up to the order of sums."""
    model, tokenizer = nano
    start, ends = weights(model), []
    for micro in (None, 2):
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(start[name])
        recipe = Training(steps=1, batch=8, warmup=0.0)
        log = train(nano, *sft(EXAMPLES, recipe), micro_batch=micro)
        ends.append((log[0]["loss"], weights(model)))
    assert ends[0][0] == pytest.approx(ends[1][0], rel=1e-4)
    with pytest.raises(CLGraftError, match="micro-batches of 3 cannot make a batch of 8"):
        train(nano, *sft(EXAMPLES, recipe), micro_batch=3)


def test_dpo_raises_the_margin_of_the_better_answer_over_the_worse(nano, train):
    pairs = [Pair(e.prompt, e.completion, "zzz") for e in EXAMPLES]
    half = Preference(steps=12, batch=8, learning_rate=1e-3)
    log = train(nano, *dpo(pairs, Training(warmup=0.0), half))
    margins = [x["rewards/margins"] for x in log]
    assert margins[0] == pytest.approx(0.0, abs=1e-5), "the reference is the model at the start"
    assert margins[-1] > 0.1
    assert log[0]["loss"] == pytest.approx(0.6931, abs=1e-3)


def test_preference_pairs_are_a_right_answer_against_a_wrong_one(nano, tiny_scenario, train):
    from cl_graft.evaluation.scorers.number import number

    model, tokenizer = nano
    task = tiny_scenario.tasks[0]
    train(nano, *sft(task.train, Training(steps=80, batch=16, learning_rate=5e-3)))
    pairs = sampled(
        model, tokenizer, task, Preference(prompts=24, samples=8, temperature=1.3), 0, False
    ).pairs
    assert pairs
    by_prompt = {e.prompt: e for e in task.train}
    for pair in pairs:
        assert number.function(by_prompt[pair.prompt], pair.chosen)
        assert not number.function(by_prompt[pair.prompt], pair.rejected)


def test_an_answer_that_was_cut_is_in_no_preference_pair(nano, tiny_scenario, monkeypatch):
    """Training would put an end after it where there was none; of the others the best and the worst make the pair."""
    from cl_graft.evaluation.generate import Answer

    task = replace(tiny_scenario.tasks[0], train=[Example("1+1", "2"), Example("1+2", "3")])
    said = [Answer("2", 1, False), Answer("7", 1, True), Answer("2 is it: 2", 3, True)]
    said += [Answer("3", 1, True), Answer("9", 1, False), Answer("", 0, True)]
    by_prompt = {"1+1": said[:3], "1+2": said[3:]}
    monkeypatch.setattr(
        preferences,
        "answers",
        lambda model, tokenizer, prompts, *_: [x for p in prompts[::3] for x in by_prompt[p]],
    )
    half = Preference(prompts=2, samples=3)
    found = preferences.sampled(*nano, task, half, 0, False)
    assert found.pairs == [Pair("1+1", "2 is it: 2", "7")]
    assert found.cut_off == 2 and "2 sampled answers were cut at max_new_tokens=" in found.note(
        task
    )


def test_a_long_example_loses_the_start_of_its_prompt_and_keeps_its_answer(nano):
    _, tokenizer = nano
    head, tail = encode(tokenizer, "Q: " + "x" * 100 + "\nA: ", "abc", 20)
    assert len(head) + len(tail) == 20
    assert (
        tokenizer.decode(tail, skip_special_tokens=True) == "abc"
        and tail[-1] == tokenizer.eos_token_id
    )
    assert tokenizer.decode(head).endswith("\nA: ")


def test_length_normalised_dpo_is_the_papers_loss(nano, train):
    """-log sigmoid(beta/|yw| log-ratio(yw) - beta/|yl| log-ratio(yl)), by hand: the second step's loss, at the weights
    that the first step leads to."""
    model, tokenizer = nano
    start = weights(model)
    pairs = [Pair(e.prompt, e.completion, "zz") for e in EXAMPLES]
    half = Preference(steps=2, batch=8, learning_rate=1e-3, beta=10.0, length_normalised=True)
    log = train(nano, *dpo(pairs, Training(warmup=0.0), half))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(start[name])
    before = [per_token(nano, p) for p in pairs]
    one_step(nano, pairs, 10.0, 1e-3)
    after = [per_token(nano, p) for p in pairs]
    losses = [
        -torch.nn.functional.logsigmoid(torch.tensor(10.0 * ((a[0] - b[0]) - (a[1] - b[1]))))
        for a, b in zip(after, before, strict=True)
    ]
    assert log[1]["loss"] == pytest.approx(float(sum(losses) / len(losses)), rel=2e-3)


def per_token(nano, pair):
    """Mean log-probability of a token of the better and of the worse answer, its end included."""
    model, tokenizer = nano
    found = []
    for answer in (pair.chosen, pair.rejected):
        head, tail = encode(tokenizer, pair.prompt, answer, 512)
        with torch.no_grad():
            logits = model(torch.tensor([head + tail])).logits[0].log_softmax(-1)
        picked = [logits[len(head) + i - 1, token].item() for i, token in enumerate(tail)]
        found.append(sum(picked) / len(picked))
    return found


def one_step(nano, pairs, beta, rate):
    """AdamW's first step on the length-normalised loss at the start, where every log-ratio is zero."""
    model, tokenizer = nano
    loss = 0.0
    for pair in pairs:
        for answer, sign in ((pair.chosen, 1.0), (pair.rejected, -1.0)):
            head, tail = encode(tokenizer, pair.prompt, answer, 512)
            logits = model(torch.tensor([head + tail])).logits[0].log_softmax(-1)
            picked = torch.stack([logits[len(head) + i - 1, t] for i, t in enumerate(tail)])
            # d/dx of -log sigmoid(x) at zero is -1/2
            loss = loss - 0.5 * sign * beta * picked.mean() / len(pairs)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def test_every_pass_takes_every_row_once_and_every_batch_is_whole():
    _, config = sft(EXAMPLES, Training(steps=5, batch=3))
    found = order(8, config)
    assert len(found) == 15
    assert sorted(found[:8]) == list(range(8)) and len(set(found[8:])) == 7
    assert found != order(8, replace(config, seed=1))


def test_epochs_are_passes_over_the_rows():
    _, config = sft(EXAMPLES, Training(epochs=3, batch=5))
    assert config.steps == 5, "24 rows in batches of five"


def test_the_log_tells_loss_rate_gradient_speed_and_memory(nano, train):
    log = train(nano, *sft(EXAMPLES, Training(steps=40, batch=8, learning_rate=1e-3)))
    assert [line["step"] for line in log] == list(range(2, 41, 2))
    for line in log:
        assert line["tokens_per_second"] > 0 and line["peak_memory_mb"] > 0
        assert line["grad_norm"] > 0 and line["loss"] > 0
    assert (
        log[1]["learning_rate"] == pytest.approx(1e-3, rel=0.3) and log[-1]["learning_rate"] < 1e-4
    )


def test_checkpointing_changes_nothing_but_the_memory(nano, train):
    model, _ = nano
    start, ends = weights(model), []
    for checkpointing in (False, True):
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(start[name])
        train(nano, *sft(EXAMPLES, Training(steps=3, batch=8)), checkpointing=checkpointing)
        ends.append(weights(model))
    for name in start:
        torch.testing.assert_close(ends[0][name], ends[1][name])


@pytest.mark.parametrize("tiles", [False, True], ids=["own-head", "tiles"])
@pytest.mark.parametrize("flat", [True, False], ids=["flat", "padded"])
@pytest.mark.parametrize("micro", [8, 2])
def test_the_loss_is_trls_own(nano, monkeypatch, tmp_path, tiles, flat, micro):
    """The gradient of a step as TRL's trainer takes it from the same rows, by either head, whole and cut in four."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from cl_graft.training.term import Term

    model, tokenizer = nano
    start = weights(model)
    examples = [Example(e.prompt + "x" * i, e.completion * (i + 1)) for i, e in enumerate(EXAMPLES)]
    rows, config = sft(examples, Training(steps=1, batch=8, warmup=0.0))
    if tiles:
        monkeypatch.setattr("cl_graft.training.trainer.FEW", 0)
        monkeypatch.setattr("cl_graft.training.flat.MANY", 0)
    SEEN.clear()
    how, terms = Launch(micro_batch=micro), [Term.project(see)]
    fit(*nano, rows, config, how, tmp_path / "ours", terms=terms, flat=flat)
    (line,) = read_jsonl(tmp_path / "ours" / LOG)

    class Theirs(SFTTrainer):
        def _clip_grad_norm(self, model):
            SEEN.append({n: p.grad.clone() for n, p in model.named_parameters()})
            return super()._clip_grad_norm(model)

    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(start[name])
    texts = [encode(tokenizer, r["prompt"], r["completion"], 512) for r in rows]
    trainer = Theirs(
        model=model,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(
            [{"input_ids": h + t, "completion_mask": [0] * len(h) + [1] * len(t)} for h, t in texts]
        ),
        args=SFTConfig(
            output_dir=str(tmp_path / "theirs"),
            max_steps=1,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=8 // micro,
            completion_only_loss=True,
            max_length=None,
            use_cpu=True,
            bf16=False,
            report_to=[],
            logging_steps=1,
            disable_tqdm=True,
        ),
    )
    trainer.train()
    ours, theirs = SEEN
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-6)
    told = trainer.state.log_history[0]
    for column in ("loss", "grad_norm", "num_tokens"):
        assert line[column] == pytest.approx(told[column], rel=1e-5)
    if micro == 8:  # TRL takes the mean of the micro-batches' means, we that of all answer tokens
        for column in ("entropy", "mean_token_accuracy"):
            assert line[column] == pytest.approx(told[column], rel=1e-5)


SEEN: list[dict] = []


def see(model, gradients, state, step):
    SEEN.append({n: g.clone() for n, g in gradients.items()})


def test_a_stage_is_not_saved_twice_at_its_end(nano, tmp_path):
    """What is trained is saved as the stage; its last step checkpoint would only be removed."""
    rows, config = sft(EXAMPLES, Training(steps=8, batch=4))
    fit(*nano, rows, config, Launch(save_steps=4), tmp_path)
    assert [f.name for f in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]
