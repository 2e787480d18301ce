"""LAMOL: rows that the model writes, of what they are made, and a loss on whole rows beside that on answers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cl_graft.evaluation.generate import Answer, answers
from cl_graft.store.files import read_lines
from cl_graft.task import Example, Pair, Preference, Scenario, Task, Training
from cl_graft.training import drawn as drawn_module
from tests.baselines.methods import learn, module, spied

ROWS = [Example(f"{c} = ", c.upper()) for c in "abcdefgh"]
FAST = Training(steps=120, batch=8, learning_rate=5e-3, warmup=0.1, weight_decay=0.0, max_length=32)


KNOWN: dict[str, tuple] = {}


@pytest.fixture
def learned(build):
    """Two tasks of eight rows that can be learned by heart; the strategy, and what its stages were; made once."""
    if KNOWN:
        return KNOWN["it"]
    tasks = [
        Task(name, rows, rows[:2], "exact", training=FAST)
        for name, rows in (
            ("caps", ROWS),
            ("twice", [Example(f"{c} * 2 = ", 2 * c) for c in "abcdefgh"]),
        )
    ]
    scenario = Scenario("written", tuple(tasks))
    strategy = build("lamol", scenario=scenario, gamma=1.0)
    asked = spied(strategy)
    KNOWN["it"] = learn(strategy, scenario), asked
    return KNOWN["it"]


def test_what_was_learned_by_heart_is_written_again_and_rehearsed(learned):
    """Eight rows are begun after `__caps__`; most are rows of the first task to the letter. All are trained on twice."""
    strategy, (first, second) = learned
    assert len(first["rows"]) == 8 and first["job"].steps == second["job"].steps == 120
    written = second["rows"][8:]
    true = [{"prompt": e.prompt, "completion": e.completion} for e in ROWS]
    assert 4 <= len(written) <= 8
    assert sum(row in true for row in written) >= len(written) / 2
    state = second["terms"][0].state
    assert len(state["input_ids"]) == len(second["rows"])
    texts = strategy.tokenizer.batch_decode(state["input_ids"], skip_special_tokens=True)
    wanted = ["__twice__"] * 8 + ["__caps__"] * len(written)
    for text, mark, row in zip(texts, wanted, second["rows"], strict=True):
        assert text == f"{mark}{row['prompt']}__ans__{row['completion']}"
    assert first["log"].losses[-1]["lamol"] < 0.5 * first["log"].losses[0]["lamol"]
    assert not strategy.shared, "nothing is kept but the weights"


def test_they_are_drawn_once_and_found_again(learned, monkeypatch):
    strategy, (_, second) = learned
    (file,) = (strategy.stages.folder / "answers").glob("*.jsonl")
    first, lines = read_lines(file)
    assert first["prompts"] == len(lines) == 8
    monkeypatch.setattr(drawn_module.generate, "answers", None)
    monkeypatch.setattr(strategy, "packs", strategy.packs[:1])
    strategy.context(strategy.scenario.tasks[1])  # puts the model after the first task
    again = strategy._write(8, strategy.scenario.tasks[1], 20)
    assert [row for _, row in again] == second["rows"][8:]


@pytest.mark.parametrize(
    ("said", "row"),
    [
        (Answer("q__ans__a", 3, True), {"prompt": "q", "completion": "a"}),
        (Answer("q__ans__a", 3, False), None),
        (Answer("q a", 3, True), None),
        (Answer("q__ans__a__ans__b", 3, True), None),
    ],
)
def test_what_is_no_row_is_left_out(build, monkeypatch, said, row):
    strategy = build("lamol")
    strategy.packs = [strategy._pack(task, {}) for task in strategy.scenario.tasks]
    seen = []

    def draw(stages, model, tokenizer, prompts, *rest):
        seen.extend(prompts)
        return [said] * len(prompts)

    monkeypatch.setattr(module("lamol"), "drawn", draw)
    found = strategy._write(5, strategy.scenario.tasks[0], 20)
    assert found == ([] if row is None else [("math", row)] * 2 + [("cipher", row)] * 3)
    assert seen == ["__math__"] * 2 + ["__cipher__"] * 3, "of each task as many as of another"


GRADIENTS: list[dict] = []


def keep(model, gradients, state, step):
    GRADIENTS.append({n: g.clone() for n, g in gradients.items()})


def test_the_loss_on_whole_rows_is_that_of_every_token_after_the_mark(nano):
    """Against log-likelihoods summed by hand, row by row, by the tokens of a mean row; and the same however cut."""
    model, tokenizer = nano
    rows = [
        ("t", {"prompt": e.prompt * (1 + i % 2), "completion": e.completion})
        for i, e in enumerate(ROWS[:4])
    ]
    state = module("lamol").whole(tokenizer, rows, 64)

    def penalty(numbers):
        batch = {"rows": torch.tensor(numbers), "input_ids": torch.zeros(1)}
        return module("lamol").penalty(model, batch, None, state, weight=0.25, mean=20.0)

    nll = []
    for _, row in rows:
        head = tokenizer("__t__")["input_ids"]
        tail = tokenizer(f"{row['prompt']}__ans__{row['completion']}", add_special_tokens=False)
        tail = [*tail["input_ids"], tokenizer.eos_token_id]
        logs = model(input_ids=torch.tensor([head + tail])).logits[0].log_softmax(-1)
        nll.append(-sum(logs[len(head) + i - 1, t] for i, t in enumerate(tail)).item())
    everything = penalty([0, 1, 2, 3]).item()
    assert everything == pytest.approx(0.25 * sum(nll) / 4 / 20, rel=1e-5)
    halves = (penalty([3, 0]).item() + penalty([2, 1]).item()) / 2
    assert everything == pytest.approx(halves, rel=1e-5)
    dpo = {"completion_mask": 1, "input_ids": torch.zeros(1)}
    given = {"weight": 1.0, "mean": 1.0}
    assert not module("lamol").penalty(None, dpo, None, state, **given), "pairs are not written"


def test_a_long_row_loses_the_start_of_its_prompt_and_not_its_mark(nano):
    _, tokenizer = nano
    state = module("lamol").whole(
        tokenizer, [("t", {"prompt": "x" * 60 + "y", "completion": "z"})], 20
    )
    text = tokenizer.decode(state["input_ids"][0], skip_special_tokens=True)
    assert text.startswith("__t__x") and text.endswith("xy__ans__z")
    assert state["input_ids"].shape == (1, 20)


def test_the_preference_half_trains_on_its_own_pairs_alone(build, tiny_scenario):
    half = Preference(steps=2, batch=4, learning_rate=1e-3)

    def recipe(task):
        pairs = [Pair(e.prompt, e.completion, "no") for e in task.train[:8]]
        training = replace(task.training, preference=half, max_length=48)
        return replace(task, pairs=pairs, training=training)

    scenario = replace(tiny_scenario, tasks=tuple(map(recipe, tiny_scenario.tasks)))
    strategy = build("lamol", scenario=scenario)
    asked = spied(strategy)
    learn(strategy, scenario)
    assert [len(a["rows"]) for a in asked[1::2]] == [8, 8]
    assert asked[1]["log"].losses[0]["lamol"] == 0 < asked[0]["log"].losses[0]["lamol"]


def test_special_tokens_stay_in_what_is_written(nano):
    """As those of a chat template; the one that ends an answer is none of it."""
    model, tokenizer = nano
    tokenizer.add_special_tokens({"additional_special_tokens": ["a"]})
    plain = answers(model, tokenizer, ["b"] * 8, 40, 1.0, 3)
    whole = answers(model, tokenizer, ["b"] * 8, 40, 1.0, 3, special=True)
    for one, other in zip(plain, whole, strict=True):
        kept = [x.text.replace("a", "") for x in (one, other)]  # other tokens have it, too
        for token in tokenizer.all_special_tokens:
            kept[1] = kept[1].replace(token, "")
        assert kept[0] == kept[1]
    assert any(len(b.text) > len(a.text) for a, b in zip(plain, whole, strict=True))
    (end,) = answers(model, tokenizer, ["1 + 1 = "], 40, 1.0, 3, special=True)
    assert tokenizer.eos_token not in end.text
