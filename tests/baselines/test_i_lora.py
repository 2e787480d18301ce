"""I-LoRA: the average by hand, the consistency loss by brute force, and what a run replays and keeps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cl_graft.strategy.memory import MEMORY, Memory, tokens
from cl_graft.task import Pair, Preference
from cl_graft.training.adapters import Adapter
from cl_graft.training.average import average
from tests.baselines.methods import learn, module, spied

TEXTS = [{"prompt": f"Q: Copy {w}.\nA: ", "completion": w} for w in ("ab", "c", "defg", "hi")]


def test_the_average_is_worked_out_by_hand():
    """Alpha .25 is the slow weights' own part: 1 becomes .25 * 1 + .75 * 3 = 2.5, and from 5 it is 4.375."""
    model = torch.nn.Linear(1, 1, bias=False)
    state = {"weight": torch.ones(1, 1)}
    for fast, wanted in ((3.0, 2.5), (5.0, 4.375)):
        torch.nn.init.constant_(model.weight, fast)
        with torch.no_grad():
            average(model, state, 1, decay=0.25)
        assert state["weight"].item() == wanted


@pytest.fixture
def apart(nano):
    """A model with a fast adapter, a slow one's state, and a batch of two new rows and two old ones."""
    model, tokenizer = nano
    batch = {**tokens(tokenizer, TEXTS, 64), "rows": torch.tensor([0, 5, 3, 6])}
    with Adapter(model, 2, 4.0, 0.0) as adapter:
        generator = torch.Generator().manual_seed(0)
        fast = adapter.trained()
        fast = {n: x + 0.1 * torch.randn(x.shape, generator=generator) for n, x in fast.items()}
        slow = {n: x + 0.1 * torch.randn(x.shape, generator=generator) for n, x in fast.items()}
        adapter.train_on(fast)
        yield adapter, fast, slow, batch


def held(adapter, batch, slow, **options):
    given = {"weight": 1.0, "new": 5, "old": 5} | options
    return module("i_lora").penalty(adapter.model, batch, None, slow, **given)


def states(adapter, weights, row):
    adapter.train_on(weights)
    with torch.no_grad():
        return adapter.model(**row, output_hidden_states=True).hidden_states


def test_the_loss_is_the_mean_square_between_hidden_states_of_old_rows(apart):
    """Rows 5 and 6 of the stage are old; each alone and without padding, every layer, every token."""
    adapter, fast, slow, batch = apart
    wanted = []
    for n in (1, 3):
        size = int(batch["attention_mask"][n].sum())
        row = {"input_ids": batch["input_ids"][n : n + 1, :size]}
        pairs = zip(states(adapter, fast, row), states(adapter, slow, row), strict=True)
        wanted.append(torch.stack([(f - s).square().mean() for f, s in pairs]).mean())
    adapter.train_on(fast)
    mean = torch.stack(wanted).mean()
    assert mean > 1e-4
    torch.testing.assert_close(held(adapter, batch, slow), mean, rtol=1e-4, atol=0)
    torch.testing.assert_close(held(adapter, batch, slow, weight=3.0), 3 * mean, rtol=1e-4, atol=0)


def test_it_weighs_the_same_however_a_step_is_cut(apart):
    adapter, _, slow, batch = apart
    whole = held(adapter, batch, slow, new=3, old=2)
    parts = [{name: x[n : n + 2] for name, x in batch.items()} for n in (0, 2)]
    cut = [held(adapter, part, slow, new=3, old=2) for part in parts]
    torch.testing.assert_close(torch.stack(cut).mean(), whole, rtol=1e-4, atol=0)
    assert held(adapter, {n: x[:1] for n, x in batch.items()}, slow) == 0, "no old row"


def test_it_pulls_at_the_fast_weights_alone_and_towards_the_slow_ones(apart):
    adapter, fast, slow, batch = apart
    before = held(adapter, batch, slow)
    before.backward()
    assert all(x.grad is None for x in slow.values())
    step = {n: x - 1e-3 * adapter.model.get_parameter(n).grad for n, x in fast.items()}
    adapter.train_on(step)
    assert held(adapter, batch, slow) < before
    adapter.train_on(slow)
    assert held(adapter, batch, slow).item() == pytest.approx(0, abs=1e-12)


def test_pairs_of_dpo_are_held_to_nothing(apart):
    adapter, _, slow, batch = apart
    assert held(adapter, {**batch, "completion_mask": batch["attention_mask"]}, slow) == 0


def test_a_run_replays_as_many_old_rows_as_new_ones_and_keeps_both_adapters(build, tiny_scenario):
    strategy = build("i_lora", size=20, rank=2)
    asked = spied(strategy)
    learn(strategy, tiny_scenario)
    assert [len(a["rows"]) for a in asked] == [48, 96]
    assert [[t.kind for t in a["terms"]] for a in asked] == [["follow"], ["penalty", "follow"]]
    held, follow = asked[1]["terms"]
    assert held.options == {"weight": 1.0, "new": 48, "old": 48} and held.state is follow.state
    assert [x["i_lora"] > 0 for x in asked[1]["log"].losses].count(True) >= 5
    assert Memory(20, 0, strategy.shared[MEMORY].tensors)["sft"].seen == 96
    fast, slow = (p.tensors for p in (strategy.shared["fast"], strategy.packs[-1]))
    assert fast.keys() == slow.keys() and {e.meta["rank"] for e in fast.values()} == {2}
    name = "model.layers.0.mlp.up_proj.weight"
    apart = strategy.shared["fast"].decode()[name] - strategy.packs[-1].decode()[name]
    assert 0 < apart.norm() < 0.3 * strategy.packs[-1].decode()[name].norm()


def test_without_a_part_of_its_own_the_slow_adapter_is_the_fast_one(build, tiny_scenario):
    """And the next task goes on from both: its stage starts at the fast one, its state at the slow one."""
    strategy = build("i_lora", alpha=0.0, rank=2, size=20)
    asked = spied(strategy)
    learn(strategy, tiny_scenario)
    fast, slow = strategy.shared["fast"], strategy.packs[-1]
    assert all(torch.equal(fast.delta(n), slow.delta(n)) for n in slow.tensors)
    first, second = (a["terms"][-1].state for a in asked)
    assert first.keys() == second.keys()
    assert any(x.abs().max() > 0 for n, x in second.items() if "lora_B" in n)
    assert all(x.abs().max() == 0 for n, x in first.items() if "lora_B" in n)


def test_the_average_goes_on_through_both_halves_of_a_recipe(build, tiny_scenario):
    from cl_graft.training.term import followed

    half = Preference(epochs=1, batch=8, learning_rate=1e-4)
    task = tiny_scenario.tasks[0]
    pairs = [Pair(e.prompt, e.completion, "no") for e in task.train[:16]]
    task = replace(task, pairs=pairs, training=replace(task.training, preference=half))
    scenario = replace(tiny_scenario, tasks=(task,))
    strategy = build("i_lora", scenario=scenario, rank=2)
    asked = spied(strategy)
    learn(strategy, scenario, 1)
    sft, dpo = asked
    end = followed(sft["terms"], sft["folder"])[-1].state
    assert all(torch.equal(x, end[n]) for n, x in dpo["terms"][-1].state.items())
    last = followed(dpo["terms"], dpo["folder"])[-1].state
    assert any(not torch.equal(x, end[n]) for n, x in last.items())
