"""The three LoRA conventions, and that the pack is the adapter that PEFT trained."""

from __future__ import annotations

import pytest
import torch

from cl_graft import plugins
from cl_graft.errors import CLGraftError, UnknownName
from cl_graft.strategy import compressor
from cl_graft.stream import benchmark

NAME = "model.layers.0.self_attn.q_proj.weight"


def learn(strategy, scenario, experiences=2):
    for experience in list(benchmark(scenario).train_stream)[:experiences]:
        strategy.train(experience, eval_streams=[])
    return strategy


def test_the_pack_is_the_merged_adapter_of_peft(build, tiny_scenario, monkeypatch):
    """PEFT's own delta of what it trained, against the decoded pack, to bf16 of the factors."""
    from peft.tuners.lora import LoraModel

    strategy, trained = build("lora", budget="50%", rank=4), {}
    unload = LoraModel.unload

    def look_then_unload(self):
        for name, module in self.named_modules():
            if hasattr(module, "get_delta_weight"):
                trained[f"{name.removeprefix('model.')}.weight"] = (
                    module.get_delta_weight("default").detach().clone()
                )
        return unload(self)

    monkeypatch.setattr(LoraModel, "unload", look_then_unload)
    learn(strategy, tiny_scenario, 1)
    decoded = strategy.packs[0].decode()
    assert decoded.keys() <= {n if n.startswith("model.") else f"model.{n}" for n in trained}
    for name, delta in decoded.items():
        theirs = trained.get(name, trained.get(name.removeprefix("model.")))
        assert theirs.abs().max() > 0
        assert torch.allclose(delta, theirs, rtol=0.02, atol=0.02 * theirs.abs().max().item()), name


def test_trained_on_replaces_summed_appends_and_merged_accumulates(build, tiny_scenario):
    one = learn(build("lora", budget="50%", convention="trained_on", rank=2), tiny_scenario)
    assert one.compose(0) == [one.packs[1]]
    assert {e.meta["rank"] for e in one.packs[1].tensors.values()} == {2}
    two = learn(build("lora", budget="50%", convention="summed", rank=2), tiny_scenario)
    assert two.compose(0) == two.packs
    three = learn(build("lora", budget="50%", convention="merged", rank=2), tiny_scenario)
    assert three.compose(0) == [three.packs[1]]
    assert {e.meta["rank"] for e in three.packs[1].tensors.values()} == {4}
    # What one stores as two packs the other stores as one: the same model.
    for name in three.packs[1].tensors:
        summed = sum(pack.decode()[name] for pack in two.packs)
        assert torch.allclose(three.packs[1].decode()[name], summed, atol=1e-5), name


def test_each_is_one_adapter_a_task_from_the_base(build, tiny_scenario):
    """The second task's adapter is that of a run which learns this task alone, and the first still answers."""
    strategy = learn(build("lora", convention="each", rank=2), tiny_scenario)
    first, second = strategy.packs
    assert strategy.keeps == "per_task" and strategy.compose(None) == []
    assert (strategy.compose(0), strategy.compose(1)) == ([first], [second])
    alone = build("lora", convention="each", rank=2, scenario=tiny_scenario)
    alone.packs = [second]  # whatever it is, it is not trained on
    alone.train(benchmark(tiny_scenario).train_stream[1], eval_streams=[])
    assert alone.packs[1].digest == second.digest


def test_who_is_told_the_task_follows_from_the_strategy_and_its_options():
    lora = plugins.load("strategy", "lora")
    told = {name: lora.keeps_by({"convention": name}) for name in lora.keeps}
    assert told == {"each": "per_task", "trained_on": "latest", "summed": "sum", "merged": "latest"}
    assert plugins.load("strategy", "sequential").keeps_by({}) == "latest"


def test_a_short_form_has_forms_by_its_option_convention():
    @compressor(keeps={"each": "per_task", "summed": "sum"})
    def both(delta, context, *, convention: str = "each"):
        return context.dense(delta)

    @compressor(keeps={"each": "per_task"})
    def silent(delta, context):
        return context.dense(delta)

    assert both.keeps_by({"convention": "summed"}) == "sum"
    with pytest.raises(
        UnknownName, match="no convention of both named 'sumed'; did you mean summed"
    ):
        both.keeps_by({"convention": "sumed"})
    with pytest.raises(
        CLGraftError, match="silent keeps by convention and has none; give it an option"
    ):
        silent.keeps_by({})


def test_trained_on_starts_from_the_adapter_it_had(build, tiny_scenario):
    """With no learning at all the second pack decodes to the first."""
    strategy = build("lora", rank=2, learning_rate_scale=1e-12, scenario=tiny_scenario)
    warm = build("lora", rank=2, scenario=tiny_scenario)
    learn(warm, tiny_scenario, 1)
    strategy.packs = list(warm.packs)
    strategy.train(benchmark(tiny_scenario).train_stream[1], eval_streams=[])
    first, second = (pack.decode() for pack in strategy.packs)
    for name in first:
        assert torch.allclose(first[name], second[name], atol=1e-7), name


@pytest.mark.parametrize("other", [{"alpha_over_rank": 4.0}, {"dropout": 0.5}])
def test_another_alpha_or_dropout_is_another_stage(build, tiny_scenario, other):
    """Both start from the very same weights with the same recipe, and are told apart all the same."""
    first, second, third = (build("lora", rank=2, **given) for given in ({}, other, {}))
    second.stages = third.stages = first.stages
    made = []
    for strategy in (first, second, third):
        learn(strategy, tiny_scenario, 1)
        made.append(len([*first.stages.folder.glob("stages/*/stage.json")]))
    assert made == [1, 2, 2]
    assert first.packs[0].delta(NAME).equal(third.packs[0].delta(NAME))
    assert not first.packs[0].delta(NAME).equal(second.packs[0].delta(NAME))


def test_without_a_rank_the_largest_that_fits_is_taken(build, tiny_scenario):
    strategy = learn(build("lora"), tiny_scenario, 1)
    rank = next(iter(strategy.packs[0].tensors.values())).meta["rank"]
    bigger = build("lora", rank=rank + 1)
    assert strategy.packs[0].nbytes <= strategy.budget.bytes
    with pytest.raises(Exception, match="lora.rank=4 takes .* the largest that fits is 3"):
        learn(bigger, tiny_scenario, 1)


def test_an_unknown_convention_is_answered_with_the_nearest(build):
    with pytest.raises(UnknownName, match="did you mean trained_on"):
        build("lora", convention="trained-on")


def test_embeddings_and_head_have_no_adapter(build, tiny_scenario):
    strategy = learn(build("lora", rank=1), tiny_scenario, 1)
    assert not [n for n in strategy.packs[0].tensors if "embed" in n or "lm_head" in n]
    assert plugins.options(plugins.load("strategy", "lora"))["rank"] is None
