"""Replay: a uniform memory, an exact share of it among each task's rows, and nothing but what the bytes say."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from cl_graft.errors import CLGraftError
from cl_graft.skillpack.format.file import SkillPack
from cl_graft.strategy.memory import MEMORY, Memory, Reservoir, draw
from cl_graft.task import Pair, Preference
from tests.baselines.methods import learn, spied


def rows(*names):
    return [{"prompt": n, "completion": n} for n in names]


def kept(memory):
    return {kind: [r["prompt"] for r in res.rows] for kind, res in memory.kinds.items()}


def test_every_row_of_the_stream_is_in_the_reservoir_with_the_same_chance():
    """Ten rows in three parts, four places: each row is in 40 % of the memories (chi-square, 9 degrees)."""
    seeds, counts = 3000, Counter()
    for seed in range(seeds):
        reservoir = Reservoir(4)
        for part in ("abc", "de", "fghij"):
            reservoir.see(rows(*part), seed)
        assert len({r["prompt"] for r in reservoir.rows}) == 4 and reservoir.seen == 10
        counts.update(r["prompt"] for r in reservoir.rows)
    expected = seeds * 4 / 10
    chi = sum((counts[name] - expected) ** 2 / (expected * 0.6) for name in "abcdefghij")
    assert chi * 0.9 < 27.9, "p < .001; drawn without replacement, hence the .9"


def test_a_stream_that_fits_is_kept_whole_and_drawn_evenly():
    reservoir = Reservoir(5)
    reservoir.see(rows(*"abc"), 0)
    assert reservoir.rows == rows(*"abc")
    drawn = Counter(r["prompt"] for r in draw(reservoir.rows, 7, 1))
    assert sorted(drawn.values()) == [2, 2, 3]
    again, other = draw(reservoir.rows, 7, 1), draw(reservoir.rows, 7, 2)
    assert draw(reservoir.rows, 7, 1) == again != other
    assert draw([], 7, 1) == []


def test_a_memory_read_back_goes_on_as_one_that_was_never_written(tmp_path):
    whole, stopped = Memory(3, 7), Memory(3, 7)
    for memory in (whole, stopped):
        memory.see("sft", rows("ä", "b\n", "c", "d"))
        memory.see("dpo", [{"prompt": "p", "chosen": "y", "rejected": "n"}])
    file = tmp_path / "memory.safetensors"
    SkillPack(stopped.tensors(), "t", "replay", {}, "0" * 32).save(file)
    again = Memory(3, 7, SkillPack.load(file).tensors)
    assert again.kinds == whole.kinds
    for memory in (whole, again):
        memory.see("sft", rows(*"efghij"))
    assert again.kinds == whole.kinds and again["sft"].seen == 10
    with pytest.raises(CLGraftError, match="size=0 holds nothing"):
        Memory(0, 7)


@pytest.fixture
def learned(build, tiny_scenario):
    """Both tasks with SFT and DPO on given pairs, recipes in epochs; the strategy, and what its stages were."""
    half = Preference(epochs=1, batch=8, learning_rate=1e-4)

    def recipe(task):
        pairs = [Pair(e.prompt, e.completion, "no") for e in task.train[:16]]
        return replace(
            task, pairs=pairs, training=replace(task.training, epochs=1.0, preference=half)
        )

    scenario = replace(tiny_scenario, tasks=tuple(map(recipe, tiny_scenario.tasks)))
    strategy = build("replay", scenario=scenario, size=20, share=0.25)
    asked = spied(strategy)
    return learn(strategy, scenario), scenario, asked


def test_the_share_of_old_rows_is_exact_and_the_steps_are_the_recipes(learned):
    """48 new rows and 16 old ones are a quarter, 16 new pairs and 5 old ones as near as can be."""
    _, scenario, asked = learned
    first, second = scenario.tasks
    sft_1, dpo_1, sft_2, dpo_2 = asked
    assert [len(a["rows"]) for a in asked] == [48, 16, 48 + 16, 16 + 5]
    assert [a["job"].steps for a in asked] == [6, 2, 6, 2], "as without a memory: 48 / 8, 16 / 8"
    new, old = sft_2["rows"][:48], sft_2["rows"][48:]
    assert [r["prompt"] for r in new] == [e.prompt for e in second.train]
    assert all(r in sft_1["rows"] for r in old) and len({r["prompt"] for r in old}) == 16
    pairs = dpo_2["rows"][16:]
    assert all(p in dpo_1["rows"] and p["rejected"] == "no" for p in pairs)
    assert not any(p in dpo_2["rows"][:16] for p in pairs)


def test_what_is_remembered_is_what_the_artefact_says_and_its_bytes_count(learned):
    strategy, scenario, _ = learned
    memory = Memory(20, 0, strategy.shared[MEMORY].tensors)
    assert (memory["sft"].seen, memory["dpo"].seen) == (96, 32)
    assert len(memory["sft"].rows) == len(memory["dpo"].rows) == 20
    prompts = {e.prompt for e in scenario.tasks[0].train}
    of_first = sum(r["prompt"] in prompts for r in memory["sft"].rows)
    assert 3 <= of_first <= 17, "half of the stream"
    alive = sum(p.nbytes for p in strategy.alive)
    assert alive == strategy.packs[-1].nbytes + strategy.shared[MEMORY].nbytes
    text = sum(len(r["prompt"]) for r in memory["sft"].rows)
    assert strategy.shared[MEMORY].nbytes > text


def test_replay_is_another_model_than_sequential_and_shares_no_stage(build, tiny_scenario):
    ends, folders = [], []
    for name in ("sequential", "replay"):
        strategy = build(name)
        asked = spied(strategy)
        ends.append(learn(strategy, tiny_scenario).packs)
        folders.append({a["folder"].name for a in asked})
    assert not folders[0] & folders[1]
    plain, mixed = (packs[1].decode() for packs in ends)
    assert any((plain[n] - mixed[n]).abs().max() > 1e-4 for n in plain)
    same, too = (packs[0].decode() for packs in ends)
    assert all((same[n] == too[n]).all() for n in same), "the first task has nothing to replay"


def test_a_share_that_is_none_is_refused(build, tiny_scenario):
    with pytest.raises(
        CLGraftError,
        match=r"replay\.share=1.0 is not a number from 0, below 1; give one such as 0.3",
    ):
        learn(build("replay", share=1.0), tiny_scenario, 1)
