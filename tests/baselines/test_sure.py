"""SuRe: what surprises by brute force, the memory's places by hand, and the slow weights that answer."""

from __future__ import annotations

import pytest
import torch

from cl_graft.strategy.memory import MEMORY, Memory, Surprising, tokens
from cl_graft.strategy.surprise import surprise
from tests.baselines.methods import learn, spied

TEXTS = [{"prompt": f"Q: Copy {w}.\nA: ", "completion": w} for w in ("ab", "c", "defghij", "kl")]


def rows(*names):
    return [{"prompt": n, "completion": n} for n in names]


def prompts(part):
    return [r["prompt"] for r in part.rows]


def test_every_task_has_an_equal_part_and_its_least_surprising_rows_go():
    part = Surprising(6)
    part.see(rows(*"abcdefgh"), [1, 8, 2, 7, 3, 6, 4, 5])
    assert prompts(part) == list("bdfhge")
    part.see(rows(*"ijkl"), [0.1, 0.4, 0.2, 0.3])
    assert prompts(part) == list("bdf" + "jlk"), (
        "three of each; surprise is not compared across tasks"
    )
    part.see(rows(*"m"), [9])
    assert prompts(part) == list("bd" + "jl" + "m")
    part.see(rows(*"no"), [1, 1])
    assert prompts(part) == list("b" + "j" + "m" + "n"), "of equals the first"


def test_a_memory_read_back_is_the_same():
    memory = Memory(4, 0, None, Surprising)
    memory.see("sft", rows(*"abc"), [1, 3, 2])
    memory.see("sft", rows(*"de"), [1, 2])
    again = Memory(4, 0, memory.tensors(), Surprising)
    assert again.kinds == memory.kinds and prompts(again["sft"]) == list("bc" + "ed")
    assert again["dpo"].rows == []


def test_surprise_is_the_mean_loss_of_a_whole_row(nano):
    """Prompt and answer, each row alone, against the model's own loss with every token a label."""
    model, tokenizer = nano
    wanted = []
    for row in TEXTS:
        ids = tokens(tokenizer, [row], 64)["input_ids"]
        wanted.append(model(input_ids=ids, labels=ids).loss.item())
    model.train()
    for size in (1, 3, 8):
        found = surprise(model, tokenizer, TEXTS, 64, size)
        assert found == pytest.approx(wanted, rel=1e-4)
    assert model.training, "as it was"
    pairs = [{"prompt": r["prompt"], "chosen": r["completion"], "rejected": "no"} for r in TEXTS]
    assert surprise(model, tokenizer, pairs, 64) == pytest.approx(wanted, rel=1e-4)


def test_a_run_keeps_what_surprised_the_model_that_came_to_the_task(build, tiny_scenario):
    """Of the first task that is the base. A quarter of the second stage's rows are old ones."""
    strategy = build("sure", size=20, rank=2)
    first = tiny_scenario.tasks[0]
    given = [{"prompt": e.prompt, "completion": e.completion} for e in first.train]
    scores = surprise(strategy.model, strategy.tokenizer, given, first.training.max_length)
    order = sorted(range(len(given)), key=lambda n: -scores[n])
    asked = spied(strategy)
    learn(strategy, tiny_scenario, 1)
    memory = Memory(20, 0, strategy.shared[MEMORY].tensors, Surprising)
    assert memory["sft"].rows == [given[n] for n in order[:20]]
    learn_second(strategy, tiny_scenario)
    assert [len(a["rows"]) for a in asked] == [48, 64]
    old = asked[1]["rows"][48:]
    assert all(r in [given[n] for n in order[:20]] for r in old)
    memory = Memory(20, 0, strategy.shared[MEMORY].tensors, Surprising)
    assert [len(kept) for kept in memory["sft"].tasks] == [10, 10]
    assert memory["sft"].tasks[0] == [given[n] for n in order[:10]]


def learn_second(strategy, scenario):
    from cl_graft.stream import benchmark

    strategy.train(benchmark(scenario).train_stream[1], eval_streams=[])


def test_replay_can_keep_the_same_rows_without_slow_weights(build, tiny_scenario):
    kept = {}
    for name, options in (("replay", {"select": "surprise"}), ("sure", {"rank": 2})):
        strategy = learn(build(name, size=20, **options), tiny_scenario, 1)
        kept[name] = Memory(20, 0, strategy.shared[MEMORY].tensors, Surprising)["sft"].rows
    assert kept["replay"] == kept["sure"] and len(kept["sure"]) == 20


@pytest.mark.parametrize(("decay", "answers"), [(0.0, "fast"), (1.0, "base")])
def test_the_slow_weights_answer(build, tiny_scenario, decay, answers):
    """All of the fast ones, or none: B stays at zero."""
    strategy = learn(build("sure", decay=decay, rank=2, size=20), tiny_scenario, 1)
    fast, slow = strategy.shared["fast"], strategy.packs[0]
    assert strategy.compose(0) == [slow]
    for name in slow.tensors:
        wanted = fast.delta(name) if answers == "fast" else 0 * fast.delta(name)
        assert torch.equal(slow.delta(name), wanted) and fast.delta(name).abs().max() > 0
