"""What holds for every strategy: the base is never touched, packs fit, exactly the named packs are active."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from cl_graft import plugins
from cl_graft.errors import OverBudget
from cl_graft.models.roles import roles
from cl_graft.skillpack.format.file import SkillPack, fingerprint
from cl_graft.stream import benchmark

EVERY = plugins.names("strategy")
QUICK = {
    "model_grafting": {"epochs": 2, "batches": 2, "rate": 1e8},
    "bitdelta": {"steps": 3, "budget": "20%"},  # a sign for every entry, and the header
    "compeft": {"alpha": 2.0},
}


def play(strategy, scenario, after=lambda: None):
    """The loop every Avalanche user knows; returns the scores after each experience."""
    stream, rows = benchmark(scenario), []
    for experience in stream.train_stream:
        strategy.train(experience, eval_streams=[])
        after()
        strategy.eval(stream.test_stream)
        rows.append(
            {
                t: [o.score for o in r[scenario_score(scenario, t)]]
                for t, r in strategy.results.items()
            }
        )
    return rows


def scenario_score(scenario, name):
    return next(t.score for t in scenario.tasks if t.name == name)


@dataclass
class Played:
    """A strategy that has learned the tiny scenario, to be looked at; its base and scores by the way.

    shared: the artefacts after each task.
    """

    strategy: Any
    base: str
    structure: str
    rows: list
    shared: list[dict]


@pytest.fixture(scope="module")
def plays():
    return {}


@pytest.fixture
def played(plays, build, tiny_scenario):
    """Every strategy learns once for all tests of this file."""

    def by(name):
        if name not in plays:
            strategy = build(name, **QUICK.get(name, {}))
            base, structure = fingerprint(strategy.model.named_parameters()), str(strategy.model)
            shared: list[dict] = []
            rows = play(strategy, tiny_scenario, lambda: shared.append(dict(strategy.shared)))
            plays[name] = Played(strategy, base, structure, rows, shared)
        return plays[name]

    return by


@pytest.mark.parametrize("name", EVERY)
def test_every_strategy_leaves_the_base_bit_for_bit_and_keeps_its_budget(
    name, played, tiny_scenario, tmp_path
):
    strategy, before = played(name).strategy, played(name).base
    assert fingerprint(strategy.model.named_parameters()) == before
    assert str(strategy.model) == played(name).structure
    assert len(strategy.packs) == len(tiny_scenario.tasks)
    for task, pack in zip(tiny_scenario.tasks, strategy.packs, strict=True):
        size = pack.save(tmp_path / f"{task.name}.safetensors")
        assert size == pack.nbytes == (tmp_path / f"{task.name}.safetensors").stat().st_size
        if strategy.budgeted:
            assert size <= strategy.budget.bytes
        assert pack.task == task.name and pack.base == before
        assert (
            SkillPack.load(tmp_path / f"{task.name}.safetensors", base=before).digest == pack.digest
        )
    assert any(delta.abs().max() > 0 for delta in strategy.packs[0].decode().values())


@pytest.mark.parametrize("name", EVERY)
def test_a_strategy_keeps_something_of_every_role_that_it_trains(name, played):
    """What is always thrown away is not declared, and so frozen."""
    strategy = played(name).strategy
    found = roles(strategy.model)
    kept = {found[n] for pack in strategy.packs for n in pack.tensors}
    assert kept == {*found.values()} & {*strategy.touches}


def losses(strategy):
    """Every value of the log but those of the clock and the machine, to the last digit."""
    clocks = ("seconds", "tokens_per_second", "peak_memory_mb")
    return [{k: v for k, v in x.items() if k not in clocks} for x in strategy.log.losses]


@pytest.mark.parametrize("name", EVERY)
def test_a_strategy_given_its_packs_back_goes_on_as_if_never_stopped(
    name, played, build, tiny_scenario, tmp_path
):
    whole = played(name).strategy

    def through_a_file(pack):
        pack.save(tmp_path / "pack.safetensors")
        return SkillPack.load(tmp_path / "pack.safetensors")

    resumed = build(name, **QUICK.get(name, {}))
    resumed.packs = [through_a_file(whole.packs[0])]
    resumed.shared = {n: through_a_file(p) for n, p in played(name).shared[0].items()}
    stream = benchmark(tiny_scenario)
    resumed.train(stream.train_stream[1], eval_streams=[])
    assert losses(resumed) == losses(whole)[-len(losses(resumed)) :]
    assert resumed.packs[1].digest == whole.packs[1].digest
    assert [(n, p.digest) for n, p in resumed.shared.items()] == [
        (n, p.digest) for n, p in whole.shared.items()
    ]
    assert [p.digest for p in resumed.compose(0)] == [p.digest for p in whole.compose(0)]


@pytest.mark.parametrize("name", ["graftllm", "individual", "magnitude"])
def test_a_forget_free_strategy_answers_old_tasks_with_the_very_same_pack(name, played):
    strategy, rows = played(name).strategy, played(name).rows
    assert rows[1]["math"] == rows[0]["math"]
    assert strategy.compose(0) == [strategy.packs[0]] and strategy.compose(None) == []


def test_sequential_answers_with_the_newest_weights_and_sum_with_all_packs(played):
    sequential, tailor = played("sequential").strategy, played("model_tailor").strategy
    assert sequential.compose(0) == sequential.compose(1) == [sequential.packs[1]]
    assert tailor.compose(0) == tailor.packs


def test_a_tasks_weights_are_base_plus_exactly_the_active_deltas(played):
    strategy = played("model_tailor").strategy
    expected = {n: w.clone() for n, w in strategy.base.items()}
    for name in expected:
        for pack in strategy.packs:
            if name in pack.tensors:
                expected[name] = expected[name] + pack.decode()[name]
    strategy.grafted.activate(strategy.compose(0))
    for name, parameter in strategy.model.named_parameters():
        assert torch.allclose(parameter, expected[name], atol=1e-7), name
    strategy.grafted.unload()


def test_individual_after_training_is_the_fine_tuned_model_to_bf16(build, tiny_scenario):
    """The pack of `individual` stands for the weights that the trainer left, not for something else."""
    strategy = build("individual")
    seen, teach = {}, strategy.teach

    def spy(model, task):
        folder = teach(model, task)
        seen.update({n: p.detach() - strategy.base[n] for n, p in model.named_parameters()})
        return folder

    strategy.teach = spy
    strategy.train(benchmark(tiny_scenario).train_stream[0], eval_streams=[])
    decoded = strategy.packs[0].decode()
    for name, delta in seen.items():
        assert torch.equal(decoded[name], delta.bfloat16().float()), name


def test_a_budget_that_holds_nothing_is_refused_in_one_sentence(build, tiny_scenario):
    for name in ("graftllm", "lora", "model_tailor", "model_grafting", "magnitude"):
        strategy = build(name, budget="200B")
        with pytest.raises(OverBudget, match="raise") as caught:
            strategy.train(benchmark(tiny_scenario).train_stream[0], eval_streams=[])
        assert str(caught.value).count("\n") == 0


def test_the_papers_convention_counts_kept_weights_and_not_their_masks(build, tiny_scenario):
    by_bytes, by_weights = build("magnitude"), build("magnitude", budget="10%:weights")
    total = sum(p.numel() for p in by_bytes.model.parameters())
    for strategy in (by_bytes, by_weights):
        strategy.train(benchmark(tiny_scenario).train_stream[0], eval_streams=[])
    kept = sum(e.meta["kept"] for e in by_weights.packs[0].tensors.values())
    assert kept == int(0.1 * total) and by_weights.packs[0].nbytes > by_weights.budget.bytes
    assert sum(e.meta["kept"] for e in by_bytes.packs[0].tensors.values()) < kept


def test_merging_methods_answer_with_one_merged_delta(build, tiny_scenario):
    strategy = build("task_arithmetic", scale=0.5)
    play(strategy, tiny_scenario)
    (merged,) = strategy.compose(0)
    first, second = (pack.decode() for pack in strategy.packs)
    for name, delta in merged.decode().items():
        assert torch.allclose(delta, 0.5 * (first[name] + second[name]), atol=1e-6)


def test_ties_keeps_the_elected_sign_and_the_mean_of_those_that_agree():
    ties = plugins.load("strategy", "ties").function
    deltas = [torch.tensor([3.0, -2.0, 0.1, 4.0]), torch.tensor([1.0, 5.0, 0.2, 2.0])]
    # Three of four survive trimming: 0.1 and 0.2 go. Second entry: the sum is positive, so -2 has no say.
    threshold = sys.modules[ties.__module__].threshold
    least = [threshold({"w": x}, density=0.75) for x in deltas]
    assert least == [2.0, 1.0]
    assert torch.allclose(ties(deltas, least, scale=1.0), torch.tensor([2.0, 5.0, 0.0, 3.0]))


def test_ties_in_parts_is_ties_of_the_whole_bit_for_bit(monkeypatch):
    ties = plugins.load("strategy", "ties").function
    seed = torch.Generator().manual_seed(0)
    deltas = [torch.randn(37, 53, generator=seed) for _ in range(5)]
    whole = ties(deltas, [0.4] * 5, scale=1.0)
    trimmed = torch.stack([torch.where(x.abs() >= 0.4, x, 0.0) for x in deltas])
    agrees = (trimmed * trimmed.sum(0).sign()) > 0
    assert torch.equal(whole, (trimmed * agrees).sum(0) / agrees.sum(0).clamp_min(1))
    monkeypatch.setattr(sys.modules[ties.__module__], "PART", 128)
    assert torch.equal(ties(deltas, [0.4] * 5, scale=1.0), whole)


@pytest.mark.parametrize("density", [1e-6, 0.2, 0.5, 1.0])
def test_the_threshold_of_ties_is_the_exact_one_of_all_tensors_together(density):
    threshold = sys.modules[plugins.load("strategy", "ties").function.__module__].threshold
    torch.manual_seed(0)
    delta = {"a": torch.randn(40, 50) * 1e-3, "b": torch.randn(300), "c": torch.zeros(100)}
    delta["b"][:150] = delta["b"][0]  # many of one magnitude
    magnitudes = torch.cat([x.abs().flatten() for x in delta.values()])
    keep = max(1, int(density * len(magnitudes)))
    assert threshold(delta, density=density) == magnitudes.topk(keep).values[-1].item()


def test_sft_then_dpo_trains_on_pairs_that_the_model_itself_sampled(build, tiny_scenario):
    from dataclasses import replace

    from cl_graft.task import Preference

    preference = Preference(prompts=16, samples=8, steps=3, batch=4, temperature=1.5)
    tasks = tuple(
        replace(t, training=replace(t.training, steps=60, preference=preference))
        for t in tiny_scenario.tasks[:1]
    )
    scenario = replace(tiny_scenario, tasks=tasks)
    with_dpo = build("individual", scenario=scenario)
    with_dpo.train(benchmark(scenario).train_stream[0], eval_streams=[])
    plain = build("individual", scenario=scenario.with_training(preference=None))
    plain.train(benchmark(scenario).train_stream[0], eval_streams=[])
    accuracies = [x for x in with_dpo.log.losses if "rewards/accuracies" in x]
    assert accuracies, "no preference pair was found"
    assert with_dpo.packs[0].digest != plain.packs[0].digest


def test_from_train_to_the_optimizers_loop_there_are_six_steps_at_most(
    build, tiny_scenario, monkeypatch
):
    """Functions of ours on the way, and the library's own `train` at the end of it."""
    from transformers import Trainer

    way, train = [], Trainer.train

    def seen(self, *given, **named):
        frame = sys._getframe(1)
        while frame is not None:
            if "/cl_graft/" in frame.f_code.co_filename:
                way.append(frame.f_code.co_name)
            frame = frame.f_back
        return train(self, *given, **named)

    monkeypatch.setattr(Trainer, "train", seen)
    build("individual").train(benchmark(tiny_scenario).train_stream[0], eval_streams=[])
    assert way[::-1] == ["_train_exp", "learn", "teach", "run", "fit"]
